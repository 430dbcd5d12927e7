"""Compiles the kernels of lbi/kernels/cache_gpu.py for sm_90, as their launches would; run by test_caches.py."""

from __future__ import annotations

import torch
from fits import say_whether_they_fit

from lbi.kernels import cache_gpu
from lbi.kernels.cache_formats import FORMATS, CacheFormat
from lbi.kernels.compile_only import compile_only


def main() -> None:
    """Launches in bfloat16 with PDL, as engine=fused has them, and without, as engine=loop has them."""
    compile_only(90)
    for name in FORMATS:
        for width, group in ((64, 32), (128, 128), (80, 80)):
            kind, heads, kv_heads, splits = CacheFormat(name, width, group), 8, 2, 4
            keys, values = kind.allocate(kv_heads, 64, "cpu"), kind.allocate(kv_heads, 64, "cpu")
            fused = width != 80
            dtype = torch.float32 if fused else torch.bfloat16
            new, queries = torch.zeros(2, kv_heads, width, dtype=dtype), torch.zeros(heads, width, dtype=dtype)
            angles = (torch.zeros(65, width // 2), torch.zeros(65, width // 2)) if fused else None
            position = torch.zeros(1, dtype=torch.int32 if fused else torch.int64)
            extra = {"launch_pdl": True} if fused else {}
            cut = cache_gpu.cut_for(kind, 64)
            scratch = cache_gpu.scratch(torch.device("cpu"), heads, kv_heads, width, splits, cut)
            out = torch.zeros(heads, width, dtype=torch.bfloat16)
            cache_gpu.attend(
                queries, keys, values, position, 1, kind, 0.1, out, scratch, splits,
                new=tuple(new) if fused else None, angles=angles, launch={"PDL": fused, **extra},
            )  # fmt: skip
    say_whether_they_fit()


if __name__ == "__main__":
    main()
