"""Launches of device/cache_attention.py: a low-bit cache on a GPU, for one token.

cache_ops.py has the same in torch, for a CPU and as what these are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lbi.kernels.cache_formats import FORMATS, CacheFormat, Rows
from lbi.kernels.device import cache_attention as device


@dataclass(frozen=True, slots=True)
class Cut:
    """How attention is cut into programs: the `slots` that one attends to at once, the `stages` of loads that are
    under way, `waves`: programs for each multiprocessor, and the `warps` of one."""

    slots: int
    stages: int
    waves: int
    warps: int = 4


LONG_FROM = 2048
"""Slots from which a cache is long: more programs are then worth the parts that they leave."""

SHORT = {None: Cut(32, 3, 1)} | dict.fromkeys(FORMATS, Cut(64, 3, 1))

LONG = {None: Cut(64, 3, 2), "int8": Cut(128, 2, 2), "fp8": Cut(128, 2, 2), "int4": Cut(64, 3, 2)}
"""By `benchmarks/attention.py --try`; docs/log.md has the figures."""

LONG_ONE_SCALE = {**LONG, "int4": Cut(128, 3, 2)}
"""Where a head's values have one scale: groups have their scales unpacked beside the codes, and take registers."""

KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def attend(
    queries: torch.Tensor,
    keys: Rows,
    values: Rows,
    position: torch.Tensor,
    offset: int,
    kind: CacheFormat,
    scale: float,
    out: torch.Tensor,
    scratch: Scratch,
    splits: int,
    *,
    cut: Cut | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    launch: dict[str, Any] | None = None,
) -> None:
    """Attention of one token, `queries` and `out` (heads, width), over all `position + offset` slots.

    With `new`, its keys and values, (heads, width) each, it is put into the slot `position` first, rounded to the type
    of `out`, its keys turned like the queries by `angles`, cosines and sines (positions, width / 2).
    """
    heads, (kv_heads, slots, _) = queries.numel() // kind.width, keys.codes.shape
    cos, sin = angles or (None, None)
    new_keys, new_values = new or (None, None)
    share, cut = heads // kv_heads, cut or cut_for(kind, slots)
    launch = launch or {"PDL": False}
    device.attention[(kv_heads, splits)](
        queries, new_keys, new_values, cos, sin, *keys.tensors, *values.tensors, position, out, *scratch,
        slots, scale, offset, HEADS=heads, KV=kv_heads, D=kind.width, R=max(16, triton.next_power_of_2(share)),
        S=cut.warps, T=cut.slots // cut.warps, G=kind.group, FMT=FORMATS.index(kind.name), ROUND=KINDS[out.dtype],
        ROTATE=angles is not None, SPLITS=splits, HARD=_converts_fp8(),
        num_warps=cut.warps, num_stages=cut.stages, **launch,
    )  # fmt: skip


Scratch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What slices leave for their program, what programs leave for one another, and how many of them have."""


def scratch(where: torch.device, heads: int, kv_heads: int, width: int, splits: int, cut: Cut) -> Scratch:
    """Room for one attention over a low-bit cache after the other."""
    size = scratch_size(width, heads, splits)
    return (
        torch.empty(size * cut.warps, device=where),
        torch.empty(size, device=where),
        torch.zeros(kv_heads, device=where, dtype=torch.int32),
    )


def scratch_size(width: int, heads: int, splits: int) -> int:
    """float32 values that the splits of all heads leave for one another."""
    return heads * splits * (_power(width) + 2)


def cut_for(kind: CacheFormat | None, slots: int) -> Cut:
    """The cut for a cache of that format, None being 16 bits, with so many slots."""
    name = kind.name if kind else None
    if slots < LONG_FROM:
        return SHORT[name]
    return (LONG_ONE_SCALE if kind and kind.group == kind.width else LONG)[name]


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
