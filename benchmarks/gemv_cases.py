"""What benchmarks/gemv.py multiplies, and the tiles worth trying: known without a GPU and without Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import log2

import torch

from lbi.kernels.formats import BITS, ZERO, Packed
from lbi.kernels.tiles import Tile

LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
"""(outputs, inputs): q, k and v; o; gate and up; down; the head."""

TINY = [(48, 256), (40, 448)]
"""For a run without a GPU: the second has a rest for every tile."""


@dataclass(frozen=True)
class Form:
    """A format with its groups; `group` None is one scale a row."""

    format: str
    group: int | None = None
    zeros: bool = False


FORMS = {
    "plain": Form("plain"),
    "w8": Form("w8"),
    "fp8": Form("fp8"),
    "w4 g128": Form("w4", 128, zeros=True),
    "w4 g128 sym": Form("w4", 128),
    "w4 g64": Form("w4", 64, zeros=True),
    "w4 g32": Form("w4", 32, zeros=True),
    "w2 g64": Form("w2", 64, zeros=True),
    "w158": Form("w158"),
}


@dataclass(frozen=True)
class Case:
    """A matrix to multiply by: the name of its form, its outputs and its inputs."""

    form: str
    rows: int
    inputs: int

    @property
    def width(self) -> int:
        """What a row has of words, or of weights where they are not packed."""
        form = FORMS[self.form].format
        return self.inputs * BITS[form] // 32 if form in ZERO else self.inputs

    @property
    def item_bytes(self) -> int:
        """Bytes of one of `width`, in bfloat16."""
        return {"plain": 2, "fp8": 1}.get(FORMS[self.form].format, 4)

    def matrix(self, device: str, dtype: torch.dtype, *, filled: bool = True) -> Packed:
        """A random matrix; not `filled`, for compiling, it takes no memory that is ever touched."""
        form, shape = FORMS[self.form], (self.rows, self.width)
        groups = self.inputs // form.group if form.group else 1
        kept = dtype if groups > 1 else torch.float32
        scales = zeros = None
        if form.format != "plain":
            scales = torch.empty(self.rows, groups, device=device, dtype=kept)
            scales = scales.uniform_(0.01, 0.1) if filled else scales
        if form.zeros:
            zeros = torch.empty(self.rows, groups, device=device, dtype=kept)
            zeros = zeros.uniform_(0, 2 ** BITS[form.format] - 1) if filled else zeros
        if form.format in ZERO:
            data = torch.empty(shape, device=device, dtype=torch.int32)
            data = data.random_(-(2**31), 2**31 - 1) if filled else data
        elif form.format == "fp8":
            data = torch.empty(shape, device=device, dtype=torch.uint8)
            # Even bytes: the two that are NaN are odd.
            data = (data.random_(0, 256).bitwise_and_(0xFE) if filled else data).view(torch.float8_e4m3fn)
        else:
            data = torch.empty(shape, device=device, dtype=dtype)
            data = data.normal_() if filled else data
        return Packed(form.format, self.inputs, data, scales, zeros)


ROWS, WARPS, SPLITS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8)

WORDS = (16, 32, 64, 128, 256, 512, 1024, 2048)

PACKED_ROWS, PACKED_WORDS, PACKED_WARPS, STAGES = (16, 32, 64), (16, 32, 64, 128, 256), (1, 2, 4, 8), (3, 5)
"""The tensor cores take 16 rows at once; stages are steps whose words are on their way."""

SHARED = 200_000
"""Bytes of a multiprocessor's shared memory to count with, of the 227 KB of an H100."""


def tiles_by_case(
    chosen: list[Case], processors: int, count: int, splits: tuple[int, ...] = SPLITS
) -> dict[Case, list[Tile]]:
    """`count` tiles that could be the best of each case, the likeliest first, for a GPU of so many multiprocessors.

    The same ones for all cases with rows of one form and length: these share their kernels.
    """
    tried: dict[tuple[str, int], list[Tile]] = {}
    for form, inputs in dict.fromkeys((case.form, case.inputs) for case in chosen):
        alike = [case for case in chosen if (case.form, case.inputs) == (form, inputs)]
        packed = alike[0].item_bytes == 4
        choices = (
            product(PACKED_ROWS, PACKED_WORDS, PACKED_WARPS, splits, STAGES)
            if packed
            else product(ROWS, WORDS, WARPS, splits)
        )
        possible = [
            tile
            for tile in (Tile(*values) for values in choices)
            if (possible_packed if packed else possible)(alike[0], tile)
        ]
        judge = packed_penalty if packed else penalty
        # The sum, so that tiles for small and for large matrices are among them.
        ranked = sorted(possible, key=lambda tile: sum(judge(case, tile, processors) for case in alike))
        tried[form, inputs] = ranked[:count]
    return {case: tried[case.form, case.inputs] for case in chosen}


