"""Launches of device/cache.py: a low-bit cache on a GPU, for one token.

cache_ops.py has the same in torch, for a CPU and as what these are tested against.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lbi.kernels.cache_formats import FORMATS, CacheFormat, Rows
from lbi.kernels.device import cache as device

SHORT, LONG = 32, 64
"""Slots that a program attends to at once, in a short cache and in a long one."""

LONG_FROM = 2048
"""Slots from which a cache is long: twice the programs are then worth their parts. Of 8,192 tokens in bf16, one
layer on an H200: 37 us with 32 slots and one program a multiprocessor, 26 with 64, 21 with 64 and two."""

MERGED = 8192
"""Numbers of other programs that one adds up at once: 64 registers of each of 128 threads."""

KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def put(
    keys: tuple[torch.Tensor, Rows],
    values: tuple[torch.Tensor, Rows],
    position: torch.Tensor,
    kind: CacheFormat,
    dtype: torch.dtype,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    launch: dict[str, Any] | None = None,
) -> None:
    """Store a token's keys and values, each (heads, width) and where it goes, in the slot `position`.

    They are rounded to `dtype` first; keys are turned by `angles`, cosines and sines (positions, width / 2).
    """
    size = kind.width // 2 if kind.group == kind.width else kind.group
    heads, slots, _ = keys[1].codes.shape
    cos, sin = angles or (None, None)
    device.put[(heads, 2, kind.width // 2 // size)](
        keys[0], values[0], cos, sin, *keys[1].tensors, *values[1].tensors, position, slots,
        D=kind.width, G=kind.group, FMT=FORMATS.index(kind.name), KIND=KINDS[dtype], ROTATE=angles is not None,
        BLOCK=triton.next_power_of_2(size), **(launch or {"num_warps": 1, "PDL": False}),
    )  # fmt: skip


def attend(
    queries: torch.Tensor,
    keys: Rows,
    values: Rows,
    position: torch.Tensor,
    offset: int,
    kind: CacheFormat,
    scale: float,
    out: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    launch: dict[str, Any] | None = None,
) -> None:
    """Attention of one token, `queries` and `out` (heads, width), over all `position + offset` slots."""
    heads, (kv_heads, slots, _) = queries.numel() // kind.width, keys.codes.shape
    cos, sin = angles or (None, None)
    block, group = tile(kind, heads // kv_heads)
    device.attention[(kv_heads, splits)](
        queries, cos, sin, *keys.tensors, *values.tensors, position, out, *scratch, slots, scale, offset,
        HEADS=heads, KV=kv_heads, D=kind.width, BH=block, BG=group, BT=block_for(slots), G=kind.group,
        FMT=FORMATS.index(kind.name), ROTATE=angles is not None, SPLITS=splits,
        AT_ONCE=at_once(splits, heads // kv_heads, kind.width), HARD=_converts_fp8(),
        **(launch or {"num_warps": 4, "PDL": False}),
    )  # fmt: skip


def tile(kind: CacheFormat, share: int) -> tuple[int, int]:
    """Values of a half, and query heads of a key-value head, as blocks that tensor cores take."""
    return max(16, triton.next_power_of_2(kind.width // 2)), max(16, triton.next_power_of_2(share))


def scratch_size(width: int, heads: int, splits: int) -> int:
    """float32 values that the splits of all heads leave for one another."""
    return heads * splits * (_power(width) + 2)


def block_for(slots: int) -> int:
    """Slots that a program attends to at once."""
    return LONG if slots >= LONG_FROM else SHORT


def at_once(splits: int, share: int, width: int) -> int:
    """Splits whose parts are added up at once, for `share` query heads a key-value head."""
    return max(1, min(_power(splits), MERGED // _power(share) // _power(width)))


def splits_for(where: torch.device, kv_heads: int, slots: int) -> int:
    """Programs a key-value head: as many as fill the GPU once or twice, none of which has less than a block."""
    if where.type != "cuda":
        return 3
    multiprocessors = int(torch.cuda.get_device_properties(where).multi_processor_count)
    waves = 2 if slots >= LONG_FROM else 1
    return max(1, min(waves * multiprocessors // kv_heads, -(-slots // block_for(slots))))


def _converts_fp8() -> bool:
    """Whether the GPU that is compiled for turns e4m3 into other types by itself."""
    if triton.knobs.runtime.interpret:
        return False
    return int(triton.runtime.driver.active.get_current_target().arch) >= 89


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
