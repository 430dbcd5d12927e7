"""Products of a matrix in packed words with up to 16 tokens, in the tensor cores.

Below 8 bits a GPU has about three instructions a weight at full bandwidth, and a product in its
usual units takes more than that. So two weights become two floats by one and-or: put into the
mantissa of OFF, 128 in bf16, a code q is OFF + q. The tensor cores multiply these as they are,
2,048 at once, and add up in float32; what the OFFs add up to is taken off once a group, from a
product of the same inputs and ones:

    sum (q - z) x  =  sum v x  -  (OFF + z) sum x,    v = OFF + q

In fp16 it is 1024, too much to be taken off a sum, and comes off each weight instead.

A plane is what one such and-or can take out of a word: all of 4 bits; each half of a byte, the
upper one as 16 (OFF + q); every second pair of 2 bits, two places up in the mantissa of OFF / 4,
which saves half of the shifts.

The tensor cores sum over inputs in any order, so the order in a word (formats.py) is the one in
which each thread finds what it has to hand in: no weight moves between threads after its load.
A program's warps share the length of its rows, by groups; groups have a scale each, which meets
their sums. Words come through shared memory, asynchronously, some steps ahead (`num_stages`).
"""

import triton
import triton.language as tl

PTX = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether inline assembly can be used: Triton's interpreter knows none."""

TAKE_OUT = tl.constexpr("{ .reg .b32 both; lop3.b32 both, $2, $3, $4, 0xEA; mov.b32 {$0, $1}, both; }")
"""(word & mask) | type's one, and its halves. ptxas makes two instructions of it where both are constants."""


@triton.jit
def _pair(words, AT: tl.constexpr, PLACE: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr, kind: tl.constexpr):
    """OFF * FACTOR / 2^PLACE + q * FACTOR of the fields q at bits AT and AT + 16 of each word; OFF is 0 but in bf16."""
    MASK: tl.constexpr = (2**BITS - 1) << PLACE
    moved = words >> (AT - PLACE)
    if PTX and kind != tl.float32:
        mask = tl.full((1, 1, 1), MASK * 0x10001, tl.int32)
        # An exponent more for each doubling, one less for each place that the code lies higher.
        UP: tl.constexpr = (4 if FACTOR == 16 else 0) - PLACE
        if kind == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                TAKE_OUT, "=h,=h,r,r,r", [moved, mask, tl.full((1, 1, 1), (0x4300 + 0x80 * UP) * 0x10001, tl.int32)],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                TAKE_OUT, "=h,=h,r,r,r", [moved, mask, tl.full((1, 1, 1), (0x6400 + 0x400 * UP) * 0x10001, tl.int32)],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
            # 1024 a weight would drown what a row of 8,192 ternary weights adds up to. It comes off without rounding.
            low, high = low - 1024.0 * 2**UP, high - 1024.0 * 2**UP
    else:
        low, high = ((moved & MASK) >> PLACE).to(kind) * FACTOR, ((moved >> 16 & MASK) >> PLACE).to(kind) * FACTOR
    return low, high


@triton.jit
def _two(
    words, FIRST: tl.constexpr, SECOND: tl.constexpr, PLACE: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr,
    kind: tl.constexpr,
):  # fmt: skip
    """Two pairs of each word, (..., 2) of the first weights and of the second."""
    a, b = _pair(words, FIRST, PLACE, FACTOR, BITS, kind)
    c, d = _pair(words, SECOND, PLACE, FACTOR, BITS, kind)
    return tl.join(a, c), tl.join(b, d)


