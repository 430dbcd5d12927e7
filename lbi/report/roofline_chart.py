"""The roofline of decoding: speed against the bytes that a token must read, under the lines of the memory's bandwidth.

At batch 1 a decode step cannot be faster than bandwidth / bytes per token. Both axes are logarithmic, so that
this limit is a straight line; how far a cell is below it is its MBU.
"""

from __future__ import annotations

from collections.abc import Sequence

from lbi.ranking import SPEED, Ranked, Table
from lbi.report.chart_data import Spec, colours, measured, quantizers, rounded, tooltip, whole
from lbi.report.figures import finite

HEIGHT = 320

SAME = 1.02
"""Bandwidths within this ratio are one line: each run of a machine may have measured its own."""


def points(table: Table) -> list[Ranked]:
    """Cells with a speed, their bytes per token, and a bandwidth to compare them with."""
    wanted = ("bytes_per_token", "mbu_measured")
    return [item for item in measured(table) if all(finite(item.row[name]) and item.row[name] > 0 for name in wanted)]


def bandwidths(ranked: Sequence[Ranked]) -> dict[str, list[float]]:
    """Bytes a second by where they are from: what each MBU was taken against, different ones alone."""
    found: dict[str, list[float]] = {}
    for kind, metric in (("measured", "mbu_measured"), ("data sheet", "mbu_nominal")):
        for item in ranked:
            row = item.row
            if not finite(row[metric]) or row[metric] <= 0:
                continue
            value = row["bytes_per_token"] * row[SPEED] / row[metric]
            known = found.setdefault(kind, [])
            if not any(max(value, other) / min(value, other) < SAME for other in known):
                known.append(value)
    return found


def roofline(table: Table) -> Spec:
    """The chart; `points` must not be empty."""
    ranked = points(table)
    sizes = [item.row["bytes_per_token"] for item in ranked]
    ends = (min(sizes) / 1.3, max(sizes) * 1.3)
    lines = [
        {"bytes": rounded(size), "limit": rounded(value / size), "line": f"{kind} {value / 1e9:.4g} GB/s"}
        for kind, values in bandwidths(ranked).items()
        for value in values
        for size in ends
    ]
    scale = {"type": "log", "nice": False, "padding": 12}
    x: Spec = {"field": "bytes", "type": "quantitative", "title": "bytes per token (log axis)", "scale": scale}
    x["axis"] = {"format": ".2s", "tickCount": 5}
    y: Spec = {"field": "speed", "type": "quantitative", "title": "decode tok/s (log axis)", "scale": scale}
    y["axis"] = {"tickCount": 5, "format": "~s"}
    # The page's legends have symbols without an outline, and a line is nothing else.
    dash = {"field": "line", "title": "limit", "legend": {"symbolStrokeWidth": 1.5, "symbolType": "stroke"}}
    limits: Spec = {
        "data": {"values": lines},
        "mark": {"type": "line", "style": "guide", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y | {"field": "limit"}, "strokeDash": dash},
    }
    dots: Spec = {
        "transform": [{"filter": "isValid(datum.bytes) && isValid(datum.mbu)"}],
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.8},
        "encoding": {
            "x": x,
            "y": y,
            "color": {"field": "quantizer", "type": "nominal", "legend": None, "scale": colours(quantizers(table))},
            "tooltip": tooltip(),
        },
    }
    what = f"Decode speed of {len(ranked)} cells against bytes per token, under the memory's bandwidth."
    return whole([limits, dots], HEIGHT, what)
