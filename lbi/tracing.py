"""A profiler trace of a few decode steps, in a pass of its own after the measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def profile(engine: Any, prompt: list[int], tokens: int, folder: Path) -> dict[str, Any]:
    """Write `trace.json.gz` (chrome://tracing, Perfetto) of a generation of `tokens` decode steps.

    Returns the trace's path inside the attempt and the ten operators that took most time,
    in seconds of their own (callees excluded).
    """
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    folder.mkdir(exist_ok=True)
    with torch.profiler.profile(activities=activities) as profiler:
        engine.generate(prompt, tokens + 1, seed=0)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    on_gpu = len(activities) > 1

    def own_seconds(event: Any) -> float:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        return float(microseconds) / 1e6

    top = sorted(profiler.key_averages(), key=own_seconds, reverse=True)[:10]
    return {
        "file": "trace/trace.json.gz",
        "decode_steps": tokens,
        "top": [{"name": event.key, "calls": event.count, "seconds": own_seconds(event)} for event in top],
    }
