"""The kernels of lbi/kernels/several.py in Triton's interpreter against several_torch.py; run by test_fused.py."""

from __future__ import annotations

import os
import secrets

os.environ["TRITON_INTERPRET"] = "1"

import torch
from interpreted_decode import close

from lbi.kernels.decode_torch import Shape
from lbi.kernels.several import TritonSeveral
from lbi.kernels.several_torch import TorchSeveral

SLOTS = 150


def check(heads: int, kv: int, width: int, count: int, splits: int) -> None:
    """Every operation, attention at positions on both sides of its blocks and splits."""
    shape, dtype = Shape(96, heads, kv, width, SLOTS, 1e-5), torch.float32
    ours, theirs = TritonSeveral(shape, torch.device("cpu"), dtype, None), TorchSeveral(shape, dtype, None)
    ours._splits = splits
    stream, delta, gain = torch.randn(count, 96), torch.randn(count, 96), torch.rand(96) + 0.5
    copy = stream.clone()
    for change in (None, delta):
        close(ours.norm(stream, change, gain), theirs.norm(copy, change, gain), "norm")
        close(stream, copy, "the stream")
    gate_up = torch.randn(count, 2 * 70)
    close(ours.swiglu(gate_up), theirs.swiglu(gate_up), "swiglu")
    cos, sin = torch.randn(SLOTS + 1, width // 2), torch.randn(SLOTS + 1, width // 2)
    for now in sorted({0, 5, 63 - count // 2, 64, 64 * splits - 1, SLOTS - count}):
        if now + count > SLOTS:
            continue
        qkv = torch.randn(count, (heads + 2 * kv) * width)
        caches = [torch.randn(kv, SLOTS, width) for _ in range(2)]
        copies = [cache.clone() for cache in caches]
        where = now + torch.arange(count)
        for several in (ours, theirs):
            several.begin(where, cos, sin)
        close(ours.attention(qkv, *caches), theirs.attention(qkv, *copies), f"attention of {count} at {now}")
        for cache, expected in zip(caches, copies, strict=True):
            close(cache, expected, f"cache at {now}")


def main() -> None:
    """Fresh random inputs every time."""
    torch.manual_seed(int(os.environ.get("LBI_TEST_SEED", secrets.randbelow(10**6))))
    cases = [(4, 4, 64, 3, 1), (6, 2, 64, 9, 2), (8, 2, 80, 16, 3), (8, 1, 96, 2, 2), (4, 2, 128, 5, 3)]
    for case in cases:
        check(*case)
    # More rows than a tile has: by torch, as in the reference.
    check(16, 1, 16, 9, 2)
    print(f"{len(cases)} shapes")


if __name__ == "__main__":
    main()
