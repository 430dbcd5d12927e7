"""What the page shows when a row of the table is opened.

The details of a thousand cells must fit beside the charts' script in one small file,
so they are lists of texts in the order of `FIELDS`, and a text that occurs more than
once is kept once, in a pool, and stands in the lists as its number there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.collect import Row
from lbi.metrics import METRICS, WITH_ERROR, WITH_INTERVAL
from lbi.report import inside
from lbi.report.cell_table import COLUMNS
from lbi.report.facts import Facts, Sample, part
from lbi.report.figures import finite, listed, seconds, size, with_spread

FIELDS: tuple[tuple[str, str], ...] = (
    ("overrides", " "),
    ("verdict of the plan", "; "),
    ("run_id", ""),
    ("env_id", ""),
    ("attempt", ""),
    ("isolation", "; "),
    ("samples in turn, decode tok/s", ", "),
    ("linear layers as run", "\n"),
    ("quantized weights", "; "),
    ("autoquant's choices", "\n"),
    ("kernels of a decode step", "\n"),
    ("traces", "\n"),
    ("unpacked weights written", ""),
    ("one row against many, worst layer", ""),
    ("key-value cache", ", "),
    ("compiler counters", ", "),
    ("compiled graph", ", "),
    ("same tokens as the plain path", ", "),
    ("time by phase", ", "),
    ("other numbers", "\n"),
    ("numbers it does not have", "\n"),
    ("generated text", ""),
)
"""What a detail is called, and what stands between its parts."""

NUMBERS = frozenset(
    [name for name, _ in FIELDS].index(name)
    for name in ("samples in turn, decode tok/s", "kernels of a decode step", "time by phase", "other numbers")
)
"""Places in `FIELDS` of what an extent without numbers leaves out."""

IN_TABLE = {column.metric for column in COLUMNS} - set(WITH_INTERVAL) - set(WITH_ERROR)
"""Numbers of which the details could say no more than the table."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of the details fits: characters of generated text, and whether numbers beyond the table's."""

    text: int
    numbers: bool


Details = dict[int, list[list[str]]]
"""The parts of each of `FIELDS`, by cell."""


def whole_details(rows: Sequence[Row], facts: Mapping[int, Facts], root: Path) -> Details:
    """The parts of each of `FIELDS`, by cell, with nothing left out."""
    return {row["cell"]: _texts(row, facts[row["cell"]], root) for row in rows}


def within(extent: Extent, known: Details) -> Details:
    """So much of what `whole_details` gives."""
    return {cell: _within(extent, fields) for cell, fields in known.items()}


def details(cells: Details) -> dict[str, Any]:
    """`fields`, `pool` and the `cells`, ready to be embedded."""
    counts = Counter(text for fields in cells.values() for parts in fields for text in parts)
    pooled = [text for text, count in counts.items() if count > 1 and len(text) > 4]
    pool = {text: index for index, text in enumerate(pooled)}
    packed = {cell: [[pool.get(text, text) for text in parts] for parts in fields] for cell, fields in cells.items()}
    small = {cell: [_bare(parts) for parts in fields] for cell, fields in packed.items()}
    return {"fields": FIELDS, "pool": pooled, "cells": small}


def _bare(parts: list[int | str]) -> list[int | str] | int | str:
    """Most details have one part, or none; a list around each would be a tenth of the bytes."""
    return parts if len(parts) > 1 else parts[0] if parts else ""


def _within(extent: Extent, fields: list[list[str]]) -> list[list[str]]:
    *others, generated = fields
    if not extent.numbers:
        others = [[] if index in NUMBERS else parts for index, parts in enumerate(others)]
    return [*others, _cut(generated, extent.text)]


def _cut(generated: list[str], most: int) -> list[str]:
    return [text if len(text) <= most else f"{text[:most]} ..." for text in generated] if most else []


def _texts(row: Row, facts: Facts, root: Path) -> list[list[str]]:
    effective = facts.effective
    return [
        row["overrides"].split(" "),
        [text for text in (row["verdict"], row["rule"]) if text],
        [row["run_id"]],
        [row["env_id"]],
        [_attempt(row, root)] if row["folder"] else [],
        inside.isolation(effective),
        _samples(facts.samples),
        [_layers(kind) for kind in part(effective, "weights").get("kinds") or [] if isinstance(kind, dict)],
        inside.weights_from(effective),
        inside.choices(effective),
        inside.kernels(effective),
        inside.traces(effective),
        inside.unpacked(effective),
        inside.one_row(effective),
        listed(part(effective, "cache")),
        listed(part(effective, "compiler")),
        listed(part(effective, "graph")),
        listed(part(effective, "lossless")),
        _phases(facts.ending),
        _numbers(row),
        [f"{name}: {reason}" for name, reason in row["missing"].items()],
        _generated(facts.text),
    ]


def _samples(samples: Sequence[Sample]) -> list[str]:
    """Every one, outliers and void ones too; what drifts or stands apart is seen in their order."""
    return [f"{sample.speed:.4g}{f' (void: {sample.void})' if sample.void else ''}" for sample in samples]


def _attempt(row: Row, root: Path) -> str:
    folder = Path(row["folder"])
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)


def _layers(kind: dict[str, Any]) -> str:
    group = kind.get("group_size")
    stored = f", {size(kind['bytes'])}" if finite(kind.get("bytes")) else ""
    bits = f"{kind['bits']:.3g} bit" if finite(kind.get("bits")) else "unknown bits"
    params = f", {kind['params']:,} weights" if finite(kind.get("params")) else ""
    groups = f", groups of {group}" if group else ""
    what = f"{kind.get('layers')} × {kind.get('kind')}: {bits}{groups}{params}{stored}"
    return f"{what} (such as {kind.get('example')})"


def _phases(ending: dict[str, Any]) -> list[str]:
    phases = part(ending, "phases_s")
    made = [f"{name} {seconds(value)}" for name, value in phases.items() if finite(value)]
    last = ending.get("last_phase")
    return made + ([f"ended in: {last}"] if last and ending.get("status", "ok") != "ok" else [])


def _numbers(row: Row) -> list[str]:
    return [f"{name} {with_spread(row, name)}" for name in METRICS if name not in IN_TABLE and finite(row.get(name))]


def _generated(text: dict[str, Any]) -> list[str]:
    generated = text.get("text")
    return [generated] if isinstance(generated, str) else []
