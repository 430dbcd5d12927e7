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
def attention(
    qkv, cos_table, sin_table, keys, values, position, out, partial, arrived, slots, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    BG: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one token over what the cache holds of its past, and itself; it is put into the cache.

    Programs: (key-value heads, SPLITS). All query heads of a key-value head are one tile, so keys and
    values are read once. The splits share the live length, not the cache's; the last to arrive adds up
    what all have left in `partial`, in their order. `qkv` is float32; `keys` and `values` are
    (KV, slots, D); `partial` is (KV, SPLITS, BG, BD + 2) float32; `arrived` (KV,) int32 of zeros.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv, split = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV
    HALF: tl.constexpr = D // 2
    g, h, d = tl.arange(0, BG), tl.arange(0, BH), tl.arange(0, BD)
    kind = keys.dtype.element_ty
    now = tl.load(position)
    cos = tl.load(cos_table + now * HALF + h, mask=h < HALF, other=0.0)
    sin = tl.load(sin_table + now * HALF + h, mask=h < HALF, other=0.0)
    q1, q2 = _rotated(qkv, cos, sin, kv * GROUP, GROUP, HALF, BG, BH)
    q1, q2 = (q1 * scale).to(kind), (q2 * scale).to(kind)

    share = tl.cdiv(tl.cdiv(now + 1, SPLITS), BT) * BT
    first = split * share
    end = tl.minimum(first + share, now)
    most = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    base = kv.to(tl.int64) * slots * D
    for start in range(first, end, BT):
        t = start + tl.arange(0, BT)
        past = keys + base + t[:, None] * D
        inside = (t[:, None] < end) & (h[None, :] < HALF)
        k1 = tl.load(past + h[None, :], mask=inside, other=0.0)
        k2 = tl.load(past + HALF + h[None, :], mask=inside, other=0.0)
        v = tl.load(values + base + t[:, None] * D + d[None, :], mask=(t[:, None] < end) & (d[None, :] < D), other=0.0)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        score = tl.where(t[None, :] < end, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(kind), v, acc * shrink[:, None], input_precision="ieee")
        most = higher
    if (first <= now) & (now < first + share):
        # The token's own key and value: not in the cache yet, so they are put there and counted here.
        k_at, v_at = qkv + HEADS * D, qkv + (HEADS + KV) * D
        k1, k2 = _rotated(k_at, cos, sin, kv, 1, HALF, 1, BH)
        k1, k2 = k1.to(kind), k2.to(kind)
        new = keys + base + now * D + h[None, :]
        tl.store(new, k1, mask=h[None, :] < HALF)
        tl.store(new + HALF, k2, mask=h[None, :] < HALF)
        v = tl.load(v_at + kv * D + d, mask=d < D, other=0.0).to(kind)
        tl.store(values + base + now * D + d, v, mask=d < D)
        own = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), axis=1) + tl.sum(
            q2.to(tl.float32) * k2.to(tl.float32), axis=1
        )
        higher = tl.maximum(most, own)
        shrink, weight = tl.exp(most - higher), tl.exp(own - higher)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * v.to(tl.float32)[None, :]
        most = higher

    WIDTH: tl.constexpr = BD + 2
    mine = partial + ((kv * SPLITS + split) * BG + g) * WIDTH
    tl.store(mine[:, None] + d[None, :], acc)
    tl.store(mine + BD, most)
    tl.store(mine + BD + 1, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived + kv, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived + kv, 0)
        most = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, BD), tl.float32)
        for part in range(SPLITS):
            its = partial + ((kv * SPLITS + part) * BG + g) * WIDTH
            its_most = tl.load(its + BD, cache_modifier=".cg")
            its_total = tl.load(its + BD + 1, cache_modifier=".cg")
            higher = tl.maximum(most, its_most)
            # A split without tokens has -inf, and so may all before it: exp(-inf - -inf) is no number.
            shrink = tl.where(most == float("-inf"), 0.0, tl.exp(most - higher))
            weight = tl.where(its_most == float("-inf"), 0.0, tl.exp(its_most - higher))
            total = total * shrink + its_total * weight
            theirs = tl.load(its[:, None] + d[None, :], cache_modifier=".cg")
            acc = acc * shrink[:, None] + theirs * weight[:, None]
            most = higher
        made = acc / total[:, None]
        to = out + (kv * GROUP + g[:, None]) * D + d[None, :]
        tl.store(to, made.to(out.dtype.element_ty), mask=(g[:, None] < GROUP) & (d[None, :] < D))
