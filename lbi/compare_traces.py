"""`lbi trace RUN [OTHER]`: where the time of a decode step goes, and which kernels cost the difference of two runs.

Times are those of the short pass that looks inside each run after it was measured. A profiler slows down what it looks
at, on a CPU most where operators are short, so the timed milliseconds a token stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lbi.cells import find_result
from lbi.errors import InputError
from lbi.store import Result, Store

IDLE = {
    "waiting_ms": "idle: the host had not launched",
    "between_ms": "idle between launched kernels",
    "outside_ms": "outside operators (Python)",
}
"""Time without a kernel, as `timeline.breakdown` calls it, in words."""

MOST_KERNELS = 15


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run's look inside found; times in milliseconds per token."""

    name: str
    timed_ms: float | None
    traced_ms: float
    kinds: Mapping[str, float]
    kernels: Mapping[str, tuple[float, float]]
    launches: float
    how: str


@dataclass(frozen=True, slots=True)
class Change:
    """One line: milliseconds per token here and there; `calls` are those of a kernel, else None."""

    name: str
    ours: float
    theirs: float
    calls: tuple[float, float] | None = None


def read(store: Store, result: Result) -> Seen:
    """Raises `InputError` for a result whose decode steps were not looked into."""
    effective = store.read(result, "effective.json") or {}
    found = effective.get("timeline") or {}
    if not found:
        why = (effective.get("kernels") or {}).get("missing") or "it was made by an lbi that did not record this"
        raise InputError(
            "run", result.run_id, f"has no breakdown of its decode step: {why}", "Run it again: sweep.mode=force"
        )
    request = (store.read(result, "config.json") or {}).get("config") or {}
    groups = ("model", "engine", "quantizer", "compiler", "cache")
    seconds = ((store.read(result, "metrics.json") or {}).get("metrics") or {}).get("tpot_s")
    idle = {words: found[name] for name, words in IDLE.items() if name in found}
    return Seen(
        name=" ".join(str((request.get(group) or {}).get("name", "?")) for group in groups),
        timed_ms=None if seconds is None else 1e3 * seconds,
        traced_ms=found["ms_per_token"],
        kinds={**found["kinds_ms"], **idle},
        kernels={item["name"]: (item["ms"], item["calls"]) for item in found["kernels"]},
        launches=found["launches_per_token"],
        how=found["time"],
    )


def by_kind(ours: Seen, theirs: Seen) -> list[Change]:
    """Every kind that either has, the largest difference first."""
    names = dict.fromkeys([*ours.kinds, *theirs.kinds])
    return _sorted([Change(name, ours.kinds.get(name, 0.0), theirs.kinds.get(name, 0.0)) for name in names])


def by_kernel(ours: Seen, theirs: Seen) -> list[Change]:
    """Every kernel that either lists, the largest difference first."""
    none = (0.0, 0.0)
    made = []
    for name in dict.fromkeys([*ours.kernels, *theirs.kernels]):
        (here, calls), (there, other) = ours.kernels.get(name, none), theirs.kernels.get(name, none)
        made.append(Change(name, here, there, (calls, other)))
    return _sorted(made)


def _sorted(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: -abs(change.ours - change.theirs))


def show(store: Store, sweep: str, run: str, other: str | None) -> int:
    """Print one run's breakdown, or two side by side with their difference."""
    ours = read(store, find_result(store, sweep, run))
    print("\n".join(_alone(ours) if other is None else _beside(ours, read(store, find_result(store, sweep, other)))))
    return 0


def _alone(seen: Seen) -> list[str]:
    lines = [f"{seen.name}: {_times(seen)}", f"Time {seen.how}.", ""]
    total = seen.traced_ms or 1.0
    lines += [f"{spent:9.3f} ms {spent / total:6.1%}  {kind}" for kind, spent in _largest(seen.kinds)]
    lines += ["", "Kernels:"]
    listed = sorted(seen.kernels.items(), key=lambda item: -item[1][0])[:MOST_KERNELS]
    return lines + [f"{spent:9.3f} ms {calls:7.4g} calls  {name}" for name, (spent, calls) in listed]


def _beside(ours: Seen, theirs: Seen) -> list[str]:
    lines = [f"A  {ours.name}: {_times(ours)}", f"B  {theirs.name}: {_times(theirs)}"]
    if ours.timed_ms and theirs.timed_ms:
        lines.append(f"A takes {ours.timed_ms / theirs.timed_ms:.2f} times as long per token as B, as timed.")
    lines += [f"Time {ours.how}." if ours.how == theirs.how else f"Time of A {ours.how}; of B {theirs.how}.", ""]
    head = f"{'A ms':>9} {'B ms':>9} {'A - B':>9}"
    lines += [head, *(_line(change) for change in by_kind(ours, theirs)), "", f"{head}  calls of A, B"]
    return lines + [_line(change) for change in by_kernel(ours, theirs)[:MOST_KERNELS]]


def _line(change: Change) -> str:
    calls = "" if change.calls is None else f"{change.calls[0]:7.4g} {change.calls[1]:7.4g}"
    times = f"{change.ours:9.3f} {change.theirs:9.3f} {change.ours - change.theirs:+9.3f}"
    return "  ".join(text for text in (times, calls, change.name) if text)


def _largest(kinds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(kinds.items(), key=lambda item: -item[1])


def _times(seen: Seen) -> str:
    timed = "not timed" if seen.timed_ms is None else f"{seen.timed_ms:.3f} ms a token as timed"
    return f"{timed}, {seen.traced_ms:.3f} while profiled, {seen.launches:,.0f} launches a token"
