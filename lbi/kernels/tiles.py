"""Which tile a GEMV takes: looked up by GPU, format and shape, never timed while a model runs.

`tiles.json` holds what was found on a GPU: by `benchmarks/gemv.py --tune` for a product alone, by
`benchmarks/fused_step.py --tune` for one among the kernels of a step. For a GPU or a shape that is
not in it there is a rule of thumb, and `is_tuned` says so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from lbi.kernels.formats import BITS, ZERO, Packed

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
    return _known(_gpu(matrix.data)).get(key(matrix)) or _rule_of_thumb(matrix)


def step_tile_for(matrix: Packed) -> Tile:
    """The tile for a matrix within a step of engine=fused, where products overlap and none is split."""
    known = _known(_gpu(matrix.data)).get(f"step {key(matrix)}")
    return known or _rule_of_thumb_in_a_step(matrix)


def key(matrix: Packed) -> str:
    """What a matrix is looked up by: its format, the size of its groups, and its shape."""
    return f"{matrix.format} g{matrix.group_size} {matrix.rows}x{matrix.inputs}"


def is_tuned(matrix: Packed) -> bool:
    """Whether the tile was measured on this GPU, for this shape."""
    return key(matrix) in _known(_gpu(matrix.data))


def keep(gpu: str, name: str, tile: Tile) -> None:
    """Put one tile into the file beside those that it has, for a benchmark that found it."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known.setdefault(gpu, {})[name] = asdict(tile)
    scratch = FILE.with_suffix(".new")
    scratch.write_text(json.dumps({of: dict(sorted(held.items())) for of, held in sorted(known.items())}, indent=1))
    scratch.replace(FILE)


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


def _rule_of_thumb_in_a_step(matrix: Packed) -> Tile:
    """As its neighbours were tuned on an H200, in five formats: short rows at once, long ones by many warps."""
    if not matrix.data.is_cuda or matrix.format not in ZERO:
        return _rule_of_thumb(matrix)
    width = matrix.data.shape[1]
    if matrix.inputs > 4096:
        return Tile(16, 128, 8, stages=3)
    if width <= 512 and matrix.rows <= 8192:
        return Tile(16, max(16, 1 << (width - 1).bit_length()), 4)
    return Tile(32 if matrix.rows > 65536 else 16, 64, 2, stages=3)


def most_words(tensor: torch.Tensor) -> int:
    """Words of a row in a step for one token, such that the stages fit the shared memory."""
    return 64 if shared_memory(tensor) < 150_000 else 128


def words_for(matrix: Packed, x: torch.Tensor, columns: int, tile: Tile) -> int:
    """Words of a row in a step of `tile` for `columns` tokens of `x`: as many as the stages have shared memory for.

    By what Triton takes: `stages` steps of words and inputs (3.6 one less than 3.9), and where the inputs are float32,
    which the tensor cores do not have, the operands of a step besides.
    """
    item, fields = x.element_size(), 32 // BITS[matrix.format]
    for words in (128, 64, 32):
        inputs = words * fields
        taken = tile.stages * (inputs * columns * item + tile.rows * words * 4)
        taken += inputs * (tile.rows + columns) * item if item > 2 else 0
        # What float32 takes in registers allows no more than 32; a margin for scales.
        if taken + 8192 <= shared_memory(x) and (item == 2 or words == 32):
            return words
    return 16


def shared_memory(tensor: torch.Tensor) -> int:
    """Bytes that a program may have on the tensor's GPU: 99 KB on sm_86 and sm_89, 163 KB or more on those for
    servers. On a CPU, where Triton's interpreter needs none, as many as sm_90 has."""
    if not tensor.is_cuda:
        return 227 << 10
    return int(torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin)


def _gpu(tensor: torch.Tensor) -> str:
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else "cpu"


@cache
def _known(gpu: str) -> dict[str, Tile]:
    if not FILE.exists():
        return {}
    return {key: Tile(**value) for key, value in json.loads(FILE.read_text()).get(gpu, {}).items()}
