"""Traces beside a result: which are wanted, which this run cannot have, and the profiler's own.

Nothing of it comes near the timed region. The profiler's trace is taken in the run's process after everything else.
What must be set before torch starts, or would slow down the run that is measured, is taken by a second process that
does the same once more without measuring (trace_pass.py): the allocator's history, launches that the host waits for,
what torch.compile makes. `traces` in effective.json says what there is, and why not where there is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbi.config import LbiConfig
from lbi.files import BadFile, read_json, write_json
from lbi.store import SCHEMA

FOLDER = "trace"
"""Of an attempt; the tracker attaches what is in it."""

COMPILE = f"{FOLDER}/compile"

KINDS = {
    "off": (),
    "kernels": ("kernels",),
    "profiler": ("kernels",),
    "memory": ("memory",),
    "compile": ("compile",),
    "all": ("kernels", "memory", "compile"),
}
"""The traces that a `trace.kind` asks for."""

KEPT_AFTER = {
    "kernels": ("ok",),
    "memory": ("ok", "oom"),
    "compile": ("ok", "not_applied", "crash"),
}
"""Statuses of a run after which a second process takes a trace: what failed may fail there too, and shows how."""


def wanted(config: LbiConfig) -> tuple[str, ...]:
    """The traces that are asked for."""
    return KINDS[config.trace.kind]


def cannot(trace: str, config: LbiConfig) -> str:
    """Why this run cannot have a trace; empty if it can."""
    if trace == "memory" and config.engine.device != "cuda":
        return "torch keeps the history of allocations on a GPU alone"
    if trace == "compile" and config.compiler.backend != "inductor" and not config.compiler.linears:
        return f"compiler={config.compiler.name} compiles nothing"
    return ""


def is_blocking(config: LbiConfig) -> bool:
    """Whether the host is to wait for each launch; a CPU's operators follow each other anyway."""
    return config.trace.blocking and config.engine.device == "cuda"


def apart(config: LbiConfig, status: str) -> tuple[str, ...]:
    """The traces that a second process takes after a run that ended with `status`."""
    found = [trace for trace in wanted(config) if status in KEPT_AFTER[trace] and not cannot(trace, config)]
    return tuple(trace for trace in found if trace != "kernels" or is_blocking(config))


def variables(traces: tuple[str, ...], attempt: Path) -> dict[str, str]:
    """Environment of that process, beside what every measuring process has."""
    made = {}
    if "kernels" in traces:
        made["CUDA_LAUNCH_BLOCKING"] = "1"
    if "compile" in traces:
        # A graph that came from inductor's cache would leave nothing to look at.
        made |= {"TORCH_TRACE": str(attempt / COMPILE), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    return made


def in_the_run(config: LbiConfig) -> dict[str, dict[str, Any]]:
    """What the run itself can say of traces that it does not take: why there is none."""
    return {trace: {"missing": why} for trace in wanted(config) if (why := cannot(trace, config))}


def add(attempt: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put what a second process found into effective.json, which a run that failed does not have yet."""
    file = attempt / "effective.json"
    known = read_json(file, SCHEMA) or {"schema": SCHEMA}
    write_json(file, {**known, "traces": {**(known.get("traces") or {}), **found}})


def not_taken(attempt: Path, config: LbiConfig) -> list[str]:
    """The traces that are asked for, that such a run can have, and that this one was not asked for."""
    asked = [trace for trace in wanted(config) if not cannot(trace, config)]
    if not asked:
        return []
    try:
        known = (read_json(attempt / "effective.json", SCHEMA) or {}).get("traces") or {}
    except BadFile:
        known = {}
    return [trace for trace in asked if trace not in known]


def lacking(effective: Mapping[str, Any]) -> str:
    """The traces that were asked for and are not there, in words; empty if none is lacking."""
    traces = effective.get("traces")
    known = traces.items() if isinstance(traces, dict) else ()
    said = [
        f"no {name} trace: {about['missing']}"
        for name, about in known
        if isinstance(about, dict) and "missing" in about
    ]
    return "; ".join(said)


def profile(engine: Any, prompt: list[int], tokens: int, folder: Path) -> dict[str, Any]:
    """Write `trace.json.gz` (chrome://tracing, Perfetto) of a generation of `tokens` decode steps.

    Returns the trace's path inside the attempt and the ten operators that took most time,
    in seconds of their own (callees excluded).
    """
    import torch
    from torch.profiler import ProfilerActivity

    from lbi.decode_trace import mark

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    folder.mkdir(exist_ok=True)
    with engine.marking(mark), torch.profiler.profile(activities=activities) as profiler:
        engine.generate(prompt, tokens + 1, seed=0)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    on_gpu = len(activities) > 1

    def own_seconds(event: Any) -> float:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        return float(microseconds) / 1e6

    top = sorted(profiler.key_averages(), key=own_seconds, reverse=True)[:10]
    return {
        "file": f"{FOLDER}/trace.json.gz",
        "decode_steps": tokens,
        "top": [{"name": event.key, "calls": event.count, "seconds": own_seconds(event)} for event in top],
    }
