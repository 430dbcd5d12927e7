"""The kernels of one decode step of a Llama, five a layer: what lies between two products is done by them.

An RMSNorm needs the sum over a whole row, which no program of a product has. So whoever writes
the residual stream writes three things: the stream itself (float32), the stream times the next
norm's gain (the next product's inputs), and the sum of squares of its own rows. The next product
multiplies by the gained stream at once and divides by the root at the end.

With PDL (programmatic dependent launch, sm_90) a kernel starts while its predecessor ends, loads
its first weights, and waits before it touches what the predecessor wrote.
"""

import triton
import triton.language as tl

from lbi.kernels.device.gemv import row_products
from lbi.kernels.device.splits import LEAST, merge_if_last


@triton.jit
def _inverse_root(squares, PARTS: tl.constexpr, K: tl.constexpr, eps):
    """1 / sqrt(mean of squares + eps), from the partial sums of squares of a stream of K values."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    total = tl.sum(tl.load(squares + part, mask=part < PARTS, other=0.0), axis=0)
    return 1.0 / tl.sqrt(total / K + eps)


@triton.jit
def norm_product(
    x, squares, data, scales, zeros, out, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = W norm(stream), float32: q, k and v."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = row_products(x, data, scales, zeros, n, N, 0, K, BITS, GROUP, Z, BN, BW, STEPS, EVEN, PDL)
    tl.store(out + n, found * _inverse_root(squares, PARTS, K, eps), mask=n < N)


@triton.jit
def norm_product_swiglu(
    x, squares, data, scales, zeros, out, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = silu(gate) * up of norm(stream), in the inputs' type; rows of gate and up lie in turn."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = row_products(x, data, scales, zeros, n, N, 0, K, BITS, GROUP, Z, BN, BW, STEPS, EVEN, PDL)
    found = found * _inverse_root(squares, PARTS, K, eps)
    gate, up = tl.split(tl.reshape(found, (BN // 2, 2)))
    half = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + half, made.to(out.dtype.element_ty), mask=half < N // 2)


@triton.jit
def product_add(
    x, data, scales, zeros, stream, gain, gained, squares, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """stream += W x, and what the next norm needs of it."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = row_products(x, data, scales, zeros, n, N, 0, K, BITS, GROUP, Z, BN, BW, STEPS, EVEN, PDL)
    found += tl.load(stream + n, mask=n < N, other=0.0)
    found = tl.where(n < N, found, 0.0)
    tl.store(stream + n, found, mask=n < N)
    weighted = found * tl.load(gain + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(gained + n, weighted.to(gained.dtype.element_ty), mask=n < N)
    tl.store(squares + tl.program_id(0), tl.sum(found * found, axis=0))


@triton.jit
def head(
    x, squares, data, scales, zeros, logits, best, where, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The logits, float32, and of each program's rows the largest and where it is."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = row_products(x, data, scales, zeros, n, N, 0, K, BITS, GROUP, Z, BN, BW, STEPS, EVEN, PDL)
    found = found * _inverse_root(squares, PARTS, K, eps)
    tl.store(logits + n, found, mask=n < N)
    found = tl.where(n < N, found, float("-inf"))
    largest = tl.max(found, axis=0)
    # The first of equal ones, as torch.argmax has it.
    tl.store(best + tl.program_id(0), largest)
    tl.store(where + tl.program_id(0), tl.min(tl.where(found == largest, n, N), axis=0))


@triton.jit
def next_token(
    best, where, tokens, position, N,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The likeliest token goes behind the last one, and the position moves on. One program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    index = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in tl.static_range(0, PARTS, BLOCK):
        inside = start + part < PARTS
        value = tl.load(best + start + part, mask=inside, other=float("-inf"))
        place = tl.load(where + start + part, mask=inside, other=2147483647)
        better = (value > largest) | ((value == largest) & (place < index))
        largest, index = tl.where(better, value, largest), tl.where(better, place, index)
    top = tl.max(largest, axis=0)
    token = tl.min(tl.where(largest == top, index, 2147483647), axis=0)
    now = tl.load(position) + 1
    tl.store(tokens + now, token.to(tl.int64))
    tl.debug_barrier()
    tl.store(position, now)


@triton.jit
def embed(
    tokens, position, table, row_scales, gain, stream, gained, squares,
    K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The stream starts as the embedding of the token at the position. A program has BLOCK values of it."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.load(tokens + tl.load(position))
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    if row_scales is not None:
        value *= tl.load(row_scales + token).to(tl.float32)
    tl.store(stream + k, value, mask=k < K)
    weighted = value * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(gained + k, weighted.to(gained.dtype.element_ty), mask=k < K)
    tl.store(squares + tl.program_id(0), tl.sum(value * value, axis=0))


@triton.jit
def _rotated(values, cos, sin, head, G: tl.constexpr, HALF: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr):
    """Both halves, (BG, BH) float32, of `G` heads from `head` on, turned by the position's angles."""
    g, d = tl.arange(0, BG), tl.arange(0, BH)
    inside = (g[:, None] < G) & (d[None, :] < HALF)
    where = values + (head + g[:, None]) * (2 * HALF) + d[None, :]
    one = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(where + HALF, mask=inside, other=0.0).to(tl.float32)
    return one * cos[None, :] - two * sin[None, :], two * cos[None, :] + one * sin[None, :]


@triton.jit
def _past(keys, values, base, t, end, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """Both halves of the keys, (BT, BH) each, and the values, (BT, BD), of slots `t`; 0 from `end` on."""
    HALF: tl.constexpr = D // 2
    h, d = tl.arange(0, BH), tl.arange(0, BD)
    at = keys + base + t[:, None] * D
    inside = (t[:, None] < end) & (h[None, :] < HALF)
    k1 = tl.load(at + h[None, :], mask=inside, other=0.0)
    k2 = tl.load(at + HALF + h[None, :], mask=inside, other=0.0)
    v = tl.load(values + base + t[:, None] * D + d[None, :], mask=(t[:, None] < end) & (d[None, :] < D), other=0.0)
    return k1, k2, v


@triton.jit
def attention(
    qkv, cos_table, sin_table, keys, values, position, out, partial, arrived, slots, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    BG: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one token over what the cache holds of its past, and itself; it is put into the cache.

    Programs: (key-value heads, SPLITS). All query heads of a key-value head are one tile, so keys and
    values are read once. The splits share the live length, not the cache's; the last to arrive adds up
    what all have left in `partial`, in their order. `qkv` is float32; `keys`
    and `values` are (KV, slots, D); `partial` is (KV, SPLITS, HEADS / KV, BD + 2) float32; `arrived`
    (KV,) int32 of zeros.

    Only `qkv` comes from the kernel before this one. The position and the past were there when this
    step's first kernel began, for that one waits for the end of the step before (`next_token` lets
    nothing begin early): so they are read before the wait.
    """
    kv, split = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV
    HALF: tl.constexpr = D // 2
    g, h, d = tl.arange(0, BG), tl.arange(0, BH), tl.arange(0, BD)
    kind = keys.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = tl.load(position, cache_modifier=".cg")
    share = tl.cdiv(tl.cdiv(now + 1, SPLITS), BT) * BT
    first = split * share
    end = tl.minimum(first + share, now)
    base = kv.to(tl.int64) * slots * D
    k1, k2, v = _past(keys, values, base, first + tl.arange(0, BT), end, D, BD, BH)
    cos = tl.load(cos_table + now * HALF + h, mask=h < HALF, other=0.0)
    sin = tl.load(sin_table + now * HALF + h, mask=h < HALF, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    q1, q2 = _rotated(qkv, cos, sin, kv * GROUP, GROUP, HALF, BG, BH)
    q1, q2 = (q1 * scale).to(kind), (q2 * scale).to(kind)

    most = tl.full((BG,), LEAST, tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    for start in range(first, end, BT):
        t = start + tl.arange(0, BT)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        score = tl.where(t[None, :] < end, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(kind), v, acc * shrink[:, None], input_precision="ieee")
        most = higher
        k1, k2, v = _past(keys, values, base, t + BT, end, D, BD, BH)
    if (first <= now) & (now < first + share):
        # The token's own key and value: not in the cache yet, so they are put there and counted here.
        k_at, v_at = qkv + HEADS * D, qkv + (HEADS + KV) * D
        new1, new2 = _rotated(k_at, cos, sin, kv, 1, HALF, 1, BH)
        new1, new2 = new1.to(kind), new2.to(kind)
        new = keys + base + now * D + h[None, :]
        tl.store(new, new1, mask=h[None, :] < HALF)
        tl.store(new + HALF, new2, mask=h[None, :] < HALF)
        v_own = tl.load(v_at + kv * D + d, mask=d < D, other=0.0).to(kind)
        tl.store(values + base + now * D + d, v_own, mask=d < D)
        own = tl.sum(q1.to(tl.float32) * new1.to(tl.float32), axis=1) + tl.sum(
            q2.to(tl.float32) * new2.to(tl.float32), axis=1
        )
        higher = tl.maximum(most, own)
        shrink, weight = tl.exp(most - higher), tl.exp(own - higher)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * v_own.to(tl.float32)[None, :]
        most = higher

    to = out + kv * GROUP * D
    if SPLITS == 1:
        made = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(to + g[:, None] * D + d[None, :], made, mask=(g[:, None] < GROUP) & (d[None, :] < D))
    else:
        mine = partial + ((kv * SPLITS + split) * GROUP + g) * (BD + 2)
        tl.store(mine[:, None] + d[None, :], acc, mask=g[:, None] < GROUP)
        tl.store(mine + BD, most, mask=g < GROUP)
        tl.store(mine + BD + 1, total, mask=g < GROUP)
        merge_if_last(partial, arrived, to, kv, GROUP, D, BD, SPLITS)
