"""What a run cost, by phase: measured where it was spent, kept in status.json, never estimated.

The child times what it does; the worker times what is done around it (starting a process, the
unquantized model's outputs). What is left of the wall time is `other`: waiting, writing, the end of
a process. The parts add up to the run's seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PHASES: dict[str, tuple[str, ...]] = {
    "start": ("start",),
    "reference": ("reference",),
    "import": ("import",),
    "load": ("load", "put back"),
    "quantize": ("choose", "quantize", "quantize the draft", "load quantized", "keep quantized", "audit"),
    "check": ("check one row", "plain path"),
    "compile ahead": ("compile ahead",),
    "compile": ("compile",),
    "warm up": ("warm up", "warm again"),
    "measure": ("measure",),
    "peaks": ("roofline",),
    "quality": ("quality",),
    "trace": ("look inside", "kernels", "trace", "memory", "trace pass"),
    "graphs": ("open graphs", "keep graphs"),
    "other": (),
}
"""What a run's time goes to, in the order in which it is spent, and the steps of a run that each sums up."""

MEANING = {
    "start": "starting the measuring process; for the first of a slot that also imports the libraries to fork from",
    "reference": "the unquantized model's outputs, where this run was the first to need them",
    "import": "imports in the measuring process itself",
    "load": "reading or making the weights, or putting a model back as it was that later runs share",
    "quantize": "choosing, quantizing, or reading kept weights; reading back what the layers are",
    "check": "one row against many, and the plain path that a lossless option is held against",
    "compile ahead": "the graph's share of a time in which several were compiled side by side, before their cells",
    "compile": "compiling or capturing, and the warm-up generations, of which the first compiles",
    "warm up": "the warm-up generations where nothing is compiled, and the one after a racing cell's quality pass",
    "measure": "the timed generations, void ones and pauses included",
    "peaks": "measuring the machine's own peaks, once a machine",
    "quality": "the teacher-forced pass, or reading one that is shared",
    "trace": "looking inside a decode step, and the traces that were asked for, with a process of their own",
    "graphs": "linking, unpacking and keeping compiled graphs of earlier and later runs",
    "other": "the rest of the wall time: waiting for another's reference, writing files, ending the process",
}

OWN, SHARED, REPLAYED = "this run", "shared with another cell", "the reference's own pass"
"""Where a run's quality is from."""


def summed(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """Seconds by phase of `PHASES` from those of a run's steps; they add up to `total`, `other` taking the rest.

    A step that no phase names is part of `other` too.
    """
    found = {phase: sum(seconds.get(step, 0.0) for step in steps) for phase, steps in PHASES.items()}
    found["other"] = max(0.0, total - sum(found.values()))
    return {phase: round(value, 4) for phase, value in found.items() if value > 0}


def cost_of(row_cost: Any) -> dict[str, Any]:
    """The cost of a result as its status.json has it; empty for results from before costs were kept."""
    return row_cost if isinstance(row_cost, dict) and isinstance(row_cost.get("phases_s"), dict) else {}
