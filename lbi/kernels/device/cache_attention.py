"""One token's attention over a low-bit cache on a GPU, its codes multiplied in the tensor cores as they are.

What bounds it is not the memory but the instructions that turn codes into numbers (device/code_planes.py), so scales
never meet codes. A row's scale multiplies what its codes have added up to: the scores of a key, the weights of a
value. So every dot product is of codes that share a scale, a piece: the whole head, or a group.

A program's warps do not wait for each other: each has slots of its own, a slice, with its own
maximum, and only the end adds up the slices. Both are batches of one product, B = (pieces * slices).
Rows of it are the query heads that share a key-value head, in turn until there are 16, as the tensor cores want.

float16 has three bits more than bfloat16, and all codes; what it lacks in range is made up by LIFT.
The splits of a key-value head share the live length, as in device/decode.py; the last of them has the token
itself alone, for putting it into the cache takes as long as attending to a thousand. FMT is 0 for int8,
1 for fp8 (e4m3), 2 for int4, of which a byte has a value of each half of a head: its second half is in the
variables named so, and has scales of its own where TWO. What is in tuples are those of each slot and piece (numbers)
and those of each byte of a word (sums).
"""

import triton
import triton.language as tl

from lbi.kernels.device.cache import put_pair
from lbi.kernels.device.code_planes import high_planes, key_planes, value_planes
from lbi.kernels.device.splits import LEAST, merge_if_last, one_by_one

PTX = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether inline assembly can be used: Triton's interpreter knows none."""

LOG2_E = tl.constexpr(1.4426950408889634)


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
def _number(numbers, at, piece, asked, FIRST: tl.constexpr, NUMBERS: tl.constexpr):
    return tl.load(numbers + at * NUMBERS + piece + FIRST, mask=asked, other=0.0)


@triton.jit
def _numbers(key_numbers, value_numbers, at, piece, asked, GROUPS: tl.constexpr, FMT: tl.constexpr):
    """(B, T) bfloat16 each: scales of keys and values; of int4 their least values; both again for its second half."""
    COUNT: tl.constexpr = GROUPS * 2 if FMT == 2 else GROUPS
    SECOND: tl.constexpr = GROUPS // 2
    key_size = _number(key_numbers, at, piece, asked, 0, COUNT)
    value_size = _number(value_numbers, at, piece, asked, 0, COUNT)
    if FMT != 2:
        found = (key_size, value_size)
    else:
        key_low = _number(key_numbers, at, piece, asked, GROUPS, COUNT)
        value_low = _number(value_numbers, at, piece, asked, GROUPS, COUNT)
        if GROUPS == 1:
            found = (key_size, value_size, key_low, value_low)
        else:
            found = (
                key_size, value_size, key_low, value_low,
                _number(key_numbers, at, piece, asked, SECOND, COUNT),
                _number(value_numbers, at, piece, asked, SECOND, COUNT),
                _number(key_numbers, at, piece, asked, GROUPS + SECOND, COUNT),
                _number(value_numbers, at, piece, asked, GROUPS + SECOND, COUNT),
            )  # fmt: skip
    return found


@triton.jit
def _wide(numbers, factor: tl.constexpr):
    """(B, 1, T) float32, for products of every row."""
    return (numbers.to(tl.float32) * factor)[:, None, :]


