"""Compiles the Triton kernels for GPUs that are not here, as their launches would, and prints how each went.

A program of its own: lbi.kernels.compile_only is for a whole process.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from fits import SHARED
from packed_cases import FORMS, random_matrix

from lbi.kernels import tiles
from lbi.kernels.compile_only import compile_only, compiled
from lbi.kernels.device import gemv as device
from lbi.kernels.gemv import constants, gemv, matmul_small
from lbi.kernels.tiles import Tile


def attempt(name: str, capability: int, dtype: torch.dtype) -> dict[str, Any]:
    """One form for one GPU: what went wrong, or None."""
    compiled.clear()
    tiles.shared_memory = lambda _: SHARED[capability]
    matrix = random_matrix(FORMS[name], 64, 512, dtype)
    x, bias = torch.randn(5, 512).to(dtype), torch.randn(64).to(dtype)
    found = {"form": name, "capability": capability, "dtype": str(dtype), "problem": None}
    try:
        gemv(x[0], matrix, bias, Tile(8, 16, 2, split=2))
        gemv(x[0], matrix, None, Tile(16, 32, 1))
        matmul_small(x, matrix, bias)
        # Long rows and as many tokens as there can be: every stage is in use then.
        matmul_small(torch.randn(16, 8192).to(dtype), random_matrix(FORMS[name], 64, 8192, dtype))
        if matrix.scales is not None:
            # Not by its launch, which takes tiles for the interpreter where a matrix is not on a GPU.
            device.dequantize_kernel[(1,)](
                matrix.data, matrix.scales, matrix.zeros, torch.empty(64, 512, dtype=dtype), 64,
                **constants(matrix), BN=8, BW=128, num_warps=4,
            )  # fmt: skip
    except triton.CompilationError as problem:
        return {**found, "problem": str(problem)[-300:]}
    shared = max(kernel.metadata.shared for kernel in compiled)
    if shared > SHARED[capability]:
        found["problem"] = f"{shared} bytes of shared memory"
    return found


CASES = [
    *((80, torch.bfloat16, name) for name in ("plain", "w8", "w4 g32", "w4 row symmetric", "w2 g64", "w158")),
    (89, torch.bfloat16, "fp8"),
    (89, torch.bfloat16, "w2 g64"),
    (90, torch.bfloat16, "w2 g64"),
    # The most shared memory of all, where there is the least.
    (89, torch.float32, "w2 g64"),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    for capability, dtype, name in CASES:
        compile_only(capability)
        print(json.dumps(attempt(name, capability, dtype)), flush=True)