def possible(case: Case, tile: Tile) -> bool:
    """Whether a thread has between one and 32 loads of 16 bytes, and the row some work for each part."""
    thread_bytes = tile.rows * tile.words * case.item_bytes / (32 * tile.warps)
    blocks = -(-case.width // tile.words)
    fits = tile.words < 2 * case.width and tile.split <= blocks
    return fits and 16 <= thread_bytes <= 512 and -(-blocks // tile.split) <= 32


def penalty(case: Case, tile: Tile, processors: int) -> float:
    """How far a tile is from what usually is fast: an order to try them in, no prediction."""
    thread_bytes = tile.rows * tile.words * case.item_bytes / (32 * tile.warps)
    warps = -(-case.rows // tile.rows) * tile.split * tile.warps
    blocks = -(-case.width // tile.words)
    filled = case.width / (-(-blocks // tile.split) * tile.split * tile.words)
    return (
        abs(log2(thread_bytes / 96))
        # Fewer than 16 warps a multiprocessor cannot keep enough loads under way.
        + max(0.0, log2(16 * processors / warps))
        + 8 * (1 - filled)
        + 0.4 * log2(tile.split)
        # A warp reads 512 bytes of one row at once, if the row's part is as long.
        + max(0.0, log2(512 / (tile.words * case.item_bytes)))
        + 0.2 * abs(log2(tile.warps / 4))
        + 0.3 * max(0.0, log2(-(-blocks // tile.split) / 4))
    )


def key(case: Case) -> str:
    """What lbi/kernels/tiles.py looks a matrix up by."""
    form = FORMS[case.form]
    return f"{form.format} g{form.group or case.inputs} {case.rows}x{case.inputs}"


def cases(forms: list[str], shapes: list[tuple[int, int]]) -> Iterator[Case]:
    """Every form in every shape whose rows it can hold."""
    for form in forms:
        for rows, inputs in shapes:
            made = FORMS[form]
            if (
                inputs % (128 // BITS[made.format] if made.format in ZERO else 1) == 0
                and inputs % (made.group or 1) == 0
            ):
                yield Case(form, rows, inputs)


def possible_packed(case: Case, tile: Tile) -> bool:
    """Whether every warp has groups of its own in a step, the stages fit, and the row has work for each part."""
    form = FORMS[case.form]
    group = min(16, (form.group or case.inputs) * BITS[form.format] // 32)
    step = tile.rows * tile.words * 4
    fits = tile.words < 2 * case.width and tile.split <= -(-case.width // tile.words)
    weights = tile.rows * tile.words * 32 // BITS[form.format] / (32 * tile.warps)
    return fits and tile.words // group >= tile.warps and step * tile.stages <= SHARED and 32 <= weights <= 1024


def packed_penalty(case: Case, tile: Tile, processors: int) -> float:
    """As `penalty`: mostly whether enough bytes are under way on every multiprocessor."""
    step = tile.rows * tile.words * 4
    programs = -(-case.rows // tile.rows) * tile.split / processors
    resident = min(max(programs, 0.5), SHARED / (step * tile.stages), 64 / tile.warps)
    blocks = -(-case.width // tile.words)
    under_way = resident * min(tile.stages - 1, -(-blocks // tile.split)) * step
    filled = case.width / (-(-blocks // tile.split) * tile.split * tile.words)
    return (
        max(0.0, log2(64_000 / under_way))
        + max(0.0, log2(12 / (resident * tile.warps)))
        + 8 * (1 - filled)
        + 0.4 * log2(tile.split)
        + 0.3 * abs(log2(tile.rows / 32))
        + 0.2 * abs(log2(tile.warps / 4))
        + 0.2 * abs(log2(tile.words / 128))
    )
