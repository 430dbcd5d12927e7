"""The parts of the report that are words: the answer, what did not run and why, what the numbers mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbi.collect import Row
from lbi.comparing import Comparison
from lbi.metrics import METRICS, WITH_ERROR, WITH_INTERVAL
from lbi.ranking import SPEED, Answer, Table, disturbance, outrun, unfused
from lbi.report.cell_table import COLUMNS, RATIO_DOC
from lbi.report.figures import finite, moment, with_noise
from lbi.report.markup import Html, element, grid, joined, paragraph
from lbi.store import STATUSES


def title(table: Table) -> str:
    """What a table is about."""
    return f"{table.model or 'no model'}, {table.workload or 'no workload'}"


def counts(rows: Iterable[Row]) -> str:
    """ "18 ok, 6 pruned": how many cells ended how."""
    found = Counter(row["status"] for row in rows)
    order = [*STATUSES, "running", "missing", "pruned", "duplicate"]
    return ", ".join(f"{found[status]} {status}" for status in order if found[status])


def answers(table: Table) -> Html:
    """Question and answer; the cell that an answer names leads to its row."""
    parts: list[Html] = []
    for answer in table.answers:
        parts += [element("dt", answer.question), element("dd", *_linked(answer))]
    return element("dl", *parts, class_="answers")


def _linked(answer: Answer) -> list[str]:
    name = answer.row["name"] if answer.row else None
    if answer.row is None or not name or not answer.text.startswith(name):
        return [answer.text]
    return [element("a", name, href=f"#c{answer.row['cell']}"), answer.text[len(name) :]]


def note(table: Table, header: Mapping[str, Any]) -> Html:
    """What a reader of this model's numbers must know, where the model's config says something."""
    text = (header.get("notes") or {}).get(table.model)
    return paragraph(element("strong", f"Note on {table.model}: "), str(text), class_="note") if text else Html()


def disturbed(table: Table) -> Html:
    """Which timings others on the machine have spoilt."""
    text = disturbance([ranked.row for ranked in table.ranked if ranked.rank is not None])
    return paragraph(element("strong", "Disturbed: "), text, class_="note") if text else Html()


def unpacking(table: Table) -> Html:
    """Which speeds are those of weights unpacked anew at every token."""
    text = unfused([ranked.row for ranked in table.ranked if ranked.rank is not None])
    label, _, rest = text.partition(": ")
    return paragraph(element("strong", f"{label}: "), rest, class_="note") if text else Html()


def drafting(table: Table) -> Html:
    """Which drafts cost more than they save."""
    text = outrun([ranked.row for ranked in table.ranked if ranked.rank is not None])
    label, _, rest = text.partition(": ")
    return paragraph(element("strong", f"{label}: "), rest, class_="note") if text else Html()


def comparison(found: Comparison) -> Html:
    """Each cell beside its counterpart, the largest loss first."""
    if not found.pairs:
        return paragraph(found.summary())
    lines = [
        (
            pair.row["name"],
            pair.verdict,
            f"{pair.ratio.value:.2f}"
            + ("" if pair.ratio.low is None else f" ({pair.ratio.low:.2f} to {pair.ratio.high:.2f})"),
            with_noise(pair.row, SPEED),
            with_noise(pair.other, SPEED),
            "-" if pair.row["env_id"] == pair.other["env_id"] else "another",
        )
        for pair in found.pairs
    ]
    heads = ("setting", "verdict", "ratio", "decode tok/s here", "there", "environment")
    intro = "The ratio is this sweep's speed over the other's; a tie is where the two intervals overlap."
    return joined([paragraph(found.summary()), paragraph(intro, class_="quiet"), grid(heads, lines, class_="words")])


def interval_legend(table: Table) -> str:
    """How the numbers of this table were made, in two sentences."""
    rows = [ranked.row for ranked in table.ranked if ranked.rank is not None]
    repetitions = sorted({row["repetitions"] for row in rows if finite(row["repetitions"])})
    if not repetitions:
        return ""
    many = " or ".join(f"{count:.0f}" for count in repetitions)
    if repetitions == [1.0]:
        return "One repetition, so there is no interval and nothing can be called a tie."
    coverage = sorted({row["interval_coverage"] for row in rows if finite(row["interval_coverage"])})
    covers = f", which covers the true median in {' or '.join(f'{value:.1%}' for value in coverage)} of cases"
    medians = f"Medians of {many} repetitions, ± half the interval{covers if coverage else ''}."
    return f"{medians} = after a place: a tie, the intervals overlap."


def not_run(rows: Sequence[Row]) -> Html:
    """Cells that the plan left out, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] == "pruned":
            groups.setdefault((row["rule"], row["reason"]), []).append(row["name"])
    if not groups:
        return paragraph("The plan left out no cell.")
    lines = [(rule or "-", reason, _cells(names)) for (rule, reason), names in groups.items()]
    intro = "These cells were left out before anything ran, because they could not have given a number."
    return joined([paragraph(intro), grid(("rule", "reason", "cells"), lines, class_="words")])


