"""A low-bit cache as two torch operators: tokens put into it, and attention over what it holds.

Operators, so that torch.compile with fullgraph takes them, since how much is live is read from the
device's counter inside, and so that a profiler's trace names them. On a CPU they are cache_cpu.cpp,
or the torch form below where no compiler is; on a GPU attention of one token is device/cache.py. None
writes out the whole cache: a block of slots at a time is widened, attended to and forgotten.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

from lbi.kernels.cache_formats import FORMATS, CacheFormat, Rows
from lbi.kernels.cpu_build import NoKernel, load

SOURCE = Path(__file__).parent / "cache_cpu.cpp"

BLOCK = 1024
"""Slots that the torch form widens at a time."""

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@cache
def library() -> ctypes.CDLL:
    """The compiled file with its signatures. Raises `NoKernel`."""
    loaded = load(SOURCE)
    put_, attend_ = loaded.lbi_cache_put, loaded.lbi_cache_attend
    put_.argtypes, put_.restype = [_POINTER] * 3 + [_SIZE] * 8, None
    attend_.argtypes, attend_.restype = [_POINTER] * 6 + [_SIZE] * 9 + [_INT], None
    return loaded


@cache
def problem() -> str | None:
    """Why there is no compiled form here; None where there is."""
    try:
        library()
    except NoKernel as error:
        return str(error)
    return None


def put(rows: Rows, values: torch.Tensor, position: torch.Tensor, kind: CacheFormat) -> None:
    """Store `values` (heads, tokens, width) in the slots from `position` on, a tensor of one whole number."""
    torch.ops.lbi.cache_put(rows.codes, rows.numbers, values, position, kind.name, kind.group)


def attend(
    queries: torch.Tensor,
    keys: Rows,
    values: Rows,
    length: torch.Tensor,
    kind: CacheFormat,
    scale: float,
    offset: int = 0,
) -> torch.Tensor:
    """Attention of the last tokens over all `length + offset` that the cache holds, themselves among them.

    `queries` and the result are (heads, tokens, width), in the same type; `scale` multiplies the scores.
    """
    made: torch.Tensor = torch.ops.lbi.cache_attend(
        queries, *keys.tensors, *values.tensors, length, kind.name, kind.group, scale, offset
    )
    return made


def put_in_torch(
    codes: torch.Tensor, numbers: torch.Tensor, values: torch.Tensor, position: torch.Tensor, name: str, group: int
) -> None:
    """See `put`. Nothing in it waits for the device."""
    made = CacheFormat(name, values.shape[-1], group).store(values)
    slots = torch.arange(values.shape[1], device=values.device) + position
    codes.index_copy_(1, slots, made.codes)
    numbers.index_copy_(1, slots, made.numbers)


def attend_in_torch(
    queries: torch.Tensor,
    key_codes: torch.Tensor,
    key_numbers: torch.Tensor,
    value_codes: torch.Tensor,
    value_numbers: torch.Tensor,
    length: torch.Tensor,
    name: str,
    group: int,
    scale: float,
    offset: int,
) -> torch.Tensor:
    """See `attend`: block by block with an online softmax, any number of tokens. It waits for the device."""
    heads, count, width = queries.shape
    kind, kv_heads, live = CacheFormat(name, width, group), key_codes.shape[0], int(length) + offset
    # Queries of one key-value head are rows of one product.
    asked = (queries.float() * scale).reshape(kv_heads, -1, width)
    places = torch.arange(live - count, live, device=queries.device).repeat(heads // kv_heads)[:, None]
    most = asked.new_full((*asked.shape[:2], 1), float("-inf"))
    total, acc = torch.zeros_like(most), torch.zeros_like(asked)
    for start in range(0, live, BLOCK):
        part = slice(start, min(start + BLOCK, live))
        keys = kind.read(Rows(key_codes[:, part], key_numbers[:, part]))
        scores = asked @ keys.transpose(1, 2)
        later = torch.arange(part.start, part.stop, device=queries.device) > places
        scores = scores.masked_fill(later, float("-inf"))
        higher = torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - higher).exp(), (most - higher).exp()
        values = kind.read(Rows(value_codes[:, part], value_numbers[:, part]))
        total, acc, most = total * shrink + weights.sum(-1, keepdim=True), acc * shrink + weights @ values, higher
    return (acc / total).view(heads, count, width).to(queries.dtype)


def _put_on_cpu(
    codes: torch.Tensor, numbers: torch.Tensor, values: torch.Tensor, position: torch.Tensor, name: str, group: int
) -> None:
    if values.shape[1] > 1 or problem() is not None:
        put_in_torch(codes, numbers, values, position, name, group)
        return
    rows = values.float().contiguous()
    (heads, slots, code_bytes), at = codes.shape, int(position)
    if at >= slots:
        raise IndexError(f"slot {at} of {slots}")
    pointers = (rows.data_ptr(), codes.data_ptr(), numbers.data_ptr())
    library().lbi_cache_put(
        *pointers, heads, rows.shape[-1], slots, at, code_bytes, numbers.shape[-1], group, FORMATS.index(name)
    )


def _attend_on_cpu(
    queries: torch.Tensor,
    key_codes: torch.Tensor,
    key_numbers: torch.Tensor,
    value_codes: torch.Tensor,
    value_numbers: torch.Tensor,
    length: torch.Tensor,
    name: str,
    group: int,
    scale: float,
    offset: int,
) -> torch.Tensor:
    held = (key_codes, key_numbers, value_codes, value_numbers)
    if queries.shape[1] > 1 or problem() is not None:
        return attend_in_torch(queries, *held, length, name, group, scale, offset)
    asked = (queries.float() * scale).contiguous()
    (heads, _, width), (kv_heads, slots, code_bytes) = asked.shape, key_codes.shape
    live = int(length) + offset
    if not 0 < live <= slots:
        raise IndexError(f"{live} tokens in {slots} slots")
    made = torch.empty_like(asked)
    library().lbi_cache_attend(
        asked.data_ptr(), *(tensor.data_ptr() for tensor in held), made.data_ptr(), heads, kv_heads, width, slots,
        live, code_bytes, key_numbers.shape[-1], group, FORMATS.index(name), torch.get_num_threads(),
    )  # fmt: skip
    return made.to(queries.dtype)


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_kind: CacheFormat, value_kind: CacheFormat,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of a text's beginning to itself, (1, heads, tokens, width), through what a cache would hold of it."""
    # A CPU's kernel widens codes to float32, a GPU's to the model's type: rounding twice would be charged to the cache.
    wide = torch.float32 if query.device.type == "cpu" else query.dtype
    keys, values = key_kind.rounded(key).to(wide), value_kind.rounded(value).to(wide)
    made = F.scaled_dot_product_attention(
        query.to(wide), keys, values, is_causal=query.shape[2] > 1, scale=scale, enable_gqa=True
    )
    return made.to(query.dtype)


