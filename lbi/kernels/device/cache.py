"""A low-bit cache on a GPU: a token's keys and values put into it, and one token's attention over it.

The layout is that of lbi/kernels/cache_formats.py. Everything is done on two halves of a head, the first
and the last D / 2 values: rope turns one into the other, and a byte of 4-bit codes has a value of each.
Attention has the structure of device/decode.py: the splits of a key-value head share the live length, and
the last to arrive adds up. FMT is 0 for int8, 1 for fp8 (e4m3), 2 for int4.
"""

import triton
import triton.language as tl

from lbi.kernels.device.splits import merge_if_last


@triton.jit
def _nearest(x):
    """To the nearest whole number, ties to even, below 2^22: what does not fit beside 1.5 * 2^23 is rounded off."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_fp8(x):
    """Codes (int32) of values within 448, rounded to the nearest, ties to even."""
    word = x.to(tl.int32, bitcast=True)
    size = word & 0x7FFFFFFF
    turned = size + 0x7FFFF + ((size >> 20) & 1)
    normal = (turned >> 20) - 960
    small = _nearest(tl.abs(x) * 512.0).to(tl.int32)
    return tl.where(tl.abs(x) < 0.015625, small, normal) | ((word >> 24) & 0x80)


@triton.jit
def _widened(codes, FMT: tl.constexpr):
    """float32 of codes (int32), without scales."""
    if FMT == 0:
        made = ((codes << 24) >> 24).to(tl.float32)
    elif FMT == 1:
        word = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
        # Twice 2^60 mends the exponent's bias, of subnormals too.
        made = word.to(tl.float32, bitcast=True) * 1.152921504606847e18 * 1.152921504606847e18
    else:
        made = codes.to(tl.float32)
    return made


@triton.jit
def _narrowed(x):
    """float32 of what bfloat16 has, to the nearest, ties to even: Triton's interpreter cuts off instead."""
    word = x.to(tl.int32, bitcast=True)
    return ((word + 0x7FFF + ((word >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _scale_of(size, FMT: tl.constexpr):
    """bfloat16 scale of a group, as float32: `size` is its largest value, for int4 its range."""
    most: tl.constexpr = 127.0 if FMT == 0 else (448.0 if FMT == 1 else 15.0)
    return _narrowed(size / most)


@triton.jit
def _codes_of(x, scale, low, FMT: tl.constexpr):
    scaled = tl.where(scale == 0.0, 0.0, (x - low) / tl.where(scale == 0.0, 1.0, scale))
    if FMT == 0:
        made = _nearest(tl.minimum(tl.maximum(scaled, -127.0), 127.0)).to(tl.int32)
    elif FMT == 1:
        made = _to_fp8(tl.minimum(tl.maximum(scaled, -448.0), 448.0))
    else:
        made = tl.minimum(tl.maximum(_nearest(scaled), 0.0), 15.0).to(tl.int32)
    return made


@triton.jit
def put(
    new_keys, new_values, cos_table, sin_table, key_codes, key_numbers, value_codes, value_numbers, position, slots,
    D: tl.constexpr, G: tl.constexpr, FMT: tl.constexpr, KIND: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token into its slot. Programs: (heads, keys and values, pairs of groups, one of each half).

    Groups of a whole head are one pair that shares a scale. `KIND` is the type that values are rounded to first.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, which, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = D // 2
    WHOLE: tl.constexpr = G == D
    SIZE: tl.constexpr = HALF if WHOLE else G
    GROUPS: tl.constexpr = D // G
    now = tl.load(position)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    h = pair * SIZE + i
    source = new_keys if which == 0 else new_values
    codes = key_codes if which == 0 else value_codes
    numbers = key_numbers if which == 0 else value_numbers
    one = tl.load(source + head * D + h, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + head * D + HALF + h, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:  # noqa: SIM102 (without angles the inner part must not be compiled)
        if which == 0:
            cos = tl.load(cos_table + now * HALF + h, mask=inside, other=0.0)
            sin = tl.load(sin_table + now * HALF + h, mask=inside, other=0.0)
            one, two = one * cos - two * sin, two * cos + one * sin
    one, two = one.to(KIND).to(tl.float32), two.to(KIND).to(tl.float32)
    row = head.to(tl.int64) * slots + now
    if FMT == 2:
        low1 = tl.min(tl.where(inside, one, float("inf")), axis=0)
        low2 = tl.min(tl.where(inside, two, float("inf")), axis=0)
        high1 = tl.max(tl.where(inside, one, float("-inf")), axis=0)
        high2 = tl.max(tl.where(inside, two, float("-inf")), axis=0)
        if WHOLE:
            low1, high1 = tl.minimum(low1, low2), tl.maximum(high1, high2)
            low2, high2 = low1, high1
        low1, low2 = _narrowed(low1), _narrowed(low2)
        size1, size2 = tl.maximum(high1 - low1, 0.0), tl.maximum(high2 - low2, 0.0)
    else:
        low1, low2 = 0.0, 0.0
        size1 = tl.max(tl.where(inside, tl.abs(one), 0.0), axis=0)
        size2 = tl.max(tl.where(inside, tl.abs(two), 0.0), axis=0)
        if WHOLE:
            size1 = tl.maximum(size1, size2)
            size2 = size1
    scale1, scale2 = _scale_of(size1, FMT), _scale_of(size2, FMT)
    code1, code2 = _codes_of(one, scale1, low1, FMT), _codes_of(two, scale2, low2, FMT)
    NUMBERS: tl.constexpr = GROUPS * 2 if FMT == 2 else GROUPS
    first = numbers + row * NUMBERS + pair
    second = first if WHOLE else first + GROUPS // 2
    tl.store(first, scale1.to(tl.bfloat16))
    tl.store(second, scale2.to(tl.bfloat16))
    if FMT == 2:
        tl.store(first + GROUPS, low1.to(tl.bfloat16))
        tl.store(second + GROUPS, low2.to(tl.bfloat16))
        tl.store(codes + row * HALF + h, (code1 | (code2 << 4)).to(tl.uint8), mask=inside)
    else:
        tl.store(codes + row * D + h, (code1 & 255).to(tl.uint8), mask=inside)
        tl.store(codes + row * D + HALF + h, (code2 & 255).to(tl.uint8), mask=inside)


@triton.jit
def _numbers_of(codes, FMT: tl.constexpr, HARD: tl.constexpr, KIND: tl.constexpr):
    """Loaded codes (uint8, or e4m3 with HARD) as KIND, without scales: exact in bfloat16 too. For int4: one half."""
    if FMT == 1 and HARD:
        made = codes.to(KIND)
    elif FMT == 1:
        made = _widened(codes.to(tl.int32), FMT).to(KIND)
    else:
        made = codes.to(tl.int8, bitcast=True).to(KIND)
    return made


@triton.jit
def _raw_halves(codes, where, inside, D: tl.constexpr, FMT: tl.constexpr, HARD: tl.constexpr, KIND: tl.constexpr):
    """Both halves of codes at `where`, an offset for each value of a first half; 0 where not `inside`."""
    if FMT == 2:
        both = tl.load(codes + where, mask=inside, other=0)
        one, two = _numbers_of(both & 15, FMT, HARD, KIND), _numbers_of(both >> 4, FMT, HARD, KIND)
    else:
        if FMT == 1 and HARD:
            source = codes.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
            first, second = (
                tl.load(source + where, mask=inside, other=0.0),
                tl.load(source + where + D // 2, mask=inside, other=0.0),
            )
        else:
            first, second = (
                tl.load(codes + where, mask=inside, other=0),
                tl.load(codes + where + D // 2, mask=inside, other=0),
            )
        one, two = _numbers_of(first, FMT, HARD, KIND), _numbers_of(second, FMT, HARD, KIND)
    return one, two


@triton.jit
def _whole_rows(
    codes, numbers, row, t, end, h, D: tl.constexpr, FMT: tl.constexpr, HARD: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Both halves of the rows without their scales, which are the third, (BT,), and their least values, the fourth.

    Of rows with one scale: it meets the sums instead of the codes.
    """
    WIDTH: tl.constexpr = D // 2 if FMT == 2 else D
    at, is_live = row + t, t < end
    inside = is_live[:, None] & (h[None, :] < D // 2)
    one, two = _raw_halves(codes, at[:, None] * WIDTH + h[None, :], inside, D, FMT, HARD, KIND)
    scale = tl.load(numbers + at * (2 if FMT == 2 else 1), mask=is_live, other=0.0).to(tl.float32)
    low = scale
    if FMT == 2:
        low = tl.load(numbers + at * 2 + 1, mask=is_live, other=0.0).to(tl.float32)
    return one, two, scale, low


@triton.jit
def _scaled(made, numbers, at, inside, first, p, GROUPS: tl.constexpr, FMT: tl.constexpr, KIND: tl.constexpr):
    """Codes (BT, PIECES, SIZE) times their groups' scales, from group `first` on, plus, for int4, the least values."""
    NUMBERS: tl.constexpr = GROUPS * 2 if FMT == 2 else GROUPS
    where = numbers + at[:, None] * NUMBERS + first + p[None, :]
    scale = tl.load(where, mask=inside, other=0.0).to(KIND)
    found = made * scale[:, :, None]
    if FMT == 2:
        found += tl.load(where + GROUPS, mask=inside, other=0.0).to(KIND)[:, :, None]
    return found


@triton.jit
def _halves(
    codes, numbers, row, t, end, h, D: tl.constexpr, G: tl.constexpr, BH: tl.constexpr, FMT: tl.constexpr,
    HARD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Both halves of the rows `row + t` (BT,), each (BT, BH) of `KIND`; zeros beyond `end` and beyond the half."""
    HALF: tl.constexpr = D // 2
    GROUPS: tl.constexpr = D // G
    WIDTH: tl.constexpr = HALF if FMT == 2 else D
    if BH == HALF and G < D and triton.next_power_of_2(HALF // G) == HALF // G:
        # Scales are loaded once a group, not once a value.
        PIECES: tl.constexpr = HALF // G
        p, i = tl.arange(0, PIECES), tl.arange(0, G)
        at = row + t
        inside = (t < end)[:, None]
        where = at[:, None, None] * WIDTH + p[None, :, None] * G + i[None, None, :]
        one, two = _raw_halves(codes, where, inside[:, :, None], D, FMT, HARD, KIND)
        one = tl.reshape(_scaled(one, numbers, at, inside, 0, p, GROUPS, FMT, KIND), (t.shape[0], BH))
        two = tl.reshape(_scaled(two, numbers, at, inside, PIECES, p, GROUPS, FMT, KIND), (t.shape[0], BH))
    else:
        NUMBERS: tl.constexpr = GROUPS * 2 if FMT == 2 else GROUPS
        inside = (t[:, None] < end) & (h[None, :] < HALF)
        at = row + t[:, None]
        one, two = _raw_halves(codes, at * WIDTH + h[None, :], inside, D, FMT, HARD, KIND)
        first = numbers + at * NUMBERS + (h // G)[None, :]
        second = numbers + at * NUMBERS + ((h + HALF) // G)[None, :]
        one = one * tl.load(first, mask=inside, other=0.0).to(KIND)
        two = two * tl.load(second, mask=inside, other=0.0).to(KIND)
        if FMT == 2:
            one += tl.load(first + GROUPS, mask=inside, other=0.0).to(KIND)
            two += tl.load(second + GROUPS, mask=inside, other=0.0).to(KIND)
    return one, two


@triton.jit
def attention(
    queries, cos_table, sin_table, key_codes, key_numbers, value_codes, value_numbers, position, out, partial, arrived,
    slots, scale, offset,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr,
    G: tl.constexpr, FMT: tl.constexpr, ROTATE: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    HARD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one token over the `position + offset` that the cache holds, the token itself among them.

    Programs: (key-value heads, SPLITS). `queries` is (HEADS, D); with ROTATE they are turned by the angles of
    `position`. `partial` and `arrived` are merge_if_last's, BD being the next power of two of D.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv, split = tl.program_id(0), tl.program_id(1)
    SHARE: tl.constexpr = HEADS // KV
    HALF: tl.constexpr = D // 2
    kind = out.dtype.element_ty
    g, h = tl.arange(0, BG), tl.arange(0, BH)
    now = tl.load(position)
    asked = (g[:, None] < SHARE) & (h[None, :] < HALF)
    where = queries + (kv * SHARE + g[:, None]) * D + h[None, :]
    q1 = tl.load(where, mask=asked, other=0.0).to(tl.float32)
    q2 = tl.load(where + HALF, mask=asked, other=0.0).to(tl.float32)
    if ROTATE:
        cos = tl.load(cos_table + now * HALF + h, mask=h < HALF, other=0.0)[None, :]
        sin = tl.load(sin_table + now * HALF + h, mask=h < HALF, other=0.0)[None, :]
        q1, q2 = q1 * cos - q2 * sin, q2 * cos + q1 * sin
    q1, q2 = (q1 * scale).to(kind), (q2 * scale).to(kind)

    live = (now + offset).to(tl.int32)
    share = tl.cdiv(tl.cdiv(live, SPLITS), BT) * BT
    first = split * share
    end = tl.minimum(first + share, live)
    most = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc1 = tl.zeros((BG, BH), tl.float32)
    acc2 = tl.zeros((BG, BH), tl.float32)
    row = kv.to(tl.int64) * slots
    if G == D:
        asked_sum = tl.sum(q1.to(tl.float32), axis=1) + tl.sum(q2.to(tl.float32), axis=1)
        lifted = tl.zeros((BG,), tl.float32)
        for start in range(first, end, BT):
            t = start + tl.arange(0, BT)
            k1, k2, size, low = _whole_rows(key_codes, key_numbers, row, t, end, h, D, FMT, HARD, kind)
            score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee") * size[None, :]
            if FMT == 2:
                score += asked_sum[:, None] * low[None, :]
            score = tl.where(t[None, :] < end, score, float("-inf"))
            higher = tl.maximum(most, tl.max(score, axis=1))
            weight = tl.exp(score - higher[:, None])
            shrink = tl.exp(most - higher)
            total = total * shrink + tl.sum(weight, axis=1)
            v1, v2, size, low = _whole_rows(value_codes, value_numbers, row, t, end, h, D, FMT, HARD, kind)
            if FMT == 2:
                lifted = lifted * shrink + tl.sum(weight * low[None, :], axis=1)
            weight = (weight * size[None, :]).to(kind)
            acc1 = tl.dot(weight, v1, acc1 * shrink[:, None], input_precision="ieee")
            acc2 = tl.dot(weight, v2, acc2 * shrink[:, None], input_precision="ieee")
            most = higher
        acc1 += lifted[:, None]
        acc2 += lifted[:, None]
    else:
        for start in range(first, end, BT):
            t = start + tl.arange(0, BT)
            k1, k2 = _halves(key_codes, key_numbers, row, t, end, h, D, G, BH, FMT, HARD, kind)
            score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
            score = tl.where(t[None, :] < end, score, float("-inf"))
            higher = tl.maximum(most, tl.max(score, axis=1))
            weight = tl.exp(score - higher[:, None])
            shrink = tl.exp(most - higher)
            total = total * shrink + tl.sum(weight, axis=1)
            v1, v2 = _halves(value_codes, value_numbers, row, t, end, h, D, G, BH, FMT, HARD, kind)
            acc1 = tl.dot(weight.to(kind), v1, acc1 * shrink[:, None], input_precision="ieee")
            acc2 = tl.dot(weight.to(kind), v2, acc2 * shrink[:, None], input_precision="ieee")
            most = higher

    BD: tl.constexpr = triton.next_power_of_2(D)
    mine = partial + ((kv * SPLITS + split) * SHARE + g) * (BD + 2)
    tl.store(mine[:, None] + h[None, :], acc1, mask=asked)
    tl.store(mine[:, None] + HALF + h[None, :], acc2, mask=asked)
    tl.store(mine + BD, most, mask=g < SHARE)
    tl.store(mine + BD + 1, total, mask=g < SHARE)
    merge_if_last(partial, arrived, out + kv * SHARE * D, kv, SHARE, D, BD, SPLITS, AT_ONCE)
