"""The two charts of a table, as Vega-Lite specifications in plain dictionaries.

Colours of axes and text, and the styles "whisker" and "guide", are the page's, set where
the chart is drawn, so that a specification serves a light and a dark page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lbi.collect import Row
from lbi.ranking import KLD_FLOOR, SPEED, Ranked, Table, interval
from lbi.report.figures import finite

"""A log axis has no zero: a smaller KLD, the unquantized model's own among them, is drawn here."""

MOST_BARS = 40
"""More bars than this are not read; the table has all cells."""

PARETO_HEIGHT = 360

BAR_HEIGHT = 19
"""Pixels a bar and the gap to the next take."""

COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0",
)  # fmt: skip
"""Told apart on white and on black."""

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")

Spec = dict[str, Any]

MOST_INTERVALS = 100
"""With more points than this, intervals of those off the front would hide the points."""

HAS_INTERVAL = {"filter": "isValid(datum.low) && isValid(datum.high)"}

ON_FRONT = {"filter": "datum.front"}


def measured(table: Table) -> list[Ranked]:
    """The cells with a speed, best first."""
    return [ranked for ranked in table.ranked if ranked.rank is not None and finite(ranked.row[SPEED])]


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
    x = _speed() | {"scale": {"zero": False, "padding": 14}}
    y = _kld_axis([*(_shown_kld(item.row) for item in points), max_kld])
    quantizers = _quantizers(table)
    quantizer = {"field": "quantizer", "type": "nominal", "title": "quantizer"}
    colour = quantizer | {"scale": _colours(quantizers)}
    shape = quantizer | {"scale": {"domain": quantizers, "range": _cycle(SHAPES, len(quantizers))}}
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
            "tooltip": _tooltip(),
        },
    }
    bound = [_guide("y", max(max_kld, KLD_FLOOR))] if max_kld else []
    what = f"Speed against mean KLD of {len(points)} cells; the caption lists those on the front."
    spreads = [spread] if has_intervals(points) else []
    return _whole([*bound, front, *spreads, dots], points, PARETO_HEIGHT, what)


def bars(table: Table) -> Spec:
    """Decode speed by cell with its interval; the dashed line is the baseline."""
    ranked = bar_rows(table)
    x = _speed()
    plain = {"ticks": False, "domain": False, "labelPadding": 6}
    y = {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": plain}
    colour = {"field": "quantizer", "type": "nominal", "legend": None, "scale": _colours(_quantizers(table))}
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "height": {"band": 0.66}, "opacity": 0.8},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": _tooltip()},
        },
    ]
    if has_intervals(ranked):
        layers += _whiskers(x, y)
    if table.baseline is not None:
        layers.append(_guide("x", table.baseline[SPEED]))
    what = f"Decode speed of {len(ranked)} cells with its interval; the table has the same numbers."
    return _whole(layers, ranked, BAR_HEIGHT * len(ranked), what)


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


def _whole(layers: list[Spec], ranked: Sequence[Ranked], height: int, description: str) -> Spec:
    data = {"values": _values(ranked)}
    return {"description": description, "width": "container", "height": height, "data": data, "layer": layers}


def _guide(axis: str, value: float) -> Spec:
    """A dashed line across the chart."""
    return {
        "data": {"values": [{"guide": value}]},
        "mark": {"type": "rule", "strokeDash": [4, 4], "style": "guide"},
        "encoding": {axis: {"field": "guide", "type": "quantitative"}},
    }


def _speed() -> Spec:
    return {"field": "speed", "type": "quantitative", "title": "decode tok/s", "axis": {"tickCount": 6}}


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


def _values(ranked: Sequence[Ranked]) -> list[Spec]:
    """A record per cell; labels are made unique, because a chart would stack two bars of one name."""
    names = Counter(item.row["name"] for item in ranked)
    values = []
    for item in ranked:
        row, name = item.row, item.row["name"]
        spread = interval(row) or (None, None)
        values.append(
            {
                "label": name if names[name] == 1 else f"{name} (cell {row['cell']})",
                "quantizer": row["quantizer"] or "unknown",
                "speed": _rounded(row[SPEED]),
                "low": _rounded(spread[0]),
                "high": _rounded(spread[1]),
                "ratio": _rounded(item.ratio.value) if item.ratio else None,
                "kld": _rounded(row["mean_kld"]),
                "shown_kld": _shown_kld(row),
                "bits": _rounded(row["bits_per_weight"]),
                "front": item.on_front,
            }
        )
    return [{key: value for key, value in record.items() if value is not None} for record in values]


def _shown_kld(row: Row) -> float | None:
    kld = _rounded(row["mean_kld"])
    return None if kld is None else max(kld, KLD_FLOOR)


def _rounded(value: Any) -> float | None:
    """Five digits are more than a chart shows, and a third of the bytes."""
    return float(f"{value:.5g}") if finite(value) else None


def _quantizers(table: Table) -> list[str]:
    """In the plan's order, so that a colour means the same in both charts."""
    rows = sorted((item.row for item in measured(table)), key=lambda row: int(row["cell"]))
    return list(dict.fromkeys(row["quantizer"] or "unknown" for row in rows))


def _colours(quantizers: Sequence[str]) -> Spec:
    many = len(quantizers) > len(COLOURS)
    return {"domain": quantizers, **({"scheme": "tableau20"} if many else {"range": COLOURS[: len(quantizers)]})}


def _cycle(items: Sequence[str], count: int) -> list[str]:
    return [items[index % len(items)] for index in range(count)]


def _tooltip() -> list[Spec]:
    shown = (
        ("label", "setting", None), ("speed", "decode tok/s", ".1f"), ("low", "interval from", ".1f"),
        ("high", "interval to", ".1f"), ("ratio", "times the baseline", ".2f"), ("kld", "mean KLD (nat)", ".3g"),
        ("bits", "bits per weight", ".2f"),
    )  # fmt: skip
    made = []
    for field, title, form in shown:
        kind: Spec = {"type": "nominal"} if form is None else {"type": "quantitative", "format": form}
        made.append({"field": field, "title": title, **kind})
    return made