@triton.jit
def _laid_out(of_words, BITS: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, WG: tl.constexpr):
    """(B, BN, inputs) of a plane, from (B, BN, WG, pairs of a word, 2).

    `mma.sync` as Triton feeds it takes two pairs from a thread, sixteen inputs apart: these are neighbours of one
    word, whose inputs then come by one load, in registers that lie side by side.
    """
    if BITS == 8:
        made = tl.reshape(of_words, (B, BN, WG // 8, 2, 4, 2, 2))
        made = tl.reshape(tl.permute(made, (0, 1, 2, 5, 4, 3, 6)), (B, BN, 4 * WG))
    else:
        made = tl.reshape(of_words, (B, BN, WG // 4, 4, 2, 2, 2))
        made = tl.reshape(tl.permute(made, (0, 1, 2, 4, 3, 5, 6)), (B, BN, 8 * WG))
    return made


@triton.jit
def _weights(
    words, PLANE: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, WG: tl.constexpr,
    kind: tl.constexpr,
):  # fmt: skip
    """(B, BN, inputs) of a plane of words (B, BN, WG), in the order of `_laid_out`."""
    if BITS == 8:
        low, high = _two(words, 4 * PLANE, 4 * PLANE + 8, 0, 16 if PLANE == 1 else 1, 4, kind)
        made = tl.join(low, high)
    else:
        AT: tl.constexpr = PLANE * BITS
        low_0, high_0 = _two(words, AT, AT + 4, AT, 1, BITS, kind)
        low_1, high_1 = _two(words, AT + 8, AT + 12, AT, 1, BITS, kind)
        made = tl.join(tl.join(low_0, low_1), tl.join(high_0, high_1))
    return _laid_out(made, BITS, B, BN, WG)


@triton.jit
def _ones(words, BITS: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, WG: tl.constexpr, kind: tl.constexpr):
    """(B, BN, inputs) of 1, made of the words as `_weights` are: so both products take inputs in one order."""
    INPUTS: tl.constexpr = WG * (4 if BITS == 8 else 8)
    if PTX and kind != tl.float32:
        if kind == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, 0x3F803F80;", "=h,=h,r", [words],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low, high = tl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, 0x3C003C00;", "=h,=h,r", [words],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
        two = tl.join(low, high)
        made = tl.join(two, two)
        if BITS != 8:
            made = tl.join(made, made)
        made = _laid_out(made, BITS, B, BN, WG)
    else:
        made = tl.full((B, BN, INPUTS), 1.0, kind)
    return made


@triton.jit
def _tokens(x, at, k, M, K: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """Inputs of batches `at`, (B, UNIT) for one token and (B, UNIT, COLS) for more; 0 outside."""
    where = at[:, None] * UNIT + k[None, :]
    if COLS > 0:
        m = tl.arange(0, COLS)
        inside = (where < K)[:, :, None] & (m < M)[None, None, :]
        inputs = tl.load(x + where[:, :, None] + m[None, None, :] * K, mask=inside, other=0.0)
    elif EVEN:
        inputs = tl.load(x + where)
    else:
        inputs = tl.load(x + where, mask=where < K, other=0.0)
    return inputs


@triton.jit
def _ordered(
    inputs, PLANE: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, WG: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """(B, inputs, columns) in the order of `_laid_out`: what a plane's weights are multiplied by."""
    C: tl.constexpr = 1 if COLS == 0 else COLS
    INPUTS: tl.constexpr = WG * (4 if BITS == 8 else 8)
    if BITS == 8:
        chosen = tl.reshape(inputs, (B, WG // 8, 2, 4, 2, 2, C))
        chosen = tl.permute(chosen, (0, 1, 4, 3, 2, 5, 6))
    elif BITS == 4:
        chosen = tl.reshape(inputs, (B, WG // 4, 4, 2, 2, 2, C))
        chosen = tl.permute(chosen, (0, 1, 4, 2, 3, 5, 6))
    else:
        parts = tl.reshape(inputs, (B, WG // 4, 4, 2, 2, 2, 2, C))
        one, other = tl.split(tl.permute(parts, (0, 1, 5, 2, 3, 6, 7, 4)))
        chosen = one if PLANE == 0 else other
    chosen = tl.reshape(chosen, (B, INPUTS, C))
    return tl.broadcast_to(chosen, (B, INPUTS, 8)) if COLS == 0 else chosen


@triton.jit
def _coded(
    words, inputs, start, BITS: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, WG: tl.constexpr,
    COLS: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """`start`, (B, BN, columns), plus the sums of (OFF of the plane + code) * input."""
    taken = _ordered(inputs, 0, BITS, B, WG, COLS)
    found = tl.dot(_weights(words, 0, BITS, B, BN, WG, kind), taken, start, input_precision="ieee")
    if BITS != 4:
        others = _ordered(inputs, 1, BITS, B, WG, COLS)
        found = tl.dot(_weights(words, 1, BITS, B, BN, WG, kind), others, found, input_precision="ieee")
    return found


@triton.jit
def _too_much(first, second, zero, BITS: tl.constexpr, kind: tl.constexpr):
    """What `_coded` has beyond (code - zero) * input, from the sums of the inputs of either plane."""
    OFF: tl.constexpr = 128.0 if PTX and kind == tl.bfloat16 else 0.0
    if BITS == 2:
        found = (OFF + zero) * first + (OFF / 4 + zero) * second
    else:
        found = ((17 if BITS == 8 else 1) * OFF + zero) * first
    return found


@triton.jit
def _planes_alone(inputs, k, BITS: tl.constexpr):
    """Inputs (B, UNIT), float32, with 0 for those of the second plane, and the others alike; all, twice, of one plane.

    8 bits have two planes of the same inputs.
    """
    wide = inputs.to(tl.float32)
    if BITS == 2:
        is_second = (k & 4)[None, :] != 0
        first, second = tl.where(is_second, 0.0, wide), tl.where(is_second, wide, 0.0)
    else:
        first, second = wide, wide
    return first, second


@triton.jit
def _input_sums(
    words, inputs, PLANE: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, WG: tl.constexpr,
    COLS: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """(B, BN, columns), the same in all rows: sums of a plane's inputs, by a product with ones."""
    C: tl.constexpr = 8 if COLS == 0 else COLS
    nothing = tl.zeros((B, 16, C), tl.float32)
    taken = _ordered(inputs, PLANE, BITS, B, WG, COLS)
    if BN == 32:
        # Sixteen rows of them are enough for both halves.
        half, _ = tl.split(tl.permute(tl.reshape(words, (B, 2, 16, WG)), (0, 2, 3, 1)))
        found = tl.dot(_ones(half, BITS, B, 16, WG, kind), taken, nothing, input_precision="ieee")
        found = tl.reshape(tl.permute(tl.join(found, found), (0, 3, 1, 2)), (B, BN, C))
    else:
        ones = _ones(words, BITS, B, BN, WG, kind)
        found = tl.dot(ones, taken, tl.zeros((B, BN, C), tl.float32), input_precision="ieee")
    return found


@triton.jit
def _sums(
    words, inputs, zero, BITS: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, WG: tl.constexpr,
    COLS: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """(B, BN, columns) sums of (code - zero) * input, `zero` being a number or (B, BN, 1)."""
    nothing = tl.zeros((B, BN, 8 if COLS == 0 else COLS), tl.float32)
    found = _coded(words, inputs, nothing, BITS, B, BN, WG, COLS, kind)
    first = _input_sums(words, inputs, 0, BITS, B, BN, WG, COLS, kind)
    second = first
    if BITS == 2:
        second = _input_sums(words, inputs, 1, BITS, B, BN, WG, COLS, kind)
    return found - _too_much(first, second, zero, BITS, kind)


@triton.jit
def _words(rows, at, w, n, N, WG: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """(B, BN, WG) words of rows at `rows`, (1, BN, 1), in batches `at`; 0 outside."""
    j = at[:, None] * WG + w[None, :]
    if EVEN:
        words = tl.load(rows + j[:, None, :], eviction_policy="evict_first")
    else:
        inside = (n[None, :, None] < N) & (j[:, None, :] < WIDTH)
        words = tl.load(rows + j[:, None, :], mask=inside, other=0, eviction_policy="evict_first")
    return words


@triton.jit
def _of_groups(values, n, at, N, K: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr):
    """(B, BN) float32: scales or zeros of rows `n` and batches `at`."""
    where = n[None, :] * (K // GROUP) + (at * UNIT // GROUP)[:, None]
    inside = (n[None, :] < N) & (at * UNIT < K)[:, None]
    return tl.load(values + where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _input_weights(k, BITS: tl.constexpr, Z: tl.constexpr, kind: tl.constexpr):
    """(K, 8) of `kind`: what `_too_much` has of each input, and in every second column what zeros multiply.

    All of it are whole numbers of eight bits or less times a power of two, which bf16 holds.
    """
    OFF: tl.constexpr = 128 if PTX and kind == tl.bfloat16 else 0
    FIRST: tl.constexpr = (17 if BITS == 8 else 1) * OFF + max(Z, 0)
    SECOND: tl.constexpr = OFF // 4 + max(Z, 0) if BITS == 2 else FIRST
    of_plane = tl.where((k & 4) != 0, SECOND * 1.0, FIRST * 1.0)[:, None]
    return tl.where((tl.arange(0, 8) & 1)[None, :] != 0, 1.0, of_plane).to(kind)


@triton.jit
def _offset(
    x, scales, zeros, n, N, group,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, BN: tl.constexpr,
    COUNT: tl.constexpr, EVEN: tl.constexpr, kind: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BN,) float32: sum over COUNT groups, from `group` on, of scale * `_too_much`. Sums of inputs are a product too.

    Its scales and zeros are asked for before the inputs are waited for.
    """
    G: tl.constexpr = max(16, triton.next_power_of_2(COUNT))
    k = tl.arange(0, GROUP)
    g = group + tl.arange(0, G)
    inside = (tl.arange(0, G) < COUNT) & (g < K // GROUP)
    at = n[:, None] * (K // GROUP) + g[None, :]
    within = (n < N)[:, None] & inside[None, :]
    scale = tl.load(scales + at, mask=within, other=0.0)
    if Z < 0:
        zero = tl.load(zeros + at, mask=within, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    where = x + g[:, None] * GROUP + k[None, :]
    if EVEN and COUNT == G:
        inputs = tl.load(where)
    else:
        inputs = tl.load(where, mask=inside[:, None], other=0.0)
    summed = tl.dot(inputs.to(kind), _input_weights(k, BITS, Z, kind), input_precision="ieee")
    off, of_zero = tl.split(tl.reshape(summed, (G, 4, 2)))
    off = tl.max(off, axis=1)[None, :]
    if Z < 0:
        off += zero.to(tl.float32) * tl.max(of_zero, axis=1)[None, :]
    return tl.sum(off * scale.to(tl.float32), axis=1)


@triton.jit
def _halved(found, B: tl.constexpr, BN: tl.constexpr):
    """(B, BN, 4): every second of eight equal columns."""
    half, _ = tl.split(tl.reshape(found, (B, BN, 4, 2)))
    return half


@triton.jit
def _prefetch(data, n, N, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Have the first 128-byte lines of rows brought to the L2, waiting for nothing."""
    line = tl.arange(0, LINES)
    row = tl.minimum(n, N - 1)[:, None].to(tl.int64) * WIDTH + tl.minimum(line * 32, WIDTH - 1)[None, :]
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [data + row], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _in_steps(
    x, data, scales, zeros, n, N, M, first,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, BN: tl.constexpr,
    STEPS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, B: tl.constexpr, WG: tl.constexpr,
    kind: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BN, columns) float32, see `packed_products`: words come through shared memory, some steps ahead."""
    FIELDS: tl.constexpr = 32 // BITS
    UNIT: tl.constexpr = WG * FIELDS
    b, w, k = tl.arange(0, B), tl.arange(0, WG), tl.arange(0, UNIT)
    rows = data + n[None, :, None].to(tl.int64) * (K // FIELDS)
    acc = tl.zeros((B, BN, 8 if COLS == 0 else COLS), tl.float32)
    zero = 1.0 * Z
    if GROUP < K:
        scale = _of_groups(scales, n, first * B + b, N, K, GROUP, UNIT)
        if Z < 0:
            zero = _of_groups(zeros, n, first * B + b, N, K, GROUP, UNIT)
    elif Z < 0:
        zero = tl.load(zeros + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if PDL:
        _prefetch(data, n, N, K // FIELDS, min(8, triton.next_power_of_2(triton.cdiv(K // FIELDS, 32))))
        tl.extra.cuda.gdc_wait()
    if GROUP == K and COLS == 0:
        one = tl.zeros((B, UNIT), tl.float32)
        other = tl.zeros((B, UNIT), tl.float32)
        for step in range(STEPS):
            at = (first + step) * B + b
            words = _words(rows, at, w, n, N, WG, K // FIELDS, EVEN)
            inputs = _tokens(x, at, k, M, K, UNIT, COLS, EVEN).to(kind)
            acc = _coded(words, inputs, acc, BITS, B, BN, WG, COLS, kind)
            more, others = _planes_alone(inputs, k, BITS)
            one += more
            other += others
        off = _too_much(tl.sum(one, axis=1)[:, None], tl.sum(other, axis=1)[:, None], zero, BITS, kind)
        acc -= off[:, :, None]
    else:
        for step in range(STEPS):
            at = (first + step) * B + b
            words = _words(rows, at, w, n, N, WG, K // FIELDS, EVEN)
            inputs = _tokens(x, at, k, M, K, UNIT, COLS, EVEN).to(kind)
            found = _sums(words, inputs, zero if Z >= 0 else zero[:, :, None], BITS, B, BN, WG, COLS, kind)
            if GROUP < K:
                acc += found * scale[:, :, None]
                # A step ahead: they are too small to come with the words.
                scale = _of_groups(scales, n, at + B, N, K, GROUP, UNIT)
                if Z < 0:
                    zero = _of_groups(zeros, n, at + B, N, K, GROUP, UNIT)
            else:
                acc += found
    return tl.sum(acc, axis=0)


@triton.jit
def _at_once(
    x, data, scales, zeros, n, N, first,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, B: tl.constexpr, WG: tl.constexpr, kind: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BN, columns) float32, see `packed_products`, for one token and words that fit the registers.

    All of them are loaded before the inputs are there: what is left to do then takes no memory's time.
    """
    FIELDS: tl.constexpr = 32 // BITS
    UNIT: tl.constexpr = WG * FIELDS
    b, w, k = tl.arange(0, B), tl.arange(0, WG), tl.arange(0, UNIT)
    rows = data + n[None, :, None].to(tl.int64) * (K // FIELDS)
    nothing = tl.zeros((B, BN, 8), tl.float32)
    words = _words(rows, first * B + b, w, n, N, WG, K // FIELDS, EVEN)
    if GROUP < K and B * UNIT % GROUP == 0:
        scale = _of_groups(scales, n, first * B + b, N, K, GROUP, UNIT)
        COUNT: tl.constexpr = B * UNIT // GROUP
        off = _offset(
            x, scales, zeros, n, N, first * B * UNIT // GROUP, K, BITS, GROUP, Z, BN, COUNT, EVEN, kind, PDL
        )  # fmt: skip
        inputs = _tokens(x, first * B + b, k, 1, K, UNIT, 0, EVEN).to(kind)
        acc = _halved(_coded(words, inputs, nothing, BITS, B, BN, WG, 0, kind), B, BN) * scale[:, :, None]
        made = tl.sum(acc, axis=0) - off[:, None]
    else:
        zero = 1.0 * Z
        if GROUP < K:
            scale = _of_groups(scales, n, first * B + b, N, K, GROUP, UNIT)
            if Z < 0:
                zero = _of_groups(zeros, n, first * B + b, N, K, GROUP, UNIT)
        elif Z < 0:
            zero = tl.load(zeros + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if PDL:
            tl.extra.cuda.gdc_wait()
        inputs = _tokens(x, first * B + b, k, 1, K, UNIT, 0, EVEN).to(kind)
        one, other = _planes_alone(inputs, k, BITS)
        ones, others = tl.sum(one, axis=1)[:, None], tl.sum(other, axis=1)[:, None]
        acc = _coded(words, inputs, nothing, BITS, B, BN, WG, 0, kind)
        acc -= _too_much(ones, others, zero, BITS, kind)[:, :, None]
        if GROUP < K:
            acc *= scale[:, :, None]
        made = tl.sum(acc, axis=0)
    return made


@triton.jit
def packed_products(
    x, data, scales, zeros, n, N, M, first,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """(BN, COLS) float32: rows `n` times each of `M` tokens of `x`; (BN, 8 or 4), all alike, for one token and COLS 0.

    `STEPS` steps of `BW` words from step `first` on; what lies beyond a row's end counts nothing.
    """
    FIELDS: tl.constexpr = 32 // BITS
    WG: tl.constexpr = 16 if GROUP == K or GROUP // FIELDS >= 16 else GROUP // FIELDS
    B: tl.constexpr = BW // WG
    kind: tl.constexpr = x.dtype.element_ty if PTX else tl.float32
    if STEPS == 1 and COLS == 0:
        made = _at_once(x, data, scales, zeros, n, N, first, K, BITS, GROUP, Z, BN, EVEN, B, WG, kind, PDL)
    else:
        made = _in_steps(
            x, data, scales, zeros, n, N, M, first, K, BITS, GROUP, Z, BN, STEPS, COLS, EVEN, B, WG, kind, PDL
        )  # fmt: skip
    if GROUP == K:
        made *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return made