def missing_numbers(rows: Sequence[Row]) -> Html:
    """Numbers that measured cells do not have, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            groups.setdefault((str(name), str(reason)), []).append(row["name"])
    if not groups:
        return paragraph("No measured cell lacks a number.")
    lines = [(name, reason, _cells(names)) for (name, reason), names in groups.items()]
    return grid(("number", "reason", "cells"), lines, class_="words")


def _cells(names: Sequence[str]) -> Html | str:
    """The names; many of them are folded behind their number."""
    text = "; ".join(names)
    if len(names) <= 3:
        return text
    return element("details", element("summary", f"{len(names)} cells"), text)


HOW_MEASURED = (
    "Every speed is the median over the repetitions. Its interval lies between the k-th smallest and the k-th largest "
    "repetition, with the largest k that still covers the true median with 95% probability, whatever the distribution; "
    "with fewer than six repetitions no k does, and it is the whole range, with the coverage stated at the table.",
    "A ratio's range is the smallest and the largest that the two intervals allow, so it is wider than a 95% interval. "
    "Two cells are a tie when their intervals overlap: the order of the two then means nothing.",
    "A cell is on the front when no other cell of its table is both faster and nearer to the unquantized model.",
)


def how_measured() -> Html:
    """What the numbers mean, and how the intervals are made."""
    headings = {column.metric: column.heading for column in COLUMNS if column.metric}
    lines: list[tuple[str, ...]] = [("× baseline", "", "1", RATIO_DOC, "higher")]
    for name, metric in METRICS.items():
        doc = metric.doc
        if name in WITH_INTERVAL:
            doc += " (with an interval)"
        if name in WITH_ERROR:
            doc += " (with a standard error over positions)"
        lines.append((name, headings.get(name, ""), metric.unit, doc, metric.better or "-"))
    table = grid(("number", "in the table as", "unit", "meaning", "better"), lines, class_="words")
    units = "The table shows bytes in MB, a million bytes each."
    return joined([*(paragraph(text) for text in HOW_MEASURED), table, paragraph(units)])


def request(header: Mapping[str, Any], store: str, made: float, rows: Sequence[Row]) -> Html:
    """What was asked, when, and where the results are."""
    finished = [row["finished"] for row in rows if finite(row["finished"])]
    lines: list[tuple[str, str]] = [
        ("command", element("code", str(header.get("command", "unknown")))),
        ("planned", moment(header.get("planned"))),
        ("results from", f"{moment(min(finished))} to {moment(max(finished))}" if finished else "no result yet"),
        ("report made", moment(made)),
        ("store", element("code", store)),
        ("baseline asked for", str(header.get("baseline") or "none: the plainest cell of each table is taken")),
        ("bound on mean KLD", f"{header.get('max_kld')} nat"),
    ]
    return grid(("", "value"), lines, class_="facts")


def problems(texts: Sequence[str]) -> Html:
    """What could not be read in the store."""
    if not texts:
        return Html()
    listed = element("ul", *(element("li", text) for text in texts))
    return element("div", paragraph(element("strong", "Ignored in the store:")), listed, class_="note")
