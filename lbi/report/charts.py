"""Speed against quality, and speed by cell, as Vega-Lite specifications in plain dictionaries.

Colours of axes and text, and the styles "whisker" and "guide", are the page's, set where
the chart is drawn, so that a specification serves a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lbi.ranking import KLD_FLOOR, SPEED, Ranked, Table, interval
from lbi.report.chart_data import Spec, colours, measured, quantizers, shown_kld, speed, tooltip, whole
from lbi.report.figures import finite

"""A log axis has no zero: a smaller KLD, the unquantized model's own among them, is drawn here."""

MOST_BARS = 40
"""More bars than this are not read; the table has all cells."""

PARETO_HEIGHT = 360

BAR_HEIGHT = 19
"""Pixels a bar and the gap to the next take."""

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")

MOST_INTERVALS = 100
"""With more points than this, intervals of those off the front would hide the points."""

HAS_INTERVAL = {"filter": "isValid(datum.low) && isValid(datum.high)"}

ON_FRONT = {"filter": "datum.front"}

SCORED = {"filter": "isValid(datum.kld)"}


def pareto_points(table: Table) -> list[Ranked]:
    """Those of them that have a quality too."""
    return [ranked for ranked in measured(table) if finite(ranked.row["mean_kld"])]


def bar_rows(table: Table) -> list[Ranked]:
    """The fastest cells, and the baseline even if it is not among them."""
    ranked = measured(table)
    return ranked[:MOST_BARS] + [item for item in ranked[MOST_BARS:] if item.is_baseline]


def has_intervals(ranked: Sequence[Ranked]) -> bool:
    """Whether there is any interval to draw; Vega complains about a layer without data."""
    return any(interval(item.row) for item in ranked)


def pareto(table: Table, max_kld: float | None) -> Spec:
    """Speed against quality, with the front and the bound."""
    points = pareto_points(table)
    x = speed() | {"scale": {"zero": False, "padding": 14}}
    y = _kld_axis([*(shown_kld(item.row) for item in points), max_kld])
    named = quantizers(table)
    quantizer = {"field": "quantizer", "type": "nominal", "title": "quantizer"}
    colour = quantizer | {"scale": colours(named)}
    shape = quantizer | {"scale": {"domain": named, "range": _cycle(SHAPES, len(named))}}
    front: Spec = {
        "transform": [ON_FRONT],
        "mark": {"type": "line", "interpolate": "step-before", "strokeWidth": 1, "style": "guide"},
        "encoding": {"x": x, "y": y, "order": {"field": "speed", "type": "quantitative"}},
    }
    spread: Spec = {
        "transform": [HAS_INTERVAL, *([ON_FRONT] if len(points) > MOST_INTERVALS else [])],
        "mark": {"type": "rule", "opacity": 0.55},
        "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y, "color": colour},
    }
    dots: Spec = {
        "mark": {"type": "point", "filled": True, "strokeWidth": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": colour,
            "shape": shape,
            "size": {"condition": {"test": "datum.front", "value": 110}, "value": 60},
            "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.6},
            "tooltip": tooltip(),
        },
    }
    bound = [guide("y", max(max_kld, KLD_FLOOR))] if max_kld else []
    what = f"Speed against mean KLD of {len(points)} cells; the caption lists those on the front."
    spreads = [spread] if has_intervals(points) else []
    layers = [{**layer, "transform": [SCORED, *layer.get("transform", [])]} for layer in (front, *spreads, dots)]
    return whole([*bound, *layers], PARETO_HEIGHT, what)


def bars(table: Table) -> Spec:
    """Decode speed by cell with its interval; the dashed line is the baseline."""
    ranked = bar_rows(table)
    x = speed()
    plain = {"ticks": False, "domain": False, "labelPadding": 6}
    y = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": plain}
    colour = {"field": "quantizer", "type": "nominal", "legend": None, "scale": colours(quantizers(table))}
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "height": {"band": 0.66}, "opacity": 0.8},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip()},
        },
    ]
    if has_intervals(ranked):
        layers += _whiskers(x, y)
    if table.baseline is not None:
        layers.append(guide("x", table.baseline[SPEED]))
    what = f"Decode speed of {len(ranked)} cells with its interval; the table has the same numbers."
    first = {"window": [{"op": "row_number", "as": "place"}], "sort": [{"field": "speed", "order": "descending"}]}
    kept = [first, {"filter": f"datum.place <= {MOST_BARS} || datum.base"}]
    made = whole(layers, BAR_HEIGHT * len(ranked), what)
    # The page's script makes the chart lower when there are fewer bars.
    return {**made, "transform": kept, "usermeta": {"bar": BAR_HEIGHT, "most": MOST_BARS}}


def _whiskers(x: Spec, y: Spec) -> list[Spec]:
    """A line from the interval's low end to its high end, and a tick at each."""
    line = {"type": "rule", "strokeWidth": 1.5, "style": "whisker"}
    tick = {"type": "tick", "thickness": 1.5, "size": 7, "style": "whisker"}
    low, high = x | {"field": "low"}, x | {"field": "high"}
    drawn = [
        (line, {"x": low, "x2": {"field": "high"}, "y": y}),
        (tick, {"x": low, "y": y}),
        (tick, {"x": high, "y": y}),
    ]
    return [{"transform": [HAS_INTERVAL], "mark": mark, "encoding": encoding} for mark, encoding in drawn]


def guide(axis: str, value: float) -> Spec:
    """A dashed line across the chart."""
    return {
        "data": {"values": [{"guide": value}]},
        "mark": {"type": "rule", "strokeDash": [4, 4], "style": "guide"},
        "encoding": {axis: {"field": "guide", "type": "quantitative"}},
    }


def _kld_axis(values: Sequence[float | None]) -> Spec:
    """The log axis, labelled at powers of ten alone: by itself it labels every digit between them too."""
    known = [max(value, KLD_FLOOR) for value in values if value]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    number = "format(datum.value, '.0e')"
    axis = {
        "values": [10.0**power for power in range(low, high + 1)],
        "labelExpr": f"datum.value < {1.5 * KLD_FLOOR} ? '≤ ' + {number} : {number}",
    }
    scale = {"type": "log", "padding": 10}
    return {
        "field": "shown_kld", "type": "quantitative", "title": "mean KLD (nat, log axis)", "scale": scale, "axis": axis,
    }  # fmt: skip


def _cycle(items: Sequence[str], count: int) -> list[str]:
    return [items[index % len(items)] for index in range(count)]
