"""A short profiled generation, taken apart into its decode steps: what ran in each, what each allocated.

Taken after the measurement, in a pass of its own. The profiler's chrome trace is read instead
of its tables: it alone has the launch grid of a kernel, and the tables take ten times as long.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from lbi.engines import Engine, steps_to_look_at

LAUNCHES_TAKEN = 3
"""Enough to tell what each decode step does from what happens once."""

MARK = "lbi: decode step"
"""Around the launch of one step; of several at once it is "lbi: decode steps" and their number."""

LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})

Event = Mapping[str, Any]

StepOf = Callable[[Event], int | None]
"""Number of the step that an event falls into."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Something that ran: `seconds` on the device, or of an operator's own on a CPU (callees excluded).

    `threads` is how many of a GPU it was launched with; 0 for what has no grid.
    """

    name: str
    seconds: float
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory that operator `by` took, in bytes as the allocator rounds them; "" if it was no operator's."""

    bytes: int
    by: str


@dataclass(slots=True)
class Step:
    """What was launched at once: one forward pass for one token, or those of `tokens` tokens."""

    tokens: int = 1
    ops: list[Kernel] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)


def take(engine: Engine, prompt: list[int], device: str, new_tokens: int) -> list[Step]:
    """The decode steps of `take_events`."""
    return read_steps(take_events(engine, prompt, device, new_tokens))


def take_events(engine: Engine, prompt: list[int], device: str, new_tokens: int) -> list[Event]:
    """A trace of `LAUNCHES_TAKEN` launches of decode steps by `engine`, or of all of a workload of `new_tokens`."""
    from torch.profiler import ProfilerActivity, profile

    wanted = 1 + steps_to_look_at(engine, LAUNCHES_TAKEN, new_tokens)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with engine.marking(mark), profile(activities=activities, profile_memory=True, acc_events=False) as profiler:
        engine.generate(prompt, wanted, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        # Names of compiled code may hold bytes that are no UTF-8.
        return list(json.loads(file.read_text(errors="replace"))["traceEvents"])


def mark(tokens: int) -> Any:
    """What goes around the launch of decode steps in a trace, for readers and for `read_steps`."""
    from torch.profiler import record_function

    return record_function(MARK if tokens == 1 else f"{MARK}s {tokens}")


def step_spans(events: Iterable[Event]) -> list[tuple[float, float]]:
    """When the marked launches began and ended on the host, in microseconds, in order."""
    marked = (event for event in events if _is_mark(event))
    return sorted((float(event["ts"]), float(event["ts"] + event["dur"])) for event in marked)


def _is_mark(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(MARK)


def read_steps(events: Iterable[Event]) -> list[Step]:
    """The decode steps in a chrome trace's events, in order; empty where none is marked."""
    known = list(events)
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["tid"], _tokens(event["name"]))
        for event in known
        if _is_mark(event)
    )
    starts = [start for start, *_ in spans]
    steps = [Step(tokens) for *_, tokens in spans]

    def number(event: Event) -> int | None:
        """Which step it falls into. GPU work is asynchronous, so only the host's events are asked for this."""
        index = bisect_right(starts, event["ts"]) - 1
        return index if index >= 0 and event["ts"] <= spans[index][1] else None

    _read_host(steps, [event for event in known if spans and event.get("tid") == spans[0][2]], number)
    _read_device(steps, known, number)
    return steps


def _tokens(mark: str) -> int:
    return int(mark.removeprefix(f"{MARK}s")) if mark != MARK else 1


def _read_host(steps: list[Step], events: list[Event], number: StepOf) -> None:
    """Operators with the time that is their own, and allocations with the operator that made them."""
    found = [event for event in events if event.get("cat") == "cpu_op" or event["name"] == "[memory]"]
    # An operator stands before what it contains; what begins at the same moment and ends later contains.
    found.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    open_ops: list[tuple[float, int]] = []
    ops: list[tuple[int, str]] = []
    own: list[float] = []
    for event in found:
        step = number(event)
        while open_ops and open_ops[-1][0] <= event["ts"]:
            open_ops.pop()
        if step is None:
            continue
        if event["name"] == "[memory]":
            if event["args"]["Bytes"] > 0:
                callers = (ops[index][1] for _, index in reversed(open_ops))
                # What asked aten::empty for memory says more than aten::empty.
                by = next((name for name in callers if not name.startswith("aten::empty")), "")
                steps[step].allocations.append(Allocation(event["args"]["Bytes"], by))
            continue
        if open_ops:
            own[open_ops[-1][1]] -= event["dur"]
        open_ops.append((event["ts"] + event["dur"], len(ops)))
        ops.append((step, event["name"]))
        own.append(event["dur"])
    for (step, name), microseconds in zip(ops, own, strict=True):
        steps[step].ops.append(Kernel(name, max(0.0, microseconds) / 1e6))


def _read_device(steps: list[Step], events: list[Event], number: StepOf) -> None:
    """Kernels, each in the step that launched it; those of a CUDA graph share the launch of the graph."""
    launched = {
        event["args"]["correlation"]: number(event)
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") not in DEVICE_WORK:
            continue
        about = event.get("args", {})
        step = launched.get(about.get("correlation"))
        if step is not None:
            threads = prod(about["grid"]) * prod(about["block"]) if "grid" in about and "block" in about else 0
            steps[step].kernels.append(Kernel(event["name"], event.get("dur", 0.0) / 1e6, threads))
