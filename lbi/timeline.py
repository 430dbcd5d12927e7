"""Where the time of a decode step goes: a profiler's trace as shares that add up to the whole.

On a GPU kernels overlap: those of two streams, and with programmatic dependent launch also a kernel with its own
predecessor, for which it waits inside. A sum of durations would count such time twice. So each instant is counted
once, for the kernel that began first and still runs; a kernel's own time is what is left of it then. Instants without
a kernel are idle: `waiting` where the next kernel had not been launched yet, `between` where it had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lbi.decode_trace import DEVICE_WORK, LAUNCHES, Event, Step, step_spans
from lbi.kernel_kinds import kind_of
from lbi.kernels_seen import shorten

LISTED = 30
"""Kernels that are listed by name; the rest is in the kinds."""


@dataclass(frozen=True, slots=True)
class Work:
    """Something that ran on the device, in microseconds; `launched` is when the host began to launch it."""

    name: str
    start: float
    end: float
    launched: float
    in_graph: bool


def breakdown(events: Iterable[Event], steps: Sequence[Step], device: str) -> dict[str, Any]:
    """Milliseconds per token by kind and by kernel, launches, and idle time. Empty where nothing was seen."""
    known = list(events)
    tokens = sum(step.tokens for step in steps)
    if not tokens:
        return {}
    return _of_gpu(works(known), tokens) if device == "cuda" else _of_cpu(known, steps, tokens)


def works(events: Sequence[Event]) -> list[Work]:
    """Kernels, copies and fills that the marked steps launched, by their start."""
    spans = step_spans(events)
    launches = {
        event["args"]["correlation"]: (event["ts"], "Graph" in event["name"])
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        if event.get("cat") not in DEVICE_WORK:
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is None or not any(start <= launch[0] <= end for start, end in spans):
            continue
        start = float(event["ts"])
        found.append(Work(event["name"], start, start + float(event.get("dur", 0.0)), *launch))
    return sorted(found, key=lambda work: (work.start, -work.end))


def own_times(found: Sequence[Work]) -> tuple[list[float], float, float]:
    """Own microseconds of each of `found`, which are in order, then those of `waiting` and of `between`."""
    own, waiting, between = [], 0.0, 0.0
    until = found[0].start if found else 0.0
    for work in found:
        gap = work.start - until
        if gap > 0:
            late = work.launched > until
            waiting, between = waiting + gap * late, between + gap * (not late)
        own.append(max(0.0, work.end - max(work.start, until)))
        until = max(until, work.end)
    return own, waiting, between


def _of_gpu(found: Sequence[Work], tokens: int) -> dict[str, Any]:
    if not found:
        return {}
    own, waiting, between = own_times(found)
    span = max(work.end for work in found) - found[0].start
    durations = sum(work.end - work.start for work in found)
    per_token = 1e-3 / tokens
    return {
        "time": "of the GPU; each instant counted once, for the kernel that began first",
        "tokens": tokens,
        "ms_per_token": span * per_token,
        **_listed([work.name for work in found], [microseconds * per_token for microseconds in own], tokens),
        "waiting_ms": waiting * per_token,
        "between_ms": between * per_token,
        "idle_share": (waiting + between) / span if span else 0.0,
        "overlapped_ms": (durations - sum(own)) * per_token,
        "launches_per_token": len(found) / tokens,
        "in_graphs": sum(work.in_graph for work in found) / len(found),
    }


def _of_cpu(events: Sequence[Event], steps: Sequence[Step], tokens: int) -> dict[str, Any]:
    """On a CPU operators run one after the other; what is not theirs is Python's, between them."""
    span = sum(end - start for start, end in step_spans(events))
    ops = [op for step in steps for op in step.ops]
    if not ops:
        return {}
    inside = sum(op.seconds for op in ops) * 1e6
    return {
        "time": "of the CPU, callees excluded, while profiled, which slows each operator down",
        "tokens": tokens,
        "ms_per_token": span * 1e-3 / tokens,
        **_listed([op.name for op in ops], [op.seconds * 1e3 / tokens for op in ops], tokens),
        "outside_ms": max(0.0, span - inside) * 1e-3 / tokens,
        "launches_per_token": len(ops) / tokens,
    }


def _listed(names: Sequence[str], milliseconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """Time by kind, and the kernels that took most."""
    kinds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, spent in zip(names, milliseconds, strict=True):
        kinds[kind_of(name)] += spent  # type: ignore[assignment]
        times[shorten(name)] += spent  # type: ignore[assignment]
        calls[shorten(name)] += 1
    return {
        "kinds_ms": dict(kinds.most_common()),
        "kernels": [
            {"name": name, "calls": calls[name] / tokens, "ms": spent} for name, spent in times.most_common(LISTED)
        ],
    }
