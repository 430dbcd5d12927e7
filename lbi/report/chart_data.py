"""The numbers that a table's charts share: a record per measured cell, and the encodings that all of them use.

The records are in the page once for all charts of a table, under the name `CELLS`, and the page's script
hands each chart those of the cells that are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lbi.collect import Row
from lbi.ranking import KLD_FLOOR, SPEED, Ranked, Table, interval
from lbi.report.figures import finite

Spec = dict[str, Any]

CELLS = "cells"
"""What a chart's specification calls its data."""

COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0",
)  # fmt: skip
"""Told apart on white and on black."""

NUMBERS = {
    "speed": SPEED,
    "prefill": "prefill_tok_s",
    "kld": "mean_kld",
    "bits": "bits_per_weight",
    "weights": "weight_bytes",
    "peak": "peak_memory_bytes",
    "bytes": "bytes_per_token",
    "mbu": "mbu_measured",
}
"""Numbers of a record, by their short name there."""


def measured(table: Table) -> list[Ranked]:
    """The cells with a speed, best first."""
    return [ranked for ranked in table.ranked if ranked.rank is not None and finite(ranked.row[SPEED])]


def records(table: Table) -> list[Spec]:
    """A record per measured cell, best first; labels are unique, because a chart would stack two bars of one name."""
    ranked = measured(table)
    names = Counter(item.row["name"] for item in ranked)
    made = []
    for item in ranked:
        row, name = item.row, item.row["name"]
        low, high = interval(row) or (None, None)
        known: Spec = {
            "cell": row["cell"],
            "label": name if names[name] == 1 else f"{name} (cell {row['cell']})",
            "quantizer": row["quantizer"] or "unknown",
            **{short: rounded(row[metric]) for short, metric in NUMBERS.items()},
            "low": rounded(low),
            "high": rounded(high),
            "ratio": rounded(item.ratio.value) if item.ratio else None,
            "shown_kld": shown_kld(row),
            "front": item.on_front or None,
            "base": item.is_baseline or None,
        }
        made.append({key: value for key, value in known.items() if value is not None})
    return made


def whole(layers: list[Spec], height: Any, description: str) -> Spec:
    """A chart of the table's records."""
    return {
        "description": description,
        "width": "container",
        "height": height,
        "data": {"name": CELLS},
        "layer": layers,
    }


def shown_kld(row: Row) -> float | None:
    """The KLD where a log axis can show it."""
    kld = rounded(row["mean_kld"])
    return None if kld is None else max(kld, KLD_FLOOR)


def rounded(value: Any) -> float | None:
    """Five digits are more than a chart shows, and a third of the bytes."""
    return float(f"{value:.5g}") if finite(value) else None


def quantizers(table: Table) -> list[str]:
    """In the plan's order, so that a colour means the same in all charts."""
    rows = sorted((item.row for item in measured(table)), key=lambda row: int(row["cell"]))
    return list(dict.fromkeys(row["quantizer"] or "unknown" for row in rows))


def colours(named: Sequence[str]) -> Spec:
    """The scale of the colours."""
    many = len(named) > len(COLOURS)
    return {"domain": named, **({"scheme": "tableau20"} if many else {"range": COLOURS[: len(named)]})}


def tooltip() -> list[Spec]:
    """What a mark says when it is pointed at."""
    shown = (
        ("label", "setting", None), ("speed", "decode tok/s", ".1f"), ("low", "interval from", ".1f"),
        ("high", "interval to", ".1f"), ("ratio", "times the baseline", ".2f"), ("kld", "mean KLD (nat)", ".3g"),
        ("bits", "bits per weight", ".2f"), ("mbu", "MBU", ".0%"),
    )  # fmt: skip
    made = []
    for field, title, form in shown:
        kind: Spec = {"type": "nominal"} if form is None else {"type": "quantitative", "format": form}
        made.append({"field": field, "title": title, **kind})
    return made


def speed() -> Spec:
    """Decode speed along an axis."""
    return {"field": "speed", "type": "quantitative", "title": "decode tok/s", "axis": {"tickCount": 6}}
