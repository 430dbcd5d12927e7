"""One token's attention over a low-bit cache on a GPU, its codes multiplied in the tensor cores as they are.

What bounds it is not the memory but the instructions that turn codes into numbers, so there are as
few as can be, about one a code: a byte becomes a float16 by being put into a mantissa (1024 + code),
by one instruction for two of them, and scales never meet codes. A row's scale multiplies what its
codes have added up to: the scores of a key, the weights of a value. So every dot product is of
codes that share a scale, a piece: the whole head, or a group.

A program's warps do not wait for each other: each has slots of its own, a slice, with its own
maximum, and only the end adds up the slices. Both are batches of one product, (pieces * slices).
Rows of it are the query heads that share a key-value head, in turn until there are 16, as the tensor cores want.

float16 has three bits more than bfloat16, and all codes; what it lacks in range is made up by LIFT.
The splits of a key-value head share the live length, as in device/decode.py; the last of them has the token
itself alone, for putting it into the cache takes as long as attending to a thousand. FMT is 0 for int8,
1 for fp8 (e4m3), 2 for int4, of which a byte has a value of each half of a head.
"""

import triton
import triton.language as tl

from lbi.kernels.device.cache import _widened, put_pair
from lbi.kernels.device.splits import LEAST, merge_if_last, one_by_one

