"""A low-bit cache on a GPU: a token's keys and values put into it.

The layout is that of lbi/kernels/cache_formats.py. Everything is done on two halves of a head, the first
and the last D / 2 values: rope turns one into the other, and a byte of 4-bit codes has a value of each.
FMT is 0 for int8, 1 for fp8 (e4m3), 2 for int4. device/cache_attention.py reads what is put here.
"""

import triton
import triton.language as tl


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
def widened(codes, FMT: tl.constexpr):
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
def put_pair(
    source, codes, numbers, cos_table, sin_table, head, row, now, pair,
    D: tl.constexpr, G: tl.constexpr, FMT: tl.constexpr, KIND: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair of groups of `head`'s values, one of each half, into `row`. A group of a whole head is one pair.

    `KIND` is the type that values are rounded to first.
    """
    HALF: tl.constexpr = D // 2
    WHOLE: tl.constexpr = G == D
    SIZE: tl.constexpr = HALF if WHOLE else G
    GROUPS: tl.constexpr = D // G
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    h = pair * SIZE + i
    one = tl.load(source + head * D + h, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + head * D + HALF + h, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        cos = tl.load(cos_table + now * HALF + h, mask=inside, other=0.0)
        sin = tl.load(sin_table + now * HALF + h, mask=inside, other=0.0)
        one, two = one * cos - two * sin, two * cos + one * sin
    one, two = one.to(KIND).to(tl.float32), two.to(KIND).to(tl.float32)
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
