"""Where a sweep's time went, and what was not paid twice: sums of what its results recorded, nothing else.

Each saving has its formula beside it. What a saving cannot be computed for is counted as a cell
whose saving is unknown, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lbi.collect import Row
from lbi.cost import PHASES, SHARED


@dataclass(frozen=True, slots=True)
class Phase:
    """What `cells` of the sweep spent in one phase, in seconds."""

    name: str
    seconds: float
    cells: int


@dataclass(frozen=True, slots=True)
class Saving:
    """What one mechanism spared `cells` of a sweep; `unknown` more had it, with nothing recorded of what it spared."""

    what: str
    formula: str
    cells: int
    seconds: float
    unknown: int


@dataclass(frozen=True, slots=True)
class Spending:
    """What the results of a sweep cost, whenever they were measured.

    `earlier` cells of them, of `earlier_s` seconds, were there before the sweep's last plan, `measured` are from after
    it, as far as it wanted them. `idle_s` lies between the runs of one slot; None where nothing was measured since
    that plan. `untold` cells are from before costs were kept, and in no sum.
    """

    cells: int
    seconds: float
    cpu_s: float
    gpu_s: float
    phases: tuple[Phase, ...]
    savings: tuple[Saving, ...]
    earlier: int
    earlier_s: float
    measured: int
    measured_s: float
    estimate_s: float | None
    idle_s: float | None
    untold: int


def spending(rows: Sequence[Row], planned: float, estimate_s: float | None = None) -> Spending:
    """The account of a sweep whose last plan was made at `planned` (since the epoch), and estimated at `estimate_s`."""
    ended = [row for row in rows if row["finished"] is not None]
    told = [row for row in ended if row["cost"]]
    totals = {name: [row[_column(name)] for row in told if row[_column(name)] is not None] for name in PHASES}
    later = [row for row in told if row["finished"] >= planned]
    earlier = [row for row in ended if row["finished"] < planned]
    return Spending(
        cells=len(told),
        seconds=sum(row["cell_s"] for row in told),
        cpu_s=sum(row["cost"].get("cpu_s") or 0.0 for row in told),
        gpu_s=sum(row["cell_s"] * (row["cost"].get("gpus") or 0) for row in told),
        phases=tuple(Phase(name, sum(found), len(found)) for name, found in totals.items() if found),
        savings=tuple(saving for saving in _savings(told, earlier) if saving.cells or saving.unknown),
        earlier=len(earlier),
        earlier_s=sum(row["cell_s"] for row in earlier),
        measured=len(later),
        measured_s=sum(row["cell_s"] for row in later),
        estimate_s=estimate_s,
        idle_s=_idle(later),
        untold=len(ended) - len(told),
    )


def _column(phase: str) -> str:
    return f"spent_{phase.replace(' ', '_')}_s"


def _savings(told: Sequence[Row], earlier: Sequence[Row]) -> Iterable[Saving]:
    yield _saving(
        "imports forked",
        "what the server's imports took, for each run forked from one that was there already",
        (_number(row["cost"], "server_import_s") for row in told if _forked_for_nothing(row["cost"])),
    )
    yield _saving(
        "loads and quantizations shared",
        "phases `load` and `quantize` of the process's first run, less those of the run that used its model",
        (
            _less(
                _number(row["cost"], "shared_load_s"), (row["spent_load_s"] or 0.0) + (row["spent_quantize_s"] or 0.0)
            )
            for row in told
            if row["cost"].get("shared_from")
        ),
    )
    yield _saving(
        "quality passes shared",
        "seconds of the shared pass, less what reading it took",
        (
            _less(_number(row["cost"], "quality_pass_s"), row["spent_quality_s"])
            for row in told
            if row["cost"].get("quality") == SHARED
        ),
    )
    yield _saving(
        "references kept",
        "what the unquantized model's outputs once took, for each run that found them",
        (_number(row["cost"], "reference_s") for row in told if row["cost"].get("reference") == "kept"),
    )
    yield _saving(
        "compiles found in a cache",
        "the phase `compile` of the graph's cold run, less that of one warm or held and what was compiled ahead for it",
        (
            _less(
                _number(row["cost"], "compile_cold_s"),
                (row["spent_compile_s"] or 0.0) + (row["spent_compile_ahead_s"] or 0.0),
            )
            for row in told
            if row["cost"].get("compile") in ("warm", "held")
        ),
    )
    yield _saving(
        "results reused",
        "what a result took, for each that was there before the plan",
        (row["cell_s"] for row in earlier),
    )


def _saving(what: str, formula: str, amounts: Iterable[float | None]) -> Saving:
    found = list(amounts)
    known = [amount for amount in found if amount is not None]
    return Saving(what, formula, len(known), sum(known), len(found) - len(known))


def _forked_for_nothing(cost: dict[str, Any]) -> bool:
    return bool(cost.get("forked")) and not cost.get("new_server")


def _less(cost: float | None, paid: float | None) -> float | None:
    return None if cost is None else cost - (paid or 0.0)


def _number(cost: dict[str, Any], name: str) -> float | None:
    value = cost.get(name)
    return float(value) if isinstance(value, int | float) else None


def _idle(measured: Sequence[Row]) -> float | None:
    """Seconds between the runs of each slot, from its first to its last; None where nothing was measured."""
    lanes: dict[str, list[tuple[float, float]]] = {}
    for row in measured:
        lanes.setdefault(str(row["cost"].get("lane")), []).append((row["finished"] - row["cell_s"], row["finished"]))
    if not lanes:
        return None
    spans = (max(end for _, end in lane) - min(start for start, _ in lane) for lane in lanes.values())
    return max(0.0, sum(spans) - sum(end - start for lane in lanes.values() for start, end in lane))
