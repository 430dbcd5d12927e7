"""Compiles the kernels of lbi/kernels/several.py for sm_90, as their launches would; run by test_fused.py."""

from __future__ import annotations

import torch
from fits import say_whether_they_fit

from lbi.kernels.compile_only import compile_only
from lbi.kernels.decode_torch import Shape
from lbi.kernels.several import TritonSeveral


def main() -> None:
    """SmolLM2-135M's shape and Llama-3.1-8B's, and the most rows that a tile takes."""
    torch.set_num_threads(1)
    compile_only(90)
    for heads, kv, width, count, dtype in (
        (9, 3, 64, 9, torch.bfloat16),
        (32, 8, 128, 16, torch.bfloat16),
        (32, 4, 128, 16, torch.bfloat16),
        (4, 4, 64, 16, torch.float32),
    ):
        shape = Shape(576, heads, kv, width, 256, 1e-5)
        several = TritonSeveral(shape, torch.device("cpu"), dtype, None)
        angles = torch.zeros(257, width // 2)
        several.begin(torch.arange(count), angles, angles)
        stream, delta = torch.zeros(count, 576), torch.zeros(count, 576, dtype=dtype)
        several.norm(stream, None, torch.ones(576, dtype=dtype))
        several.norm(stream, delta, torch.ones(576, dtype=dtype))
        keys, values = (torch.zeros(kv, 256, width, dtype=dtype) for _ in range(2))
        several.attention(torch.zeros(count, (heads + 2 * kv) * width, dtype=dtype), keys, values)
        several.swiglu(torch.zeros(count, 3072, dtype=dtype))
    say_whether_they_fit()


if __name__ == "__main__":
    main()
