"""Parallel coordinates: a line per cell across its numbers, each axis scaled to the cells that are shown."""

from __future__ import annotations

from lbi.ranking import Table
from lbi.report.chart_data import NUMBERS, Spec, colours, measured, quantizers, tooltip, whole
from lbi.report.figures import finite

HEIGHT = 260

MOST_LINES = 300
"""More lines than this are a surface; the cells are then the fastest."""

AXES = {
    "bits": "bits / weight",
    "bytes": "MB / token",
    "peak": "peak MB",
    "prefill": "prefill tok/s",
    "speed": "decode tok/s",
    "mbu": "MBU",
    "shown_kld": "mean KLD (log)",
}
"""Numbers of a record that have an axis, with its title."""


SHARE = "datum.most == datum.least ? 0.5 : (datum.at - datum.least) / (datum.most - datum.least)"


def axes(table: Table) -> list[str]:
    """Those that differ between the cells: an axis on which all are one would say nothing."""
    rows = [item.row for item in measured(table)]
    made = []
    for name in AXES:
        metric = NUMBERS.get(name, "mean_kld")
        if len({row[metric] for row in rows if finite(row[metric])}) > 1:
            made.append(name)
    return made


def parallel(table: Table) -> Spec:
    """The chart; `axes` must have at least two."""
    shown = axes(table)
    titles = " : ".join(f"datum.key == '{name}' ? '{AXES[name]}'" for name in shown)
    value = "datum.key == 'shown_kld' ? log(datum.value) : datum.value"
    transform = [
        {"window": [{"op": "row_number", "as": "place"}], "sort": [{"field": "speed", "order": "descending"}]},
        {"filter": f"datum.place <= {MOST_LINES}"},
        {"fold": shown},
        {"filter": "isValid(datum.value)"},
        {"calculate": value, "as": "at"},
        {
            "joinaggregate": [{"op": "min", "field": "at", "as": "least"}, {"op": "max", "field": "at", "as": "most"}],
            "groupby": ["key"],
        },
        {"calculate": SHARE, "as": "share"},
        {"calculate": f"{titles} : ''", "as": "axis"},
    ]  # fmt: skip
    x: Spec = {"field": "axis", "type": "nominal", "title": None, "sort": [AXES[name] for name in shown]}
    x["axis"] = {"labelAngle": 0, "domain": False, "ticks": False, "grid": True, "labelPadding": 8, "labelLimit": 84}
    x["scale"] = {"type": "point", "padding": 0.4}
    y = {"field": "share", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "padding": 6}}
    colour = {"field": "quantizer", "type": "nominal", "legend": None, "scale": colours(quantizers(table))}
    common = {"x": x, "y": y, "color": colour, "detail": {"field": "label"}, "tooltip": tooltip()}
    opacity = {"condition": {"test": "datum.front || datum.base", "value": 0.95}, "value": 0.35}
    layers: list[Spec] = [
        {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": {**common, "opacity": opacity}},
        {"mark": {"type": "point", "filled": True, "size": 30}, "encoding": {**common, "opacity": opacity}},
    ]
    what = (
        "A line per cell across its numbers, each axis from the smallest value at its foot to the largest at its top."
    )
    return {**whole(layers, HEIGHT, what), "transform": transform}
