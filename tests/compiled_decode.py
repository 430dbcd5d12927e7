"""Compiles the kernels of lbi/kernels/decode.py for sm_90, as their launches would; run by test_fused.py."""

from __future__ import annotations

import torch
from fits import say_whether_they_fit
from packed_cases import FORMS, random_matrix

from lbi.kernels import tiles
from lbi.kernels.compile_only import compile_only
from lbi.kernels.decode import TritonSteps
from lbi.kernels.decode_torch import Shape
from lbi.kernels.formats import Packed, interleaved
from lbi.kernels.tiles import Tile

HIDDEN = 512


def use(matrix: Packed, tile: Tile) -> Packed:
    """The matrix, whose tile from here on is this one."""
    tiles._known("cpu")[f"step {tiles.key(matrix)}"] = tile
    return matrix


def step(steps: TritonSteps, name: str, tile: Tile) -> None:
    """Every kernel of a step, with programmatic dependent launch."""
    dtype = torch.bfloat16
    gain, table = torch.ones(HIDDEN, dtype=dtype), torch.zeros(64, HIDDEN, dtype=dtype)
    shape, form = steps.shape, FORMS[name]
    steps.embed(table, None, gain)
    qkv = steps.norm_product(use(random_matrix(form, 1024, HIDDEN, dtype), tile))
    angles = torch.zeros(shape.slots + 1, shape.width // 2)
    keys, values = (torch.zeros(shape.kv_heads, shape.slots, shape.width, dtype=dtype) for _ in range(2))
    mixed = steps.attention(qkv, angles, angles, keys, values)
    steps.product_add(use(random_matrix(form, HIDDEN, HIDDEN, dtype), tile), mixed, gain)
    halves = [random_matrix(form, 1024, HIDDEN, dtype) for _ in range(2)]
    act = steps.norm_product_swiglu(use(interleaved(*halves), tile))
    steps.product_add(use(random_matrix(form, HIDDEN, 1024, dtype), tile), act[:1024], gain)
    steps.head(use(random_matrix(form, 256, HIDDEN, dtype), tile))
    steps.next_token()


def main() -> None:
    """A step in rows of registers and in steps through shared memory, with a short cache and a long one."""
    torch.set_num_threads(1)
    compile_only(90)
    for name, tile, slots in (
        ("w4 g32", Tile(16, 64, 4), 4096),
        ("w4 g64", Tile(32, 16, 2, stages=3), 64),
        ("w2 g64", Tile(16, 16, 4), 64),
        ("w158", Tile(32, 16, 2), 64),
        ("plain", Tile(2, 512, 2), 64),
        ("fp8", Tile(4, 256, 2), 64),
    ):
        shape = Shape(HIDDEN, heads=4, kv_heads=2, width=128, slots=slots, eps=1e-5)
        steps = TritonSteps(shape, torch.device("cpu"), torch.bfloat16)
        steps._pdl = True
        step(steps, name, tile)
    say_whether_they_fit()


if __name__ == "__main__":
    main()
