"""Which tile a GEMV takes: looked up by GPU, format and shape, never timed while a model runs.

`tiles.json` holds what `benchmarks/gemv.py --tune` found on a GPU. For a GPU or a shape that is
not in it there is a rule of thumb, and `is_tuned` says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lbi.kernels.formats import ZERO, Packed

FILE = Path(__file__).parent / "tiles.json"


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` of the matrix a program has, `words` of each that it reads at once (elements, if they are not
    packed), `warps` of a program, `split`: programs that share the rows' length and leave partial sums,
    `stages`: steps whose words are on their way at once (packed weights only)."""

    rows: int
    words: int
    warps: int
    split: int = 1
    stages: int = 4


def tile_for(matrix: Packed) -> Tile:
    """The tile for a matrix on its GPU."""
    known = _known(_gpu(matrix.data)).get(f"{matrix.format} g{matrix.group_size} {matrix.rows}x{matrix.inputs}")
    return known or _rule_of_thumb(matrix)


def is_tuned(matrix: Packed) -> bool:
    """Whether the tile was measured on this GPU, for this shape."""
    key = f"{matrix.format} g{matrix.group_size} {matrix.rows}x{matrix.inputs}"
    return key in _known(_gpu(matrix.data))


def _rule_of_thumb(matrix: Packed) -> Tile:
    """Some 16 KB a program, of as few rows as that takes: small matrices then still reach every multiprocessor."""
    width = matrix.data.shape[1]
    if not matrix.data.is_cuda:
        # Triton's interpreter takes a millisecond a program, whatever there is in it.
        return Tile(64, max(16, min(2048, 1 << (width - 1).bit_length())), 4)
    if matrix.format in ZERO:
        # A multiple of 16 rows and 16 words, as the tensor cores take them.
        return Tile(16 if matrix.rows <= 8192 else 32, most_words(matrix.data), 4)
    words = min(2048, 1 << (width - 1).bit_length())
    return Tile(2 if matrix.format == "plain" else 4, max(words, 16), 4)


def most_words(tensor: torch.Tensor, item: int = 2) -> int:
    """Words of a row in a step, such that the stages fit the shared memory; `item`: bytes of an input."""
    properties = torch.cuda.get_device_properties(tensor.device) if tensor.is_cuda else None
    # 99 KB on sm_86 and sm_89, 163 KB or more on GPUs for servers.
    small = properties is not None and properties.shared_memory_per_block_optin < 150_000
    return 32 if item > 2 else 64 if small else 128


def _gpu(tensor: torch.Tensor) -> str:
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else "cpu"


@cache
def _known(gpu: str) -> dict[str, Tile]:
    if not FILE.exists():
        return {}
    return {key: Tile(**value) for key, value in json.loads(FILE.read_text()).get(gpu, {}).items()}
