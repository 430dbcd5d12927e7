"""The report: one HTML file that needs nothing else, made from the store at any time.

It opens from disk without a network, and its content policy forbids one. The policy
also names the page's own scripts by their hash, so that a script that got into the
text in spite of all escaping would not run.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import lbi
from lbi.collect import Row, rows
from lbi.comparing import Comparison, compare
from lbi.files import write_bytes
from lbi.ranking import Table, tables
from lbi.report import cost_section, sections
from lbi.report.cell_details import Details, Extent, details, whole_details, within
from lbi.report.cell_table import cell_table, controls
from lbi.report.chart_figures import Figures
from lbi.report.environments import environments
from lbi.report.environments import section as environment_section
from lbi.report.facts import Facts, read_facts
from lbi.report.figures import moment
from lbi.report.markup import Html, element, embedded_json, escaped, joined, paragraph
from lbi.report.vega import PACKAGE, bundle
from lbi.store import Store
from lbi.sweep_folder import read_header

MOST_BYTES = 2_000_000
"""The file stays below this: details are shortened first, then left out, then the charts."""

EXTENTS = (Extent(600, True), Extent(120, True), Extent(120, False), Extent(0, False))
"""How much of the details is tried, in turn."""

DETAILS, SHORTENED = "<!--lbi-details-->", Html("<!--lbi-shortened-->")
"""Where the page will have the details, and what they lack; all other text is escaped, so none looks like these."""

NO_SCRIPT = "The table is whole without JavaScript; sorting, the details of a row and the charts need it."


@dataclass(frozen=True, slots=True)
class Content:
    """Everything the page is made of, read once."""

    sweep: str
    root: Path
    header: dict[str, Any]
    rows: list[Row]
    tables: list[Table]
    facts: dict[int, Facts]
    problems: list[str]
    made: float
    comparison: Comparison | None = None


def write(store: Store, sweep: str, table: list[Row] | None = None) -> Path:
    """Write the sweep's report.html of its rows (read if not given); the file.

    Raises `InputError` where there is no such sweep.
    """
    file = store.sweep_folder(sweep) / "report.html"
    write_bytes(file, render(read_content(store, sweep, table)))
    return file


def read_content(store: Store, sweep: str, table: list[Row] | None = None) -> Content:
    """Gather what the store knows about the sweep."""
    header = read_header(store, sweep)
    table = rows(store, sweep) if table is None else table
    facts = read_facts(store, table)
    problems = [str(problem) for problem in [*(header.get("problems") or []), *store.problems]]
    return Content(
        sweep=sweep,
        root=store.root,
        header=header,
        rows=table,
        tables=tables(table, header.get("baseline"), header.get("max_kld") or 0.0),
        facts=facts,
        problems=list(dict.fromkeys(problems)),
        made=time.time(),
        comparison=compare(store, sweep, table, str(header["against"])) if header.get("against") else None,
    )


def render(content: Content) -> bytes:
    """The page, with as much of the details as fits."""
    known = whole_details(content.rows, content.facts, content.root)
    page = _page(content, bundle(), f"the Python package {PACKAGE} is not installed")
    tried: Details | None = None
    for extent in EXTENTS:
        cells = within(extent, known)
        if cells == tried:
            continue
        filled, tried = _with_details(page, cells, extent), cells
        if len(filled) < MOST_BYTES:
            return filled
    least = within(EXTENTS[-1], known)
    return _with_details(_page(content, None, "with them the file would be too large"), least, EXTENTS[-1])


def _with_details(page: str, cells: Details, extent: Extent) -> bytes:
    """The page with so much of the details in it, which are those `within` the extent."""
    filled = page.replace(SHORTENED, escaped(_shortened(extent)))
    # Generated text may hold half a character, which no encoding knows.
    return filled.replace(DETAILS, embedded_json(details(cells)), 1).encode(errors="replace")


def _page(content: Content, script: str | None, without: str) -> str:
    """The page without details; `script` draws its charts, and where there is none `without` says why."""
    scripts = [text for text in (script, _file("page.js")) if text]
    figures = Figures(None if script else without)
    main = _main(content, figures)
    return Template(_file("page.html")).substitute(
        policy=_policy(scripts),
        title=escaped(f"lbi: {content.sweep}"),
        style=_file("page.css"),
        header=_header(content),
        main=main,
        footer=_footer(content, script is not None),
        charts=embedded_json(figures.embedded()),
        details=DETAILS,
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, and no script but these runs; Vega interprets its expressions, so no eval either."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _header(content: Content) -> Html:
    links = [("result", "Result"), *((f"table-{index}", sections.title(table)) for index, table in _numbered(content))]
    if content.comparison:
        links.append(("against", f"Against {content.comparison.what}"))
    links += [
        ("cost", "Where the time went"),
        ("left-out", "Cells left out"),
        ("environment", "Environment"),
        ("numbers", "What the numbers mean"),
    ]
    links += [("request", "Request")]
    cells = "1 cell" if len(content.rows) == 1 else f"{len(content.rows)} cells"
    total = f"{cells}: {sections.counts(content.rows)}." if content.rows else "The plan has no cell."
    return joined(
        [
            element("h1", f"Sweep {content.sweep}"),
            paragraph(f"{total} Planned {moment(content.header.get('planned'))}.", class_="quiet"),
            element("nav", *(element("a", text, href=f"#{name}") for name, text in links), aria_label="Sections"),
            element("noscript", paragraph(NO_SCRIPT, class_="note")),
        ],
        "\n",
    )


def _numbered(content: Content) -> list[tuple[int, Table]]:
    return list(enumerate(content.tables, 1))


def _main(content: Content, figures: Figures) -> Html:
    parts = [_section("result", "Result", *_result(content))]
    for index, table in _numbered(content):
        made = _table_section(content, index, table, figures)
        parts.append(_section(f"table-{index}", sections.title(table), *made))
    if content.comparison:
        heading = f"Against {content.comparison.what}"
        parts.append(_section("against", heading, sections.comparison(content.comparison)))
    missing = [element("h3", "Numbers that measured cells lack"), sections.missing_numbers(content.rows)]
    found = environments(content.rows, content.facts)
    request = sections.request(content.header, str(content.root), content.made, content.rows)
    parts += [
        _section("cost", "Where the time went", cost_section.section(content.rows, content.header)),
        _section("left-out", "Cells left out", sections.not_run(content.rows)),
        _section("environment", "Environment", environment_section(found)),
        _section("numbers", "What the numbers mean", sections.how_measured(), *missing),
        _section("request", "Request", request),
    ]
    return joined(parts, "\n")


def _section(name: str, heading: str, *content: Html) -> Html:
    return element("section", element("h2", heading), *content, id=name)


def _result(content: Content) -> list[Html]:
    """The answers, and what stands in the way of trusting them."""
    made = []
    open_cells = sections.counts(row for row in content.rows if row["status"] in ("running", "missing"))
    if open_cells:
        made.append(paragraph(f"The sweep is not finished: {open_cells}.", class_="note"))
    for table in content.tables:
        if len(content.tables) > 1:
            made.append(element("h3", sections.title(table)))
        made += [sections.answers(table), sections.disturbed(table), sections.note(table, content.header)]
    return [*made, sections.problems(content.problems)]


def _table_section(content: Content, index: int, table: Table, figures: Figures) -> list[Html]:
    """Charts and table of one model and workload."""
    baseline = f"The baseline is {table.baseline['name']}." if table.baseline else "There is no baseline."
    legend = sections.interval_legend(table)
    caption = f"All cells of {sections.title(table)}"
    ways = "Open a row for all of its details; tick rows to see them side by side."
    words = " ".join(text for text in (legend, baseline, ways) if text)
    return [
        figures.of(table, index, content.header.get("max_kld"), content.facts),
        element("h3", "All cells"),
        sections.note(table, content.header),
        sections.disturbed(table),
        paragraph(words, SHORTENED, class_="quiet"),
        controls(table, index),
        element("div", cell_table(table, content.facts, caption), id=f"cells-{index}"),
        element("div", id=f"beside-{index}", class_="beside", aria_live="polite"),
        sections.unpacking(table),
        sections.drafting(table),
    ]


def _shortened(extent: Extent) -> str:
    """What the details lack for the sake of the file's size."""
    if extent == EXTENTS[0]:
        return ""
    kept = f"generated text is cut to {extent.text} characters" if extent.text else "generated text is left out"
    numbers = "" if extent.numbers else ", and so are phases and the numbers beyond the table's"
    return f" To keep this file small, {kept}{numbers}; the attempt's folder has them."


def _footer(content: Content, with_charts: bool) -> Html:
    drawn = " Charts by Vega, Vega-Lite and vega-embed, under the BSD 3-clause licence." if with_charts else ""
    return paragraph(f"Made by lbi {lbi.__version__} at {moment(content.made)}.{drawn}")
