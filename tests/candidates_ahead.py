"""Tunes a kernel of four candidates for a GPU that is not here; run by test_candidates_ahead.py, a process of its own.

What the candidates are compiled by and what they are timed by is printed.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
import triton
import triton.language as tl

from lbi.kernels.compile_only import compile_only
from lbi.quantizers.candidates_ahead import compile_candidates_ahead

compilers: list[str] = []
"""The thread of each compilation that was not found on disk, in their order; "timed" stands between them."""


def note(**told: Any) -> None:
    if not told["cache_hit"]:
        compilers.append(threading.current_thread().name.split("_")[0])


def bench(launch: Any, quantiles: Any) -> list[float]:
    compilers.append("timed")
    launch()
    return [1.0, 1.0, 1.0]


@triton.autotune([triton.Config({"BLOCK": size}) for size in (32, 64, 128, 256)], key=["N"], do_bench=bench)
@triton.heuristics({"EVEN": lambda given: given["N"] % given["BLOCK"] == 0})
@triton.jit
def doubled(x, out, N, BLOCK: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.static_assert(BLOCK != 128)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < N), mask=at < N)


def main() -> None:
    """Two numbers of elements, the second twice: it is tuned once."""
    triton.knobs.compilation.listener = note
    compile_only(90)
    compile_candidates_ahead()
    compile_candidates_ahead()
    for count in (1000, 1024, 1024):
        x = torch.zeros(count)
        doubled[(1,)](x, torch.zeros(count), count)
        compilers.append("tuned")
    print(json.dumps(compilers))


if __name__ == "__main__":
    main()
