"""The kernels of lbi/kernels/decode.py in Triton's interpreter against decode_torch.py; run by test_fused.py."""

from __future__ import annotations

import os
import secrets

os.environ["TRITON_INTERPRET"] = "1"

import torch

from lbi.kernels.decode import TritonSteps
from lbi.kernels.decode_torch import Shape, TorchSteps
from lbi.kernels.formats import BITS, ZERO, Packed, interleaved, pack, stacked

HIDDEN, SLOTS, VOCABULARY = 128, 70, 5001


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not error < 1e-5:
        raise SystemExit(f"{what}: {error:.1e}")


def matrix(rows: int, inputs: int, kind: str) -> Packed:
    """Random weights; packed ones have groups of 32 with zeros of their own."""
    if kind == "plain":
        return Packed("plain", inputs, torch.randn(rows, inputs))
    codes = torch.randint(0, 3 if kind == "w158" else 2 ** BITS[kind], (rows, inputs))
    if kind in ("w8", "w158"):
        return Packed(kind, inputs, pack(codes, BITS[kind]), torch.rand(rows, 1) + 0.5)
    scales = torch.rand(rows, inputs // 64) + 0.5
    return Packed(kind, inputs, pack(codes, BITS[kind]), scales, torch.rand_like(scales) * (2 ** BITS[kind] - 1))


def check(heads: int, kv: int, width: int, kind: str) -> None:
    """Every operation once, and attention at positions on both sides of its blocks."""
    shape = Shape(HIDDEN, heads, kv, width, SLOTS, 1e-5)
    cpu = torch.device("cpu")
    both = TritonSteps(shape, cpu, torch.float32), TorchSteps(shape, cpu, torch.float32)
    ours, theirs = both
    table, gain = torch.randn(50, HIDDEN), torch.rand(HIDDEN) + 0.5
    for steps in both:
        steps.tokens[5] = 17
        steps.position.fill_(5)
        steps.embed(table, None, gain)
    close(ours.stream.gained, theirs.gained, "embed")
    parts = [matrix(rows * width, HIDDEN, kind) for rows in (heads, kv, kv)]
    qkv = ours.norm_product(stacked(parts)).clone()
    close(qkv, theirs.norm_product(stacked(parts)), "norm_product")
    # Scores in the thousands would turn float32's rounding of them into errors of their exponentials.
    qkv /= qkv.std()
    cos, sin = torch.randn(SLOTS + 1, width // 2), torch.randn(SLOTS + 1, width // 2)
    for now in (0, 5, 31, 32, 33, SLOTS - 1):
        caches = [torch.randn(kv, SLOTS, width) for _ in range(2)]
        copies = [cache.clone() for cache in caches]
        for steps in both:
            steps.position.fill_(now)
        mixed = theirs.attention(qkv, cos, sin, *copies)
        close(ours.attention(qkv, cos, sin, *caches), mixed, f"attention at {now}")
        for cache, copy in zip(caches, copies, strict=True):
            close(cache, copy, f"cache at {now}")
    out = matrix(HIDDEN, heads * width, kind)
    for steps in both:
        steps.product_add(out, mixed, gain)
    close(ours.stream.values, theirs.values, "product_add")
    close(ours.stream.gained, theirs.gained, "product_add's gained stream")
    gate_up = interleaved(matrix(70, HIDDEN, kind), matrix(70, HIDDEN, kind))
    close(ours.norm_product_swiglu(gate_up), theirs.norm_product_swiglu(gate_up), "swiglu")
    head = matrix(VOCABULARY, HIDDEN, kind)
    close(ours.head(head), theirs.head(head), "head")
    for steps in both:
        steps.position.fill_(5)
        steps.next_token()
    if int(ours.tokens[6]) != int(theirs.tokens[6]) or int(ours.position) != 6:
        raise SystemExit(f"next_token: {ours.tokens[6]} at {ours.position}, {theirs.tokens[6]} was expected")


def main() -> None:
    """Fresh random inputs every time."""
    torch.manual_seed(int(os.environ.get("LBI_TEST_SEED", secrets.randbelow(10**6))))
    shapes = [(4, 4, 64, "plain"), (6, 2, 64, "w4"), (8, 2, 80, "w8"), (8, 1, 96, "w2"), (4, 2, 128, "w158")]
    for shape in shapes:
        check(*shape)
    print(f"{len(shapes)} shapes, formats {', '.join(['plain', *ZERO])}")


if __name__ == "__main__":
    main()
