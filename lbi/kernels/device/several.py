"""The kernels of a pass of several tokens, up to 16, behind a cache: what lies between its products.

A verification of drafts is such a pass. Between two products torch has some eight operations, so that
a small model spends its time on launching them: here they are one, or two for attention. Unlike
the kernels of a single token they do not overlap.
"""

import triton
import triton.language as tl

from lbi.kernels.device.splits import LEAST


@triton.jit
def add_norm(stream, delta, gain, out, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """stream += delta, if there is one; out = its RMSNorm. `stream` is (T, K) float32; a program has a row."""
    row, k = tl.program_id(0) * K, tl.arange(0, BLOCK)
    value = tl.load(stream + row + k, mask=k < K, other=0.0)
    if delta is not None:
        value += tl.load(delta + row + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(stream + row + k, value, mask=k < K)
    root = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / K + eps)
    weighted = value * root * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row + k, weighted.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def swiglu(gate_up, out, N, BLOCK: tl.constexpr):
    """out = silu(gate) * up, (T, N) from (T, 2 N), in which gate and up lie in turn. A program has BLOCK of a row."""
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + tl.program_id(0) * (2 * N) + 2 * n
    gate = tl.load(at, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(at + 1, mask=n < N, other=0.0).to(tl.float32)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + tl.program_id(0) * N + n, made.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def rotate_and_put(
    qkv, cos_table, sin_table, keys, values, position, queries, slots, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Queries and keys are turned to their positions, keys and values put into the cache, queries times `scale`.

    Programs: (T, HEADS + 2 KV), a head of a token each. `qkv` is (T, (HEADS + 2 KV) * D), its first token at
    `position`; `queries` (T, HEADS, D); the cache (KV, slots, D) each.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BH)
    inside = d < HALF
    now = tl.load(position) + token
    at = qkv + (token * (HEADS + 2 * KV) + head) * D + d
    one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV:
        cos = tl.load(cos_table + now * HALF + d, mask=inside, other=0.0)
        sin = tl.load(sin_table + now * HALF + d, mask=inside, other=0.0)
        one, two = one * cos - two * sin, two * cos + one * sin
    if head < HEADS:
        to = queries + (token * HEADS + head) * D + d
        tl.store(to, (one * scale).to(queries.dtype.element_ty), mask=inside)
        tl.store(to + HALF, (two * scale).to(queries.dtype.element_ty), mask=inside)
    else:
        kv = (head - HEADS) % KV
        held = keys if head < HEADS + KV else values
        to = held + (kv.to(tl.int64) * slots + now) * D + d
        there = inside & (now + 0 * d < slots)
        tl.store(to, one.to(keys.dtype.element_ty), mask=there)
        tl.store(to + HALF, two.to(keys.dtype.element_ty), mask=there)


@triton.jit
def attention(
    queries, keys, values, position, out, partial, slots,
    T: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention of T tokens, the first at `position`, over the cache, which has them; each sees what is not behind it.

    Programs: (KV, SPLITS). All query heads of a key-value head and all tokens are rows of one tile, so keys and
    values are read once, as far as the text has come. `queries` and `out` are (T, HEADS, D); `partial` is
    (T * HEADS, SPLITS, BD + 2) float32: what a split leaves for `merge`. With one split there is nothing to merge.
    """
    kv, split = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV
    ROWS: tl.constexpr = T * GROUP
    r, d = tl.arange(0, BR), tl.arange(0, BD)
    token = r // GROUP
    head = token * HEADS + kv * GROUP + r % GROUP
    now = tl.load(position).to(tl.int32)
    share = tl.cdiv(tl.cdiv(now + T, SPLITS), BT) * BT
    first = split * share
    end = tl.minimum(tl.minimum(first + share, now + T), slots)
    base = kv.to(tl.int64) * slots * D
    asked = (r < ROWS)[:, None] & (d < D)[None, :]
    query = tl.load(queries + head[:, None] * D + d[None, :], mask=asked, other=0.0)
    most = tl.full((BR,), LEAST, tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for start in range(first, end, BT):
        t = start + tl.arange(0, BT)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = base + t[:, None] * D + d[None, :]
        key = tl.load(keys + at, mask=inside, other=0.0)
        value = tl.load(values + at, mask=inside, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        seen = (t < end)[None, :] & (t[None, :] <= (now + token)[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        most = higher
    if SPLITS == 1:
        made = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + head[:, None] * D + d[None, :], made, mask=asked)
    else:
        mine = partial + (head * SPLITS + split) * (BD + 2)
        tl.store(mine[:, None] + d[None, :], acc, mask=(r < ROWS)[:, None])
        tl.store(mine + BD, most, mask=r < ROWS)
        tl.store(mine + BD + 1, total, mask=r < ROWS)


@triton.jit
def merge(partial, out, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr):
    """Puts what the splits of a head of a token have left together; a program for each."""
    row, s, d = tl.program_id(0), tl.arange(0, BS), tl.arange(0, BD)
    part = partial + (row * SPLITS + s) * (BD + 2)
    most = tl.load(part + BD, mask=s < SPLITS, other=LEAST)
    # A split of which the token sees nothing has LEAST, and so a weight of 0.
    weight = tl.exp(most - tl.max(most, axis=0))
    total = tl.sum(weight * tl.load(part + BD + 1, mask=s < SPLITS, other=0.0), axis=0)
    sums = tl.load(part[:, None] + d[None, :], mask=(s < SPLITS)[:, None] & (d < D)[None, :], other=0.0)
    made = tl.sum(sums * weight[:, None], axis=0) / total
    tl.store(out + row * D + d, made.to(out.dtype.element_ty), mask=d < D)
