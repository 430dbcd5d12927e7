"""Which kernels a decode step ran, by time, and whether those are among them that its quantizer is for.

A quantizer can be applied to every tensor and still be multiplied by a kernel that knows
nothing of it: the weights are what was asked for, the arithmetic is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lbi.config import QuantizerConfig
from lbi.decode_trace import Kernel, Step
from lbi.errors import NotApplied
from lbi.quantizers import method

SHOWN = 12

LONGEST = 100
"""Characters of a name that are kept."""


def summary(steps: Sequence[Step], device: str) -> dict[str, Any]:
    """The kernels that took most time: `top` with name, calls a step and share; `ms_per_step` of all of them.

    On a GPU the time is the device's, on a CPU each operator's own. `missing` says why there are none.
    """
    ran = _ran(steps, device)
    if not ran:
        return {"missing": f"the profiler saw {'no kernel' if device == 'cuda' else 'no operator'} in a decode step"}
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for kernel in ran:
        name = shorten(kernel.name)
        seconds[name] += kernel.seconds  # type: ignore[assignment]
        calls[name] += 1
    total, tokens = sum(seconds.values()), sum(step.tokens for step in steps)
    return {
        "time": "of the GPU" if device == "cuda" else "of the CPU, callees excluded, while profiled",
        "steps": tokens,
        "ms_per_step": 1e3 * total / tokens,
        "top": [
            {"name": name, "calls": calls[name] / tokens, "share": spent / total if total else 0.0}
            for name, spent in seconds.most_common(SHOWN)
        ],
    }


def _ran(steps: Sequence[Step], device: str) -> list[Kernel]:
    return [kernel for step in steps for kernel in (step.kernels if device == "cuda" else step.ops)]


def check(steps: Sequence[Step], options: Iterable[QuantizerConfig], device: str, backend: str) -> None:
    """Raises `NotApplied` if an option's kernels are not among those seen.

    Not held to it: a compiled graph on a CPU, which does not show its operators, and a GPU
    of which the profiler shows nothing.
    """
    if (device == "cpu" and backend != "eager") or not _ran(steps, device):
        return
    seen = {kernel.name for step in steps for kernel in (*step.kernels, *step.ops)}
    for name, pattern in sorted({(option.name, method(option).kernels.get(device, "")) for option in options}):
        if pattern and not any(re.search(pattern, kernel) for kernel in seen):
            ran = ", ".join(item["name"] for item in summary(steps, device)["top"][:4])
            raise NotApplied(f"{name}: kernels {pattern} were expected and the decode step ran {ran}")


HINT = re.compile(r"(\w+)\(at::TensorIterator|(\w*Functor\w*)|(\w+_cuda)\b|(cutlass_\w+)")
"""What a template of PyTorch or CUTLASS is made for: the part of its arguments that tells two of them apart."""

INDUCTOR_GRAPH = re.compile(r"^## Call CompiledFxGraph \w+ ##$")


def shorten(name: str) -> str:
    """A kernel's name without return type, arguments, and all of its template's arguments but the telling one."""
    if INDUCTOR_GRAPH.match(name):
        return "inductor's own code (CompiledFxGraph)"
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    base, opened, rest = plain.partition("<")
    if not opened or not re.fullmatch(r"[\w:~]+", base):
        base = plain.partition("(")[0] if re.match(r"[\w:~]+\(", plain) else plain
        return base[:LONGEST]
    found = HINT.search(rest)
    hint = next((group for group in found.groups() if group), "") if found else ""
    return (base + (f"<{hint}>" if hint else ""))[:LONGEST]