PTX = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether inline assembly can be used: Triton's interpreter knows none."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _key_planes(codes, FMT: tl.constexpr, HARD: tl.constexpr, FAST: tl.constexpr, KIND: tl.constexpr):
    """Key codes, four neighbours in a register, as KIND plus OFF (see `attention`); of int4 both, 16 * the second."""
    if FAST and FMT == 0:
        one = tl.inline_asm_elementwise(
            "{ .reg .b32 a; xor.b32 a, $2, 0x80808080;"
            "  prmt.b32 $0, a, 0x64646464, 0x4140; prmt.b32 $1, a, 0x64646464, 0x4342; }",
            "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
        two = one
    elif FAST and FMT == 2:
        one, two = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;"
            "  lop3.b32 $0, a, 0x000F000F, 0x64006400, 0xEA; lop3.b32 $1, b, 0x000F000F, 0x64006400, 0xEA;"
            "  lop3.b32 $2, a, 0x00F000F0, 0x64006400, 0xEA; lop3.b32 $3, b, 0x00F000F0, 0x64006400, 0xEA; }",
            "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    elif FMT == 1 and HARD:
        one = codes.to(KIND)
        two = one
    elif FMT == 1:
        one = _widened(codes.to(tl.int32), FMT).to(KIND)
        two = one
    elif FMT == 0:
        one = codes.to(tl.int8, bitcast=True).to(KIND)
        two = one
    else:
        one, two = (codes & 15).to(KIND), (codes >> 4).to(KIND)
    return one, two


@triton.jit
def _value_planes(words, FMT: tl.constexpr, HARD: tl.constexpr, FAST: tl.constexpr, KIND: tl.constexpr):
    """The four bytes of each word as KIND, of two neighbouring slots at once; of int4 their lower halves."""
    if FAST and FMT == 0:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 x, y, z; mov.b32 z, 0x64806480;"
            "  prmt.b32 x, $4, $5, 0x5410; prmt.b32 y, $4, $5, 0x7632;"
            "  lop3.b32 $0, x, 0x00FF00FF, z, 0x6A; shr.b32 x, x, 8; lop3.b32 $1, x, 0x00FF00FF, z, 0x6A;"
            "  lop3.b32 $2, y, 0x00FF00FF, z, 0x6A; shr.b32 y, y, 8; lop3.b32 $3, y, 0x00FF00FF, z, 0x6A;"
            "  mov.b32 z, 0xE480E480;"
            "  add.f16x2 $0, $0, z; add.f16x2 $1, $1, z; add.f16x2 $2, $2, z; add.f16x2 $3, $3, z; }",
            "=&r,=&r,=&r,=&r,r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif FAST and FMT == 1 and HARD:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 x, y; .reg .b16 s, t, u, v;"
            "  prmt.b32 x, $4, $5, 0x5140; prmt.b32 y, $4, $5, 0x7362; mov.b32 {s, t}, x; mov.b32 {u, v}, y;"
            "  cvt.rn.f16x2.e4m3x2 $0, s; cvt.rn.f16x2.e4m3x2 $1, t;"
            "  cvt.rn.f16x2.e4m3x2 $2, u; cvt.rn.f16x2.e4m3x2 $3, v; }",
            "=&r,=&r,=&r,=&r,r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif FAST and FMT == 2:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 x, y, z; mov.b32 z, 0x64006400;"
            "  prmt.b32 x, $4, $5, 0x5410; prmt.b32 y, $4, $5, 0x7632;"
            "  lop3.b32 $0, x, 0x000F000F, z, 0xEA; shr.b32 x, x, 8; lop3.b32 $1, x, 0x000F000F, z, 0xEA;"
            "  lop3.b32 $2, y, 0x000F000F, z, 0xEA; shr.b32 y, y, 8; lop3.b32 $3, y, 0x000F000F, z, 0xEA;"
            "  mov.b32 z, 0xE400E400;"
            "  add.f16x2 $0, $0, z; add.f16x2 $1, $1, z; add.f16x2 $2, $2, z; add.f16x2 $3, $3, z; }",
            "=&r,=&r,=&r,=&r,r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, b = _value_of(words, 0, FMT, KIND), _value_of(words, 1, FMT, KIND)
        c, d = _value_of(words, 2, FMT, KIND), _value_of(words, 3, FMT, KIND)
    return a, b, c, d


@triton.jit
def _high_planes(words, FAST: tl.constexpr, KIND: tl.constexpr):
    """The upper halves of the four bytes of each word of int4, 16 times as large where FAST."""
    if FAST:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 x, y, z; mov.b32 z, 0x64006400;"
            "  prmt.b32 x, $4, $5, 0x5410; prmt.b32 y, $4, $5, 0x7632;"
            "  lop3.b32 $0, x, 0x00F000F0, z, 0xEA; shr.b32 x, x, 8; lop3.b32 $1, x, 0x00F000F0, z, 0xEA;"
            "  lop3.b32 $2, y, 0x00F000F0, z, 0xEA; shr.b32 y, y, 8; lop3.b32 $3, y, 0x00F000F0, z, 0xEA;"
            "  mov.b32 z, 0xE400E400;"
            "  add.f16x2 $0, $0, z; add.f16x2 $1, $1, z; add.f16x2 $2, $2, z; add.f16x2 $3, $3, z; }",
            "=&r,=&r,=&r,=&r,r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, b = ((words >> 4) & 15).to(KIND), ((words >> 12) & 15).to(KIND)
        c, d = ((words >> 20) & 15).to(KIND), ((words >> 28) & 15).to(KIND)
    return a, b, c, d


@triton.jit
def _value_of(words, BYTE: tl.constexpr, FMT: tl.constexpr, KIND: tl.constexpr):
    code = (words >> (8 * BYTE)) & (15 if FMT == 2 else 255)
    return _widened(code, FMT).to(KIND)


@triton.jit
def _turned(
    queries, cos_table, sin_table, now, head, d, inside, scale, D: tl.constexpr, ROTATE: tl.constexpr
):  # fmt: skip
    """float32 query values `d` of `head`, broadcast, turned by the angles of `now` and times `scale`."""
    HALF: tl.constexpr = D // 2
    value = tl.load(queries + head * D + d, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        other = tl.load(queries + head * D + (d + HALF) % D, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_table + now * HALF + d % HALF, mask=inside, other=0.0)
        sin = tl.load(sin_table + now * HALF + d % HALF, mask=inside, other=0.0)
        value = value * cos + tl.where(d < HALF, -other, other) * sin
    return value * scale


@triton.jit
def _for_all_slices(values, P: tl.constexpr, S: tl.constexpr):
    """(P * S, R, ...) of (P, R, ...)."""
    R: tl.constexpr = values.shape[1]
    WIDTH: tl.constexpr = values.shape[2]
    return tl.reshape(tl.broadcast_to(values[:, None, :, :], (P, S, R, WIDTH)), (P * S, R, WIDTH))


@triton.jit
def _of_each_slice(values, P: tl.constexpr, S: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """(P * S, R, T) of what all pieces have alike, (S, R, T)."""
    return tl.reshape(tl.broadcast_to(values[None, :, :, :], (P, S, R, T)), (P * S, R, T))


@triton.jit
def _put_part(mine, acc, piece, j, r, w, SHARE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Byte `j` of the words' sums, (P * S, R, words), where each slice leaves its part."""
    asked = (r < SHARE)[None, :, None] & (w < PIECE // 4)[None, None, :] & (piece < PIECES)[:, None, None]
    tl.store(mine[:, :, None] + (piece * PIECE)[:, None, None] + 4 * w[None, None, :] + j, acc, mask=asked)


@triton.jit
def _merged_slices(
    parts, to, known, S: tl.constexpr, SHARE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Put the parts of a program's slices, (S, SHARE, BD + 2), together into one at `to`."""
    h, d = tl.arange(0, H)[:, None], one_by_one(tl.arange(0, BD), known)[None, :]
    inside = (h < SHARE) & (d < D)
    highest = tl.full((H, BD), LEAST, tl.float32)
    for s in tl.static_range(S):
        its = parts + (s * SHARE + h) * (BD + 2) + 0 * d
        highest = tl.maximum(highest, tl.load(its + BD, mask=inside, other=LEAST))
    total = tl.zeros((H, BD), tl.float32)
    acc = tl.zeros((H, BD), tl.float32)
    for s in tl.static_range(S):
        its = parts + (s * SHARE + h) * (BD + 2) + 0 * d
        weight = tl.exp2(tl.load(its + BD, mask=inside, other=LEAST) - highest)
        total += weight * tl.load(its + BD + 1, mask=inside, other=0.0)
        acc += weight * tl.load(its + d, mask=inside, other=0.0)
    to += h * (BD + 2) + 0 * d
    tl.store(to + d, acc, mask=inside)
    tl.store(to + BD, highest / LOG2_E, mask=inside & (d == 0))
    tl.store(to + BD + 1, total, mask=inside & (d == 0))


@triton.jit
def _numbers(numbers, at, piece, is_live, LOW: tl.constexpr, HIGH: tl.constexpr, NUMBERS: tl.constexpr):
    """(P * S, T) bfloat16: a scale, or a least value, of each slot and piece; of int4's second half if HIGH."""
    return tl.load(numbers + at * NUMBERS + piece + LOW + HIGH, mask=is_live, other=0.0)


@triton.jit
def _prefetch(start, size, SPAN: tl.constexpr):
    """Have `SPAN` bytes from `start` on, or `size` if they are fewer, brought to the L2, waiting for nothing."""
    line = tl.arange(0, triton.next_power_of_2(triton.cdiv(SPAN, 128))) * 128
    where = start + tl.maximum(tl.minimum(line, size - 1), 0)
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def attention(
    queries, new_keys, new_values, cos_table, sin_table, key_codes, key_numbers, value_codes, value_numbers,
    position, out, slices, partial, arrived, slots, scale, offset,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    G: tl.constexpr, FMT: tl.constexpr, ROUND: tl.constexpr, ROTATE: tl.constexpr, SPLITS: tl.constexpr,
    HARD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one token over the `position + offset` that the cache holds, the token itself among them.

    Programs: (key-value heads, SPLITS), each of S slices of T slots at once. `queries` is (HEADS, D); with ROTATE
    they are turned by the angles of `position`. R: a power of two of 16 or more, for HEADS / KV rows. `slices` has
    room for (KV, SPLITS, S, HEADS / KV, BD + 2) float32, BD being the next power of two of D; `partial` and `arrived`
    are merge_if_last's.

    With `new_keys` and `new_values`, (KV, D), the token is put into the cache first, rounded to ROUND, by the program
    that attends to it. Only these and `queries` come from the kernel before this one; as in device/decode.py the past
    was there when the step began, and has it on its way to the L2 before that kernel ends.
    """
    SHARE: tl.constexpr = HEADS // KV
    H: tl.constexpr = triton.next_power_of_2(SHARE)
    HALF: tl.constexpr = D // 2
    FAST: tl.constexpr = PTX and out.dtype.element_ty != tl.float32
    KIND: tl.constexpr = tl.float16 if FAST else tl.float32
    # Values of a piece, and pieces: of a half of the head for int4, of which a byte has both.
    SPAN: tl.constexpr = HALF if FMT == 2 else D
    PIECE: tl.constexpr = min(G, SPAN)
    PIECES: tl.constexpr = SPAN // PIECE
    P: tl.constexpr = triton.next_power_of_2(PIECES)
    B: tl.constexpr = P * S
    BYTES: tl.constexpr = max(16, triton.next_power_of_2(PIECE))
    WORDS: tl.constexpr = max(8, triton.next_power_of_2(PIECE // 4))
    GROUPS: tl.constexpr = D // G
    NUMBERS: tl.constexpr = GROUPS * 2 if FMT == 2 else GROUPS
    SECOND: tl.constexpr = GROUPS // 2
    # Where int4's second half has scales of its own.
    TWO: tl.constexpr = FMT == 2 and GROUPS > 1
    OFF: tl.constexpr = ((1152.0 if FMT == 0 else 1024.0) if FMT != 1 else 0.0) if FAST else 0.0
    UP: tl.constexpr = 16.0 if FAST and FMT == 2 else 1.0
    LIFT: tl.constexpr = (64.0 if FMT == 0 else (256.0 if FMT == 1 else 16.0)) if FAST else 1.0

    kv, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = tl.load(position, cache_modifier=".cg")
    live = (now + offset).to(tl.int32)
    BT: tl.constexpr = S * T
    if new_keys is not None and SPLITS > 1:
        share = tl.cdiv(tl.cdiv(live - 1, SPLITS - 1), BT) * BT
        first = tl.where(split == SPLITS - 1, live - 1, split * share)
        end = tl.where(split == SPLITS - 1, live, tl.minimum(first + share, live - 1))
    else:
        share = tl.cdiv(tl.cdiv(live, SPLITS), BT) * BT
        first = split * share
        end = tl.minimum(first + share, live)
    row = kv.to(tl.int64) * slots
    codes_per_row: tl.constexpr = HALF if FMT == 2 else D
    if PDL:
        # A split that a short text leaves without slots begins where no cache need be any more.
        begins = (row + tl.minimum(first, now)) * codes_per_row
        bytes_live = (end - first) * codes_per_row
        _prefetch(key_codes + begins, bytes_live, BT * codes_per_row)
        _prefetch(value_codes + begins, bytes_live, BT * codes_per_row)
        tl.extra.cuda.gdc_wait()
    if new_keys is not None:  # noqa: SIM102 (what the first condition leaves out must not be compiled)
        if split == SPLITS - 1:
            HALVES: tl.constexpr = HALF if G == D else G
            for pair in tl.static_range(HALF // HALVES):
                put_pair(
                    new_keys, key_codes, key_numbers, cos_table, sin_table, kv, row + now, now, pair,
                    D, G, FMT, ROUND, ROTATE, triton.next_power_of_2(HALVES),
                )  # fmt: skip
                put_pair(
                    new_values, value_codes, value_numbers, None, None, kv, row + now, now, pair,
                    D, G, FMT, ROUND, False, triton.next_power_of_2(HALVES),
                )  # fmt: skip
            tl.debug_barrier()
    b, r, i, w = tl.arange(0, B), tl.arange(0, R), tl.arange(0, BYTES), tl.arange(0, WORDS)
    piece, slice_ = b // S, b % S
    own = tl.arange(0, T)

    q = tl.arange(0, P)
    d = (q * PIECE)[:, None, None] + i[None, None, :]
    asked = (r >= 0)[None, :, None] & (i < PIECE)[None, None, :] & (q < PIECES)[:, None, None]
    head = (kv * SHARE + r % SHARE)[None, :, None]
    query = _turned(queries, cos_table, sin_table, now, head, d, asked, scale * LOG2_E, D, ROTATE)
    query = _for_all_slices(query.to(KIND), P, S)
    ones = tl.full((B, BYTES, T), 1.0, KIND)
    query_sum = tl.dot(query, ones, input_precision="ieee")
    begin = -OFF * query_sum
    if FMT == 2:
        second = _turned(queries, cos_table, sin_table, now, head, d + HALF, asked, scale * LOG2_E / UP, D, ROTATE)
        second = _for_all_slices(second.to(KIND), P, S)
        second_sum = tl.dot(second, ones, input_precision="ieee")
        begin_second = -OFF * second_sum
        if not TWO:
            begin += begin_second

    if FMT == 1 and HARD:
        keys = key_codes.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    else:
        keys = key_codes
    value_words = value_codes.to(tl.pointer_type(tl.int32), bitcast=True)

    most = tl.full((S, R), LEAST, tl.float32)
    total = tl.zeros((S, R, T), tl.float32)
    a0 = tl.zeros((B, R, WORDS), tl.float32)
    a1, a2, a3 = a0, a0, a0
    h0, h1, h2, h3 = a0, a0, a0, a0
    least = tl.zeros((B, R, T), tl.float32)
    least_2 = tl.zeros((B, R, T), tl.float32)

    # Scales are asked for a whole step ahead: they are too small to come with the codes.
    t = first + (slice_ * T)[:, None] + own[None, :]
    is_live = (t < end) & (piece < PIECES)[:, None]
    at, p = row + t, piece[:, None]
    key_size = _numbers(key_numbers, at, p, is_live, 0, 0, NUMBERS)
    value_size = _numbers(value_numbers, at, p, is_live, 0, 0, NUMBERS)
    if FMT == 2:
        key_low = _numbers(key_numbers, at, p, is_live, GROUPS, 0, NUMBERS)
        value_low = _numbers(value_numbers, at, p, is_live, GROUPS, 0, NUMBERS)
    if TWO:
        key_size_2 = _numbers(key_numbers, at, p, is_live, 0, SECOND, NUMBERS)
        value_size_2 = _numbers(value_numbers, at, p, is_live, 0, SECOND, NUMBERS)
        key_low_2 = _numbers(key_numbers, at, p, is_live, GROUPS, SECOND, NUMBERS)
        value_low_2 = _numbers(value_numbers, at, p, is_live, GROUPS, SECOND, NUMBERS)

    for start in range(first, end, BT):
        t = start + (slice_ * T)[:, None] + own[None, :]
        is_next = (t + BT < end) & (piece < PIECES)[:, None]
        at = row + t + BT
        next_key_size = _numbers(key_numbers, at, p, is_next, 0, 0, NUMBERS)
        next_value_size = _numbers(value_numbers, at, p, is_next, 0, 0, NUMBERS)
        if FMT == 2:
            next_key_low = _numbers(key_numbers, at, p, is_next, GROUPS, 0, NUMBERS)
            next_value_low = _numbers(value_numbers, at, p, is_next, GROUPS, 0, NUMBERS)
        if TWO:
            next_key_size_2 = _numbers(key_numbers, at, p, is_next, 0, SECOND, NUMBERS)
            next_value_size_2 = _numbers(value_numbers, at, p, is_next, 0, SECOND, NUMBERS)
            next_key_low_2 = _numbers(key_numbers, at, p, is_next, GROUPS, SECOND, NUMBERS)
            next_value_low_2 = _numbers(value_numbers, at, p, is_next, GROUPS, SECOND, NUMBERS)
        is_live = (t < end) & (piece < PIECES)[:, None]
        at = row + t
        where = at[:, :, None] * codes_per_row + (piece * PIECE)[:, None, None] + i[None, None, :]
        inside = is_live[:, :, None] & (i < PIECE)[None, None, :]
        codes = tl.load(keys + where, mask=inside, other=0.0 if FMT == 1 and HARD else 0)
        one, two = _key_planes(codes, FMT, HARD, FAST, KIND)
        found = tl.dot(query, tl.permute(one, (0, 2, 1)), begin, input_precision="ieee")
        if TWO:
            other = tl.dot(second, tl.permute(two, (0, 2, 1)), begin_second, input_precision="ieee")
            found = found * key_size.to(tl.float32)[:, None, :] + other * key_size_2.to(tl.float32)[:, None, :]
            found += query_sum * key_low.to(tl.float32)[:, None, :]
            found += (UP * second_sum) * key_low_2.to(tl.float32)[:, None, :]
        else:
            if FMT == 2:
                found = tl.dot(second, tl.permute(two, (0, 2, 1)), found, input_precision="ieee")
            found *= key_size.to(tl.float32)[:, None, :]
            if FMT == 2:
                found += (query_sum + UP * second_sum) * key_low.to(tl.float32)[:, None, :]
        score = tl.sum(tl.reshape(found, (P, S, R, T)), axis=0)
        mine = start + tl.arange(0, S)[:, None] * T + own[None, :]
        score = tl.where((mine < end)[:, None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=2))
        weight = tl.exp2(score - higher[:, :, None])
        shrink = tl.exp2(most - higher)
        most = higher
        total = total * shrink[:, :, None] + weight

        weights = _of_each_slice(weight, P, S, R, T)
        shrunk = tl.reshape(tl.broadcast_to(shrink[None, :, :], (P, S, R)), (B, R))[:, :, None]
        sized = (weights * (value_size.to(tl.float32) * LIFT)[:, None, :]).to(KIND)
        where = at[:, :, None] * (codes_per_row // 4) + (piece * (PIECE // 4))[:, None, None] + w[None, None, :]
        words = tl.load(value_words + where, mask=is_live[:, :, None] & (w < PIECE // 4)[None, None, :], other=0)
        v0, v1, v2, v3 = _value_planes(words, FMT, HARD, FAST, KIND)
        a0 = tl.dot(sized, v0, a0 * shrunk, input_precision="ieee")
        a1 = tl.dot(sized, v1, a1 * shrunk, input_precision="ieee")
        a2 = tl.dot(sized, v2, a2 * shrunk, input_precision="ieee")
        a3 = tl.dot(sized, v3, a3 * shrunk, input_precision="ieee")
        if FMT == 2:
            if TWO:
                sized = (weights * (value_size_2.to(tl.float32) * (LIFT / UP))[:, None, :]).to(KIND)
            else:
                sized = (weights * (value_size.to(tl.float32) * (LIFT / UP))[:, None, :]).to(KIND)
            v0, v1, v2, v3 = _high_planes(words, FAST, KIND)
            h0 = tl.dot(sized, v0, h0 * shrunk, input_precision="ieee")
            h1 = tl.dot(sized, v1, h1 * shrunk, input_precision="ieee")
            h2 = tl.dot(sized, v2, h2 * shrunk, input_precision="ieee")
            h3 = tl.dot(sized, v3, h3 * shrunk, input_precision="ieee")
            least = least * shrunk + weights * value_low.to(tl.float32)[:, None, :]
            if TWO:
                least_2 = least_2 * shrunk + weights * value_low_2.to(tl.float32)[:, None, :]

        key_size, value_size = next_key_size, next_value_size
        if FMT == 2:
            key_low, value_low = next_key_low, next_value_low
        if TWO:
            key_size_2, value_size_2 = next_key_size_2, next_value_size_2
            key_low_2, value_low_2 = next_key_low_2, next_value_low_2

    BD: tl.constexpr = triton.next_power_of_2(D)
    number = kv * SPLITS + split
    own_parts = slices + number * (S * SHARE * (BD + 2))
    mine = own_parts + (slice_[:, None] * SHARE + r[None, :]) * (BD + 2)
    lowest = tl.zeros((B, R, 1), tl.float32)
    if FMT == 2:
        lowest = tl.sum(least, axis=2)[:, :, None]
    _put_part(mine, a0 / LIFT + lowest, piece, 0, r, w, SHARE, PIECE, PIECES)
    _put_part(mine, a1 / LIFT + lowest, piece, 1, r, w, SHARE, PIECE, PIECES)
    _put_part(mine, a2 / LIFT + lowest, piece, 2, r, w, SHARE, PIECE, PIECES)
    _put_part(mine, a3 / LIFT + lowest, piece, 3, r, w, SHARE, PIECE, PIECES)
    if FMT == 2:
        if TWO:
            lowest = tl.sum(least_2, axis=2)[:, :, None]
        mine += HALF
        _put_part(mine, h0 / LIFT + lowest, piece, 0, r, w, SHARE, PIECE, PIECES)
        _put_part(mine, h1 / LIFT + lowest, piece, 1, r, w, SHARE, PIECE, PIECES)
        _put_part(mine, h2 / LIFT + lowest, piece, 2, r, w, SHARE, PIECE, PIECES)
        _put_part(mine, h3 / LIFT + lowest, piece, 3, r, w, SHARE, PIECE, PIECES)
    s = tl.arange(0, S)
    mine = own_parts + (s[:, None] * SHARE + r[None, :]) * (BD + 2) + BD
    asked = (r < SHARE)[None, :] & (s >= 0)[:, None]
    tl.store(mine, most, mask=asked)
    tl.store(mine + 1, tl.sum(total, axis=2), mask=asked)
    tl.debug_barrier()
    _merged_slices(own_parts, partial + number * (SHARE * (BD + 2)), now, S, SHARE, H, D, BD)
    merge_if_last(partial, arrived, out + kv * SHARE * D, kv, SHARE, D, BD, SPLITS)
