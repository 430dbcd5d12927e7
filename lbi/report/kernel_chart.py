"""Where the time of a decode step goes: a bar per cell, in milliseconds per token by kind of kernel."""

from __future__ import annotations

from collections.abc import Mapping

from lbi.compare_traces import IDLE
from lbi.ranking import Ranked, Table
from lbi.report.chart_data import COLOURS, Spec, measured, rounded, whole
from lbi.report.facts import Facts, part
from lbi.report.figures import finite

MOST_BARS = 30
"""The fastest cells; more bars are not read."""

BAR_HEIGHT = 19

KINDS = (
    "products", "attention", "norms", "element by element", "unpacking", "copies", "choice of the token",
    "views and allocation", "compiled, of several kinds", "other",
)  # fmt: skip
"""In the order in which they are stacked; idle time comes last, in grey."""

GREYS = ("#b5b9bd", "#8a8f94", "#c9cdd1")


def kinds(facts: Facts) -> dict[str, float]:
    """Milliseconds per token by kind, idle time too; empty for a result that does not have them."""
    found = part(facts.effective, "timeline")
    known = part(found, "kinds_ms")
    idle = {words: found.get(name) for name, words in IDLE.items()}
    return {name: float(value) for name, value in {**known, **idle}.items() if finite(value) and value > 0}


def bars(table: Table, facts: Mapping[int, Facts]) -> list[Ranked]:
    """The fastest cells that have a breakdown."""
    return [item for item in measured(table) if kinds(facts[item.row["cell"]])][:MOST_BARS]


def extend(records: list[Spec], table: Table, facts: Mapping[int, Facts]) -> None:
    """Put the breakdown into the records of the cells that have a bar: `kinds` and `ms`, one beside the other."""
    shown = {item.row["cell"] for item in bars(table, facts)}
    for record in records:
        if record["cell"] in shown:
            found = kinds(facts[record["cell"]])
            record |= {"kinds": list(found), "ms": [rounded(value) for value in found.values()]}


def breakdown(table: Table, facts: Mapping[int, Facts]) -> Spec:
    """The chart; `bars` must not be empty."""
    ranked = bars(table, facts)
    used = {kind for item in ranked for kind in kinds(facts[item.row["cell"]])}
    named = [kind for kind in KINDS if kind in used] + sorted(used - set(KINDS) - set(IDLE.values()))
    idle = [words for words in IDLE.values() if words in used]
    scale = {"domain": [*named, *idle], "range": [*_colours(len(named)), *GREYS[: len(idle)]]}
    order = {kind: place for place, kind in enumerate([*named, *idle])}
    place = " : ".join(f"datum.kinds == '{kind}' ? {place}" for kind, place in order.items())
    plain = {"ticks": False, "domain": False, "labelPadding": 6}
    bar: Spec = {
        "mark": {"type": "bar", "height": {"band": 0.7}},
        "encoding": {
            "x": {"field": "ms", "type": "quantitative", "stack": True, "title": "ms per token, while profiled"},
            "y": {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": plain},
            "color": {"field": "kinds", "type": "nominal", "title": None, "scale": scale},
            "order": {"field": "place", "type": "quantitative"},
            "tooltip": [
                {"field": "label", "title": "setting", "type": "nominal"},
                {"field": "kinds", "title": "kind", "type": "nominal"},
                {"field": "ms", "title": "ms per token", "type": "quantitative", "format": ".3g"},
            ],
        },
    }
    transform = [
        {"filter": "isValid(datum.kinds)"},
        {"flatten": ["kinds", "ms"]},
        {"calculate": f"{place} : 99", "as": "place"},
    ]
    what = f"Milliseconds per token by kind of kernel, of {len(ranked)} cells."
    made = whole([bar], BAR_HEIGHT * len(ranked), what)
    return {**made, "transform": transform, "usermeta": {"bar": BAR_HEIGHT, "most": MOST_BARS}}


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
