"""Launches of device/cache.py and device/cache_attention.py: a low-bit cache on a GPU, for one token.

cache_ops.py has the same in torch, for a CPU and as what these are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lbi.kernels.cache_formats import FORMATS, CacheFormat, Rows
from lbi.kernels.device import cache as device
from lbi.kernels.device import cache_attention as attention_device

SLICES = 4
"""Slices of a program over a low-bit cache: a warp each."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How attention is cut into programs: the `slots` that one attends to at once, the `stages` of loads that are
    under way, and `waves`, programs for each multiprocessor."""

    slots: int
    stages: int
    waves: int


LONG_FROM = 2048
"""Slots from which a cache is long: more programs are then worth the parts that they leave."""

SHORT = {None: Cut(32, 3, 1)} | dict.fromkeys(FORMATS, Cut(64, 3, 1))

LONG = {None: Cut(64, 3, 2), "int8": Cut(64, 3, 3), "fp8": Cut(64, 3, 3), "int4": Cut(64, 3, 2)}
"""By `benchmarks/attention.py --try`; docs/log.md has the figures."""

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
    cut: Cut | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    launch: dict[str, Any] | None = None,
) -> None:
    """Attention of one token, `queries` and `out` (heads, width), over all `position + offset` slots."""
    heads, (kv_heads, slots, _) = queries.numel() // kind.width, keys.codes.shape
    cos, sin = angles or (None, None)
    share, cut = heads // kv_heads, cut or cut_for(kind.name, slots)
    launch = launch or {"num_warps": SLICES, "PDL": False}
    attention_device.attention[(kv_heads, splits)](
        queries, cos, sin, *keys.tensors, *values.tensors, position, out, *scratch, slots, scale, offset,
        HEADS=heads, KV=kv_heads, D=kind.width, R=max(16, triton.next_power_of_2(share)), S=SLICES,
        T=cut.slots // SLICES,
        G=kind.group, FMT=FORMATS.index(kind.name), ROTATE=angles is not None, SPLITS=splits,
        AT_ONCE=at_once(splits, share, kind.width), HARD=_converts_fp8(), num_stages=cut.stages, **launch,
    )  # fmt: skip


def scratch_size(width: int, heads: int, splits: int) -> int:
    """float32 values that the splits of all heads leave for one another."""
    return heads * splits * (_power(width) + 2)


def cut_for(name: str | None, slots: int) -> Cut:
    """The cut for a cache of that format, None being 16 bits, with so many slots."""
    return (LONG if slots >= LONG_FROM else SHORT)[name]


def at_once(splits: int, share: int, width: int) -> int:
    """Splits whose parts are added up at once, for `share` query heads a key-value head."""
    return max(1, min(_power(splits), MERGED // _power(share) // _power(width)))


def splits_for(where: torch.device, kv_heads: int, slots: int, cut: Cut) -> int:
    """Programs a key-value head: as many as fill the GPU so many times, none of which has less than a block."""
    if where.type != "cuda":
        return 3
    multiprocessors = int(torch.cuda.get_device_properties(where).multi_processor_count)
    return max(1, min(cut.waves * multiprocessors // kv_heads, -(-slots // cut.slots)))


def _converts_fp8() -> bool:
    """Whether the GPU that is compiled for turns e4m3 into other types by itself."""
    if triton.knobs.runtime.interpret:
        return False
    return int(triton.runtime.driver.active.get_current_target().arch) >= 89


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
