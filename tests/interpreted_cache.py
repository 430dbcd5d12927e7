"""The kernels of lbi/kernels/cache_gpu.py in Triton's interpreter against torch; run by test_caches.py."""

from __future__ import annotations

import os
import secrets

os.environ["TRITON_INTERPRET"] = "1"

import torch

from lbi.kernels import cache_gpu
from lbi.kernels.cache_formats import FORMATS, CacheFormat, Rows
from lbi.kernels.cache_ops import attend_in_torch
from lbi.kernels.decode_torch import rotate

SLOTS = 70


def check(kind: CacheFormat, heads: int, kv_heads: int) -> None:
    """Tokens put into both caches, and attention at lengths on both sides of the kernel's blocks."""
    key_rows, value_rows = (kind.allocate(kv_heads, SLOTS, "cpu") for _ in range(2))
    wanted_keys, wanted_values = (kind.allocate(kv_heads, SLOTS, "cpu") for _ in range(2))
    cos, sin = torch.randn(SLOTS + 1, kind.width // 2), torch.randn(SLOTS + 1, kind.width // 2)
    tokens = torch.randn(SLOTS, 2, kv_heads, kind.width) * 3
    for rows, new in ((key_rows, 0), (value_rows, 1)):
        made = kind.store(tokens[:, new].transpose(0, 1))
        rows.codes[:], rows.numbers[:] = made.codes, made.numbers
    for rows, made in ((wanted_keys, key_rows), (wanted_values, value_rows)):
        rows.codes[:], rows.numbers[:] = made.codes, made.numbers
    for at in (0, 3, 4, 5, SLOTS - 1):
        key, value = torch.randn(2, kv_heads, kind.width) * (at != 4)
        position = torch.tensor([at], dtype=torch.int32)
        angles = (cos, sin) if at % 2 else None
        queries, made = torch.randn(heads, kind.width), room(kind, heads, kv_heads)
        args = (queries, key_rows, value_rows, position, 1, kind, 0.2)
        cache_gpu.attend(*args, *made, new=(key, value), angles=angles)
        asked = rotate(queries, cos[at], sin[at]) if angles else queries
        theirs = attended(asked, key_rows, value_rows, at + 1, kind)
        error = (made[0] - theirs).norm() / theirs.norm()
        if not error < 1e-4:
            raise SystemExit(f"{kind}: attention with token {at} put into it is {error:.1e} off")
        turned = rotate(key, cos[at], sin[at]) if at % 2 else key
        for rows, new in ((wanted_keys, turned), (wanted_values, value)):
            made = kind.store(new)
            rows.codes[:, at], rows.numbers[:, at] = made.codes, made.numbers
    for found, wanted in ((key_rows, wanted_keys), (value_rows, wanted_values)):
        # Rounding of rotated keys may turn a code at the edge; of what is not rotated, nothing may differ.
        error = (kind.read(found) - kind.read(wanted)).norm() / kind.read(wanted).norm()
        same = (found.codes == wanted.codes).float().mean()
        if not (error < 2e-3 and same > 0.999):
            raise SystemExit(f"{kind}: stored {error:.1e} off, {same:.4%} of codes equal")
    if not torch.equal(value_rows.codes, wanted_values.codes):
        raise SystemExit(f"{kind}: values are stored otherwise")
    for now in (0, 5, 31, 32, 33, SLOTS - 1):
        queries, found = torch.randn(heads, kind.width), room(kind, heads, kv_heads)
        position, angles = torch.tensor([now], dtype=torch.int32), (cos, sin) if now % 2 else None
        cache_gpu.attend(queries, wanted_keys, wanted_values, position, 1, kind, 0.2, *found, angles=angles)
        turned = rotate(queries, cos[now], sin[now]) if angles else queries
        theirs = attended(turned, wanted_keys, wanted_values, now + 1, kind)
        error = (found[0] - theirs).norm() / theirs.norm()
        if not error < 1e-4:
            raise SystemExit(f"{kind}: attention over {now + 1} is {error:.1e} off")


def room(kind: CacheFormat, heads: int, kv_heads: int) -> tuple[torch.Tensor, cache_gpu.Scratch, int]:
    """Where attention's result goes, what its programs leave for one another, and how many share a head."""
    scratch = cache_gpu.scratch(torch.device("cpu"), heads, kv_heads, kind.width, 3, cache_gpu.cut_for(kind, SLOTS))
    return torch.empty(heads, kind.width), scratch, 3


def attended(queries: torch.Tensor, keys: Rows, values: Rows, live: int, kind: CacheFormat) -> torch.Tensor:
    held = (*keys.tensors, *values.tensors)
    return attend_in_torch(queries[:, None], *held, torch.tensor(live), kind.name, kind.group, 0.2, 0)[:, 0]


def main() -> None:
    """Fresh random inputs every time."""
    torch.manual_seed(int(os.environ.get("LBI_TEST_SEED", secrets.randbelow(10**6))))
    for name in FORMATS:
        check(CacheFormat(name, 64, 64), heads=6, kv_heads=2)
        check(CacheFormat(name, 64, 16), heads=4, kv_heads=1)
        check(CacheFormat(name, 80, 20), heads=4, kv_heads=1)
    print(f"{3 * len(FORMATS)} formats")


if __name__ == "__main__":
    main()
