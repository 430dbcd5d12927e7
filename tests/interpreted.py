"""Runs the Triton kernels in Triton's interpreter and prints their errors as JSON, by case.

A program of its own: the interpreter is chosen when a kernel is defined, for the whole process.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from packed_cases import FORMS, Form, error, random_matrix

from lbi.kernels.formats import BITS, ZERO
from lbi.kernels.gemv import dequantized, gemv, matmul_small
from lbi.kernels.tiles import Tile

FITS = Tile(32, 16, 1)
"""A tile that the even shape has no rest of, alone and in two parts."""

RAGGED = [Tile(16, 16, 1), Tile(32, 16, 1, split=2), Tile(64, 32, 2, split=4)]
"""Tiles that leave a rest of rows and of words; the last has more parts than blocks."""


def even(form: Form) -> tuple[int, int]:
    """(rows, inputs) that two of `FITS` fill."""
    return 64, 2 * FITS.words * (32 // BITS[form.format] if form.format in ZERO else 1)


def ragged(form: Form) -> tuple[int, int]:
    """(rows, inputs) with a rest for every tile, and with as few inputs as a third of a block has."""
    return 61, 5 * max(form.unit, form.group or 1) if form.format in ZERO else 45


def gemv_errors(form: Form) -> dict[str, float]:
    """The largest error by type, and how often a second call gave other bits."""
    found = {"float32": 0.0, "bfloat16": 0.0, "unequal": 0.0}
    for (rows, inputs), tiles in ((even(form), [FITS, replace(FITS, split=2)]), (ragged(form), RAGGED)):
        for dtype in (torch.float32, torch.bfloat16):
            matrix = random_matrix(form, rows, inputs, dtype)
            x, bias = torch.randn(inputs).to(dtype), torch.randn(rows).to(dtype)
            # bfloat16 takes the same way through the kernels: one tile of each shape will do.
            for tile in tiles if dtype == torch.float32 else tiles[-1:]:
                added = None if tile.split == 4 else bias
                y = gemv(x, matrix, added, tile)
                key = str(dtype).removeprefix("torch.")
                found[key] = max(found[key], error(y, matrix, x, added))
        found["unequal"] += not torch.equal(y, gemv(x, matrix, added, tile))
    return found


def small_errors(form: Form) -> float:
    """The largest error of a few tokens in float32: the interpreter has no bf16 `tl.dot`."""
    worst = 0.0
    for (rows, inputs), tokens in ((even(form), 16), (ragged(form), 5), (ragged(form), 1)):
        matrix = random_matrix(form, rows, inputs, torch.float32)
        x, bias = torch.randn(tokens, inputs), torch.randn(rows) if tokens > 1 else None
        worst = max(worst, error(matmul_small(x, matrix, bias), matrix, x, bias))
    return worst


def unpacking_error(form: Form) -> float:
    """Of the whole matrix, against the reference that all the others are held to."""
    worst = 0.0
    for rows, inputs in (even(form), ragged(form)):
        matrix = random_matrix(form, rows, inputs, torch.float32)
        expected = matrix.dequantize()
        worst = max(worst, float((dequantized(matrix, torch.float32) - expected).norm() / expected.norm()))
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("LBI_TEST_SEED", secrets.randbelow(10**6))))
    for name, form in FORMS.items():
        print(
            json.dumps(
                {"form": name, **gemv_errors(form), "small": small_errors(form), "unpacked": unpacking_error(form)}
            ),
            flush=True,
        )
