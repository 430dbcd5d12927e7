"""Where the time went, and what each mechanism spared: the report's section, and its lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbi.collect import Row
from lbi.cost import MEANING
from lbi.report.figures import finite, percent, seconds
from lbi.report.markup import Html, grid, joined, paragraph
from lbi.spending import Saving, Spending, spending

SHOWN_PHASES = 5
"""As many of the largest phases are named in the terminal; the report has all."""


def section(rows: Sequence[Row], header: Mapping[str, Any]) -> Html:
    """The table of phases, and that of savings."""
    found = _spending(rows, header)
    if not found.cells:
        return paragraph("No result says what it cost.")
    with_gpu = found.gpu_s > 0
    heads = ["phase", "wall time", "share", "cells", *(["GPU hours"] if with_gpu else []), "what it is"]
    lines = []
    for phase in sorted(found.phases, key=lambda phase: -phase.seconds):
        share = percent(phase.seconds / found.seconds if found.seconds else None)
        hours = [f"{phase.seconds / found.seconds * found.gpu_s / 3600:.3f}"] if with_gpu else []
        lines.append([phase.name, seconds(phase.seconds), share, str(phase.cells), *hours, MEANING[phase.name]])
    parts = [paragraph(text) for text in _totals(found)]
    parts.append(grid(heads, lines, class_="words"))
    if found.savings:
        known = [(saving.what, *_saved(saving), saving.formula) for saving in found.savings]
        parts += [
            paragraph("What was not paid again, as recorded with each result:"),
            grid(("mechanism", "cells", "spared", "computed as"), known, class_="words"),
        ]
    return joined(parts)


def lines(rows: Sequence[Row], header: Mapping[str, Any]) -> list[str]:
    """The same in two lines, for the terminal; none where no result says what it cost."""
    found = _spending(rows, header)
    if not found.cells:
        return []
    ordered = sorted(found.phases, key=lambda phase: -phase.seconds)
    shown = [f"{phase.name} {percent(phase.seconds / found.seconds)}" for phase in ordered[:SHOWN_PHASES]]
    made = [f"{' '.join(_totals(found))} Where it went: {', '.join(shown)}."] if found.seconds else _totals(found)
    spared = [f"{saving.what} {' '.join(_saved(saving)[::-1])}" for saving in found.savings if saving.cells]
    return [*made, f"Not paid again: {', '.join(f'{text} cells' for text in spared)}."] if spared else made


def _spending(rows: Sequence[Row], header: Mapping[str, Any]) -> Spending:
    planned = header.get("planned")
    estimate = header.get("estimate_s")
    return spending(rows, float(planned) if finite(planned) else 0.0, float(estimate) if finite(estimate) else None)


def _totals(found: Spending) -> list[str]:
    """How much, how much of it before this plan, and what lies between the runs."""
    gpu = f", {found.gpu_s / 3600:.3f} GPU hours" if found.gpu_s else ""
    cpu = f", {seconds(found.cpu_s)} of CPU time in the measuring processes" if found.cpu_s else ""
    made = [f"{found.cells} results cost {seconds(found.seconds)} of wall time{gpu}{cpu}."]
    if found.earlier:
        made.append(f"{found.earlier} of the results ({seconds(found.earlier_s)}) were there before this plan.")
    if found.estimate_s and found.measured:
        took = (
            f"{found.measured} runs took {seconds(found.measured_s)}, {found.measured_s / found.estimate_s:.2f} times"
        )
        made.append(f"Since then {took} the estimate of {seconds(found.estimate_s)}.")
    if found.idle_s is not None:
        made.append(f"Between the runs of a slot lay {seconds(found.idle_s)}.")
    if found.untold:
        made.append(f"{found.untold} results are older than this account and in no sum.")
    return made


def _saved(saving: Saving) -> tuple[str, str]:
    """Cells, and what was spared them; those for which it is not recorded are named apart."""
    unknown = f" (and {saving.unknown} unknown)" if saving.unknown else ""
    return f"{saving.cells}{unknown}", seconds(saving.seconds) if saving.cells else "not recorded"