@triton.jit
def _scores(
    one, two, numbers, query, query_sum, second, second_sum, FMT: tl.constexpr, TWO: tl.constexpr,
    OFF: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """(B, R, T): what each piece of a key adds to the score of its slot. `one` and `two` are key_planes' codes."""
    begin = -OFF * query_sum
    if TWO:
        found = tl.dot(query, tl.permute(one, (0, 2, 1)), begin, input_precision="ieee")
        other = tl.dot(second, tl.permute(two, (0, 2, 1)), -OFF * second_sum, input_precision="ieee")
        found = found * _wide(numbers[0], 1.0) + other * _wide(numbers[4], 1.0)
        found += query_sum * _wide(numbers[2], 1.0)
        found += (UP * second_sum) * _wide(numbers[6], 1.0)
    elif FMT == 2:
        begin += -OFF * second_sum
        found = tl.dot(query, tl.permute(one, (0, 2, 1)), begin, input_precision="ieee")
        found = tl.dot(second, tl.permute(two, (0, 2, 1)), found, input_precision="ieee")
        found *= _wide(numbers[0], 1.0)
        found += (query_sum + UP * second_sum) * _wide(numbers[2], 1.0)
    else:
        found = tl.dot(query, tl.permute(one, (0, 2, 1)), begin, input_precision="ieee")
        found *= _wide(numbers[0], 1.0)
    return found


@triton.jit
def _with_values(sums, shrunk, sized, planes):
    """(B, R, words) for each byte of a word: the sums so far, shrunk, and the values of these slots, weighted."""
    a = tl.dot(sized, planes[0], sums[0] * shrunk, input_precision="ieee")
    b = tl.dot(sized, planes[1], sums[1] * shrunk, input_precision="ieee")
    c = tl.dot(sized, planes[2], sums[2] * shrunk, input_precision="ieee")
    d = tl.dot(sized, planes[3], sums[3] * shrunk, input_precision="ieee")
    return a, b, c, d


@triton.jit
def _put_sums(
    mine, sums, least, piece, r, w, LIFT: tl.constexpr, SHARE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Leave the sums of each slice, and what the least values of its slots add to them, in its part."""
    lowest = tl.sum(least, axis=2)[:, :, None]
    _put_part(mine, sums[0] / LIFT + lowest, piece, 0, r, w, SHARE, PIECE, PIECES)
    _put_part(mine, sums[1] / LIFT + lowest, piece, 1, r, w, SHARE, PIECE, PIECES)
    _put_part(mine, sums[2] / LIFT + lowest, piece, 2, r, w, SHARE, PIECE, PIECES)
    _put_part(mine, sums[3] / LIFT + lowest, piece, 3, r, w, SHARE, PIECE, PIECES)


@triton.jit
def _slots_of(split, live, ALONE: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr):
    """The slots of a split, from the first to behind the last; ALONE: the last split has the token itself alone."""
    if ALONE:
        share = tl.cdiv(tl.cdiv(live - 1, SPLITS - 1), BT) * BT
        first = tl.where(split == SPLITS - 1, live - 1, split * share)
        end = tl.where(split == SPLITS - 1, live, tl.minimum(first + share, live - 1))
    else:
        share = tl.cdiv(tl.cdiv(live, SPLITS), BT) * BT
        first = split * share
        end = tl.minimum(first + share, live)
    return first, end


@triton.jit
def _put_token(
    new_keys, new_values, key_codes, key_numbers, value_codes, value_numbers, cos_table, sin_table, kv, row, now,
    D: tl.constexpr, G: tl.constexpr, FMT: tl.constexpr, ROUND: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Keys and values of the token into the slot `now`, for this program and those of later steps to read."""
    HALF: tl.constexpr = D // 2
    HALVES: tl.constexpr = HALF if G == D else G
    WIDTH: tl.constexpr = triton.next_power_of_2(HALVES)
    for pair in tl.static_range(HALF // HALVES):
        put_pair(
            new_keys, key_codes, key_numbers, cos_table, sin_table, kv, row + now, now, pair,
            D, G, FMT, ROUND, ROTATE, WIDTH,
        )  # fmt: skip
        put_pair(
            new_values, value_codes, value_numbers, None, None, kv, row + now, now, pair,
            D, G, FMT, ROUND, False, WIDTH,
        )  # fmt: skip
    tl.debug_barrier()


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
    # A row's bytes, and pieces of them; int4's bytes have a value of each half.
    SPAN: tl.constexpr = HALF if FMT == 2 else D
    PIECE: tl.constexpr = min(G, SPAN)
    PIECES: tl.constexpr = SPAN // PIECE
    P: tl.constexpr = triton.next_power_of_2(PIECES)
    B: tl.constexpr = P * S
    BYTES: tl.constexpr = max(16, triton.next_power_of_2(PIECE))
    WORDS: tl.constexpr = max(8, triton.next_power_of_2(PIECE // 4))
    GROUPS: tl.constexpr = D // G
    TWO: tl.constexpr = FMT == 2 and GROUPS > 1
    BT: tl.constexpr = S * T
    BD: tl.constexpr = triton.next_power_of_2(D)
    OFF: tl.constexpr = ((1152.0 if FMT == 0 else 1024.0) if FMT != 1 else 0.0) if FAST else 0.0
    UP: tl.constexpr = 16.0 if FAST and FMT == 2 else 1.0
    LIFT: tl.constexpr = (64.0 if FMT == 0 else (256.0 if FMT == 1 else 16.0)) if FAST else 1.0

    kv, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    now = tl.load(position, cache_modifier=".cg")
    live = (now + offset).to(tl.int32)
    first, end = _slots_of(split, live, new_keys is not None and SPLITS > 1, SPLITS, BT)
    row = kv.to(tl.int64) * slots
    if PDL:
        # A split that a short text leaves without slots begins where no cache need be any more.
        begins = (row + tl.minimum(first, now)) * SPAN
        bytes_live = (end - first) * SPAN
        _prefetch(key_codes + begins, bytes_live, BT * SPAN)
        _prefetch(value_codes + begins, bytes_live, BT * SPAN)
        tl.extra.cuda.gdc_wait()
    if new_keys is not None:  # noqa: SIM102 (what the first condition leaves out must not be compiled)
        if split == SPLITS - 1:
            _put_token(
                new_keys, new_values, key_codes, key_numbers, value_codes, value_numbers, cos_table, sin_table,
                kv, row, now, D, G, FMT, ROUND, ROTATE,
            )  # fmt: skip
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
    second, second_sum = query, query_sum
    if FMT == 2:
        second = _turned(queries, cos_table, sin_table, now, head, d + HALF, asked, scale * LOG2_E / UP, D, ROTATE)
        second = _for_all_slices(second.to(KIND), P, S)
        second_sum = tl.dot(second, ones, input_precision="ieee")

    if FMT == 1 and HARD:
        keys = key_codes.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    else:
        keys = key_codes
    value_words = value_codes.to(tl.pointer_type(tl.int32), bitcast=True)

    most = tl.full((S, R), LEAST, tl.float32)
    total = tl.zeros((S, R, T), tl.float32)
    nothing = tl.zeros((B, R, WORDS), tl.float32)
    sums = (nothing, nothing, nothing, nothing)
    sums_2 = sums
    least = tl.zeros((B, R, T), tl.float32)
    least_2 = least

    # Scales are asked for a whole step ahead: they are too small to come with the codes.
    t = first + (slice_ * T)[:, None] + own[None, :]
    is_live = (t < end) & (piece < PIECES)[:, None]
    numbers = _numbers(key_numbers, value_numbers, row + t, piece[:, None], is_live, GROUPS, FMT)

    for start in range(first, end, BT):
        t = start + (slice_ * T)[:, None] + own[None, :]
        is_next = (t + BT < end) & (piece < PIECES)[:, None]
        next_numbers = _numbers(key_numbers, value_numbers, row + t + BT, piece[:, None], is_next, GROUPS, FMT)
        is_live = (t < end) & (piece < PIECES)[:, None]
        at = row + t
        where = at[:, :, None] * SPAN + (piece * PIECE)[:, None, None] + i[None, None, :]
        inside = is_live[:, :, None] & (i < PIECE)[None, None, :]
        codes = tl.load(keys + where, mask=inside, other=0.0 if FMT == 1 and HARD else 0)
        one, two = key_planes(codes, FMT, HARD, FAST, KIND)
        found = _scores(one, two, numbers, query, query_sum, second, second_sum, FMT, TWO, OFF, UP)
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
        where = at[:, :, None] * (SPAN // 4) + (piece * (PIECE // 4))[:, None, None] + w[None, None, :]
        words = tl.load(value_words + where, mask=is_live[:, :, None] & (w < PIECE // 4)[None, None, :], other=0)
        sized = (weights * _wide(numbers[1], LIFT)).to(KIND)
        sums = _with_values(sums, shrunk, sized, value_planes(words, FMT, HARD, FAST, KIND))
        if FMT == 2:
            sized = (weights * _wide(numbers[5 if TWO else 1], LIFT / UP)).to(KIND)
            sums_2 = _with_values(sums_2, shrunk, sized, high_planes(words, FAST, KIND))
            least = least * shrunk + weights * _wide(numbers[3], 1.0)
        if TWO:
            least_2 = least_2 * shrunk + weights * _wide(numbers[7], 1.0)
        numbers = next_numbers

    number = kv * SPLITS + split
    own_parts = slices + number * (S * SHARE * (BD + 2))
    mine = own_parts + (slice_[:, None] * SHARE + r[None, :]) * (BD + 2)
    _put_sums(mine, sums, least, piece, r, w, LIFT, SHARE, PIECE, PIECES)
    if FMT == 2:
        _put_sums(mine + HALF, sums_2, least_2 if TWO else least, piece, r, w, LIFT, SHARE, PIECE, PIECES)
    s = tl.arange(0, S)
    mine = own_parts + (s[:, None] * SHARE + r[None, :]) * (BD + 2) + BD
    asked = (r < SHARE)[None, :] & (s >= 0)[:, None]
    tl.store(mine, most, mask=asked)
    tl.store(mine + 1, tl.sum(total, axis=2), mask=asked)
    tl.debug_barrier()
    _merged_slices(own_parts, partial + number * (SHARE * (BD + 2)), now, S, SHARE, H, D, BD)
    merge_if_last(partial, arrived, out + kv * SHARE * D, kv, SHARE, D, BD, SPLITS)