def _attend_on_gpu(
    queries: torch.Tensor,
    key_codes: torch.Tensor,
    key_numbers: torch.Tensor,
    value_codes: torch.Tensor,
    value_numbers: torch.Tensor,
    length: torch.Tensor,
    name: str,
    group: int,
    scale: float,
    offset: int,
) -> torch.Tensor:
    held = (key_codes, key_numbers, value_codes, value_numbers)
    (heads, count, width), kv_heads = queries.shape, key_codes.shape[0]
    kind = CacheFormat(name, width, group)
    if count > 1:
        return attend_in_torch(queries, *held, length, name, group, scale, offset)
    from lbi.kernels import cache_gpu

    cut = cache_gpu.cut_for(kind, key_codes.shape[1])
    splits = cache_gpu.splits_for(queries.device, kv_heads, key_codes.shape[1], cut)
    scratch = cache_gpu.scratch(queries.device, heads, kv_heads, width, splits, cut)
    asked, made = queries.contiguous(), torch.empty_like(queries)
    cache_gpu.attend(
        asked, Rows(*held[:2]), Rows(*held[2:]), length, offset, kind, scale, made, scratch, splits
    )  # fmt: skip
    return made


def _define() -> None:
    torch.library.define(
        "lbi::cache_put",
        "(Tensor(a!) codes, Tensor(b!) numbers, Tensor values, Tensor position, str name, int group) -> ()",
    )
    torch.library.define(
        "lbi::cache_attend",
        "(Tensor queries, Tensor key_codes, Tensor key_numbers, Tensor value_codes, Tensor value_numbers, "
        "Tensor length, str name, int group, float scale, int offset) -> Tensor",
    )
    torch.library.impl("lbi::cache_put", "CPU", _put_on_cpu)
    torch.library.impl("lbi::cache_put", "CUDA", put_in_torch)
    torch.library.impl("lbi::cache_attend", "CPU", _attend_on_cpu)
    torch.library.impl("lbi::cache_attend", "CUDA", _attend_on_gpu)
    torch.library.register_fake("lbi::cache_put", lambda *args: None)
    torch.library.register_fake("lbi::cache_attend", lambda queries, *args: torch.empty_like(queries))


_define()
