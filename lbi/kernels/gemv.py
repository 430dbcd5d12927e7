"""y = W x for one token, from packed weights: the product that decoding consists of.

The kernels are in device/gemv.py and device/packed.py; their torch reference is
`Packed.dequantize`. Sums are float32 and in a fixed order, without atomics: the same inputs give
the same bits. `split` of a tile shares a row's length among programs (arXiv 2402.00025) and adds
their sums in a second kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lbi.kernels.device import gemv as device
from lbi.kernels.formats import BITS, ZERO, Packed
from lbi.kernels.tiles import Tile, tile_for, words_for

MOST_ROWS = 16
"""Tokens that `matmul_small` takes at once: one tile of the tensor cores."""


def constants(matrix: Packed) -> dict[str, Any]:
    """The arguments of `row_products` that describe the matrix."""
    return {
        "K": matrix.inputs,
        "BITS": BITS[matrix.format] if matrix.format in ZERO else 0,
        "GROUP": matrix.group_size,
        "Z": ZERO.get(matrix.format, 0) if matrix.zeros is None else -1,
    }


def steps(matrix: Packed, tile: Tile) -> tuple[int, bool]:
    """Blocks of `tile.words` in a row, and whether tiles fit rows and words without a rest."""
    width = matrix.data.shape[1]
    return -(-width // tile.words), width % (tile.words * tile.split) == 0 and matrix.rows % tile.rows == 0


def gemv(x: torch.Tensor, matrix: Packed, bias: torch.Tensor | None = None, tile: Tile | None = None) -> torch.Tensor:
    """(rows,) of `x`'s type: the matrix times `x`, (inputs,), plus `bias`, (rows,)."""
    tile = tile or tile_for(matrix)
    if x.is_cuda and x.dtype == torch.float32 and matrix.format in ZERO:
        # The tensor cores have no float32: what is multiplied without them takes registers.
        tile = replace(tile, rows=16, words=32)
    count, even = steps(matrix, tile)
    count = -(-count // tile.split)
    grid = (-(-matrix.rows // tile.rows), tile.split)
    out = torch.empty(matrix.rows, device=x.device, dtype=x.dtype)
    target = out if tile.split == 1 else torch.empty(tile.split, matrix.rows, device=x.device, dtype=torch.float32)
    device.gemv_kernel[grid](
        x, matrix.data, matrix.scales, matrix.zeros, bias if tile.split == 1 else None, target, matrix.rows,
        **constants(matrix), BN=tile.rows, BW=tile.words, STEPS=count, EVEN=even, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if tile.split > 1:
        device.sum_kernel[(-(-matrix.rows // 256),)](target, bias, out, matrix.rows, PARTS=tile.split, BN=256)
    return out


def matmul_small(x: torch.Tensor, matrix: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(M, rows) of `x`'s type for up to 16 tokens, `x` being (M, inputs)."""
    columns = 8 if x.shape[0] <= 8 else MOST_ROWS
    tile = Tile(32, 256 // x.element_size(), 4)
    if matrix.format in ZERO:
        tile = replace(tile, words=words_for(matrix, x, columns, tile))
    count, even = steps(matrix, tile)
    out = torch.empty(x.shape[0], matrix.rows, device=x.device, dtype=x.dtype)
    device.small_kernel[(-(-matrix.rows // tile.rows),)](
        x, matrix.data, matrix.scales, matrix.zeros, bias, out, x.shape[0], matrix.rows, **constants(matrix),
        COLS=columns, BN=tile.rows, BW=tile.words, STEPS=count, EVEN=even,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def dequantized(matrix: Packed, dtype: torch.dtype) -> torch.Tensor:
    """`Packed.dequantize` in one pass over the matrix, without its float32 temporaries."""
    if matrix.scales is None:
        return matrix.data.to(dtype)
    rows, words = (8, 128) if matrix.data.is_cuda else (64, 256)
    out = torch.empty(matrix.rows, matrix.inputs, device=matrix.data.device, dtype=dtype)
    device.dequantize_kernel[(-(-matrix.rows // rows), -(-matrix.data.shape[1] // words))](
        matrix.data, matrix.scales, matrix.zeros, out, matrix.rows, **constants(matrix), BN=rows, BW=words, num_warps=4
    )
    return out
