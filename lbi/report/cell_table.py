"""The table with every cell of one model and workload: ranked cells best first, then the others.

The page's script sorts it by the text that is shown, so each cell's text begins with
its number. A cell without a number has its status and reason instead of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lbi.collect import Row
from lbi.config import AXES
from lbi.metrics import METRICS
from lbi.ranking import AGGREGATE, SPEED, Ranked, Table
from lbi.report.facts import Facts
from lbi.report.figures import NOTHING, percent, scaled, small, with_noise
from lbi.report.markup import Html, element, joined


@dataclass(frozen=True, slots=True)
class Column:
    """A numeric column: its heading, the metric it shows, and how."""

    heading: str
    metric: str
    show: Callable[[Ranked], str]


def _ratio(ranked: Ranked) -> str:
    ratio = ranked.ratio
    if ratio is None:
        return NOTHING
    if ranked.is_baseline:
        return "1"
    spread = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    text = f"{ratio.value:.2f}{spread}"
    return joined([text, " ", element("span", "tie", class_="tag")]) if ratio.tie else text


COLUMNS = (
    Column("decode tok/s", SPEED, lambda ranked: with_noise(ranked.row, SPEED)),
    Column("× baseline", "", _ratio),
    Column("prefill tok/s", "prefill_tok_s", lambda ranked: with_noise(ranked.row, "prefill_tok_s")),
    Column("peak MB", "peak_memory_bytes", lambda ranked: scaled(ranked.row["peak_memory_bytes"], 1e6, "{:.0f}")),
    Column("weights MB", "weight_bytes", lambda ranked: scaled(ranked.row["weight_bytes"], 1e6, "{:.1f}")),
    Column("bits / weight", "bits_per_weight", lambda ranked: scaled(ranked.row["bits_per_weight"], 1, "{:.2f}")),
    Column("MB / token", "bytes_per_token", lambda ranked: scaled(ranked.row["bytes_per_token"], 1e6, "{:.1f}")),
    Column("MBU", "mbu_measured", lambda ranked: percent(ranked.row["mbu_measured"])),
    Column("mean KLD", "mean_kld", lambda ranked: small(ranked.row["mean_kld"])),
    Column("top\u20111", "top1_agreement", lambda ranked: percent(ranked.row["top1_agreement"], 1)),
    Column("PPL ratio", "ppl_ratio", lambda ranked: small(ranked.row["ppl_ratio"])),
)

BATCH_COLUMNS = (
    Column("decode tok/s a sequence", SPEED, COLUMNS[0].show),
    Column("decode tok/s all together", AGGREGATE, lambda ranked: with_noise(ranked.row, AGGREGATE)),
    *COLUMNS[1:],
)
"""Of a table of batches: whose speed a number is stands in its heading."""

RATIO_DOC = "decode tok/s over the baseline's, with the range that both intervals allow; tie: the intervals overlap"


def varying(table: Table) -> dict[str, list[str]]:
    """The config groups in which the cells of a table differ, with their options as they first appear."""
    rows = sorted((ranked.row for ranked in table.ranked), key=lambda row: int(row["cell"]))
    options = {group: list(dict.fromkeys(str(row[group]) for row in rows)) for group in AXES}
    return {group: found for group, found in options.items() if len(found) > 1}


def controls(table: Table, index: int) -> Html:
    """What narrows and groups the rows: words, a list for each group that varies, and a list of these groups."""
    groups = varying(table)
    made = [element("label", "Filter rows ", element("input", type="search", aria_controls=f"cells-{index}"))]
    for group, options in groups.items():
        named = (element("option", option or NOTHING, value=option) for option in options)
        made.append(_list(f"{group} ", element("option", "all", value=""), *named, data_group=group))
    if groups:
        named = (element("option", group, value=group) for group in groups)
        made.append(_list("Group by ", element("option", "nothing", value=""), *named, class_="by"))
    return element("div", *made, element("output"), class_="filter", data_table=str(index))


def _list(label: str, *options: Html, **attributes: str) -> Html:
    return element("label", label, element("select", *options, **attributes))


def cell_table(table: Table, facts: Mapping[int, Facts], caption: str) -> Html:
    """The table in a box that scrolls by itself."""
    is_batch = any(ranked.row[AGGREGATE] for ranked in table.ranked)
    columns = BATCH_COLUMNS if is_batch else COLUMNS
    groups = list(varying(table))
    lines = [_line(ranked, facts, columns, groups) for ranked in table.ranked]
    made = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *_headings(columns))),
        element("tbody", joined(lines, "\n")),
        class_="cells",
    )
    return element("div", made, class_="scroll tall", tabindex="0", role="region", aria_label=caption)


def _headings(columns: Sequence[Column]) -> list[Html]:
    made = [_heading("#", "ascending", "place by decode tok/s; = shares it with others: a tie", sorted_by=True)]
    made.append(_heading("setting", "ascending", "what varies in the grid", kind="text"))
    for column in columns:
        metric = METRICS.get(column.metric)
        first = "descending" if metric is None or metric.better == "higher" else "ascending"
        made.append(_heading(column.heading, first, metric.doc if metric else RATIO_DOC))
    made.append(_heading("cell", "ascending", "place in the plan"))
    return made


def _heading(text: str, first: str, doc: str, *, kind: str | None = None, sorted_by: bool = False) -> Html:
    """`first` is the order of the first click: the better end, or the start of the alphabet."""
    return element(
        "th",
        element("button", text, type="button", title=doc),
        scope="col",
        aria_sort=first if sorted_by else "none",
        data_first=first,
        data_kind=kind,
    )


def _line(ranked: Ranked, facts: Mapping[int, Facts], columns: Sequence[Column], groups: Sequence[str]) -> Html:
    row = ranked.row
    chosen: dict[str, str | bool | None] = {f"data_{group}": str(row[group]) for group in groups}
    name = [element("span", row["name"], class_="name")]
    name += [element("span", tag, class_="tag") for tag in _tags(ranked)]
    cells = [element("td", f"{ranked.rank}{'=' if ranked.shared else ''}" if ranked.rank else NOTHING)]
    cells.append(element("th", *name, scope="row"))
    if row["status"] == "ok":
        cells += [element("td", column.show(ranked)) for column in columns]
    else:
        cells.append(element("td", *_why(row, facts), colspan=str(len(columns)), class_="why"))
    cells.append(element("td", str(row["cell"])))
    return element("tr", *cells, id=f"c{row['cell']}", class_="base" if ranked.is_baseline else None, **chosen)


def _tags(ranked: Ranked) -> list[str]:
    places = [tag for tag, holds in (("baseline", ranked.is_baseline), ("front", ranked.on_front)) if holds]
    return [*places, *ranked.row["flags"]]


def _why(row: Row, facts: Mapping[int, Facts]) -> list[str]:
    """Status and reason of a cell without a number."""
    reason = row["reason"]
    if row["status"] == "running":
        phase = facts[row["cell"]].phase
        reason = f"now in the phase: {phase}" if phase else "now"
    elif row["status"] == "missing":
        reason = f"no result yet{f' ({reason})' if reason else ''}"
    return [element("span", row["status"], class_="status"), f" {reason}"]
