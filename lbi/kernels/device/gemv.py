"""Products of a packed matrix and one token, or a few.

A program has a few rows of W and reads them once, in 16-byte loads, all of a step before the
first is needed. The inner loop is what decides below 8 bits, where a GPU has about two integer
instructions a weight at full bandwidth: so a code q is put into the mantissa of a float (a byte's
share of a shift, and an and-or: v = 1 + q / 2^e) and multiplied as it is, by an input that was
scaled for the code's place in its byte; what the ones add up to is taken off once a group:

    sum (q - z) x  =  2^bits * (sum v x' - sum x')  -  z * sum x,    x' = x * 2^(e - bits)

`row_products` is the loop, for the kernels of the fused engine too, which differ in what they do
before and after it.
"""

import triton
import triton.language as tl

PTX = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether inline assembly can be used: Triton's interpreter knows none."""


@triton.jit
def _float(words, field: tl.constexpr, BITS: tl.constexpr):
    """1 + q / 2^(8 - BITS * r), q being the field of each word and r its place in its byte, from 0.

    A byte's fields share one shift, to the upper end of the mantissa, and stay where they are in it.
    """
    PER: tl.constexpr = 8 // BITS
    LOW: tl.constexpr = field // PER * 8
    if LOW <= 15:
        moved = words << (15 - LOW)
    else:
        moved = words >> (LOW - 15)
    MASK: tl.constexpr = (2**BITS - 1) * 2 ** (15 + BITS * (field % PER))
    if PTX:
        # ptxas makes two instructions of an and with one constant and an or with another.
        mask, one = tl.full((1, 1), MASK, tl.int32), tl.full((1, 1), 0x3F800000, tl.int32)
        made = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [moved, mask, one], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        made = (moved & MASK) | 0x3F800000
    return made.to(tl.float32, bitcast=True)


@triton.jit
def _code(words, field: tl.constexpr, BITS: tl.constexpr):
    """q as a float."""
    PER: tl.constexpr = 8 // BITS
    return (_float(words, field, BITS) - 1.0) * 2 ** (8 - BITS * (field % PER))


@triton.jit
def _load(data, n, j, N, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """(BN, BW) of the matrix; what is outside of it reads 0."""
    where = data + n[:, None].to(tl.int64) * WIDTH + j[None, :]
    if EVEN:
        return tl.load(where, eviction_policy="evict_first")
    return tl.load(where, mask=(n[:, None] < N) & (j[None, :] < WIDTH), other=0.0, eviction_policy="evict_first")


@triton.jit
def _step(
    words, x, scales, zeros, acc, sums, n, block, N,
    K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add the products of one block of words (or plain weights, BITS 0) with their inputs.

    One return at the end: Triton compiles what follows a return inside an if, whatever the if says.
    """
    j = block * BW + tl.arange(0, BW)
    if BITS == 0:
        inputs = tl.load(x + j, mask=j < WIDTH, other=0.0).to(tl.float32)
        acc += words.to(tl.float32) * inputs[None, :]
    else:
        FIELDS: tl.constexpr = 32 // BITS
        PER: tl.constexpr = 8 // BITS
        CHUNKS: tl.constexpr = BW // 4
        start = j // 4 * (4 * FIELDS) + j % 4
        part = tl.zeros((BN, BW), tl.float32)
        ones, total = tl.zeros((BW,), tl.float32), tl.zeros((BW,), tl.float32)
        for field in tl.static_range(FIELDS):
            if EVEN:
                inputs = tl.load(x + start + 4 * field).to(tl.float32)
            else:
                inputs = tl.load(x + start + 4 * field, mask=j < WIDTH, other=0.0).to(tl.float32)
            total += inputs
            inputs *= 2 ** (BITS * (PER - 1 - field % PER))
            ones += inputs
            part += _float(words, field, BITS) * inputs[None, :]
        # Four words are a chunk, which has one scale: from here on there is a quarter of the values.
        part = tl.sum(tl.reshape(part, (BN, CHUNKS, 4)), axis=2)
        ones, total = _by_chunk(ones, CHUNKS), _by_chunk(total, CHUNKS)
        if GROUP == K and Z >= 0:
            acc += part
            sums += ones * (2**BITS) + total * Z
        else:
            chunk = block * CHUNKS + tl.arange(0, CHUNKS)
            where = n[:, None] * (K // GROUP) + (chunk // (GROUP // (4 * FIELDS)))[None, :]
            if EVEN:
                scale = tl.load(scales + where).to(tl.float32)
            else:
                inside = (n[:, None] < N) & (chunk[None, :] < WIDTH // 4)
                scale = tl.load(scales + where, mask=inside, other=0.0).to(tl.float32)
            if Z >= 0:
                acc += scale * (part * (2**BITS) - (ones * (2**BITS) + total * Z)[None, :])
            else:
                if EVEN:
                    zero = tl.load(zeros + where).to(tl.float32)
                else:
                    zero = tl.load(zeros + where, mask=inside, other=0.0).to(tl.float32)
                acc += scale * ((part - ones[None, :]) * (2**BITS) - zero * total[None, :])
    return acc, sums


@triton.jit
def _by_chunk(values, CHUNKS: tl.constexpr):
    return tl.sum(tl.reshape(values, (CHUNKS, 4)), axis=1)


@triton.jit
def row_products(
    x, data, scales, zeros, n, N, first,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BN,) float32: rows `n` of the matrix times `x`, over `STEPS` blocks of `BW` words from block `first` on.

    The first block is loaded before the inputs are waited for (PDL): weights depend on nothing.
    """
    WIDTH: tl.constexpr = K if BITS == 0 else K * BITS // 32
    SUMS: tl.constexpr = BW if BITS == 0 else BW // 4
    acc = tl.zeros((BN, SUMS), tl.float32)
    sums = tl.zeros((SUMS,), tl.float32)
    words = _load(data, n, first * BW + tl.arange(0, BW), N, WIDTH, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in tl.static_range(STEPS):
        if step + 1 < STEPS:
            following = _load(data, n, (first + step + 1) * BW + tl.arange(0, BW), N, WIDTH, EVEN)
        acc, sums = _step(
            words, x, scales, zeros, acc, sums, n, first + step, N, K, WIDTH, BITS, GROUP, Z, BN, BW, EVEN
        )
        if step + 1 < STEPS:
            words = following
    found = tl.sum(acc, axis=1)
    if BITS > 0 and GROUP == K and Z >= 0:
        found = found * (2**BITS) - tl.sum(sums, axis=0)
    if scales is not None and (BITS == 0 or (GROUP == K and Z >= 0)):
        found *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    return found


@triton.jit
def gemv_kernel(
    x, data, scales, zeros, bias, out, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    found = row_products(
        x, data, scales, zeros, n, N, part * STEPS, K, BITS, GROUP, Z, BN, BW, STEPS, EVEN, False
    )  # fmt: skip
    if bias is not None:
        found += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + part * N + n, found.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def sum_kernel(parts, bias, out, N, PARTS: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    found = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(PARTS):
        found += tl.load(parts + part * N + n, mask=n < N, other=0.0)
    if bias is not None:
        found += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, found.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def small_kernel(
    x, data, scales, zeros, bias, out, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Up to 16 tokens: weights become the inputs' type in registers and are multiplied by the tensor cores."""
    WIDTH: tl.constexpr = K if BITS == 0 else K * BITS // 32
    FIELDS: tl.constexpr = 1 if BITS == 0 else 32 // BITS
    GROUPED: tl.constexpr = BITS > 0 and (GROUP < K or Z < 0)
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        j = step * BW + tl.arange(0, BW)
        words = _load(data, n, j, N, WIDTH, False)
        inside = (n[:, None] < N) & (j[None, :] < WIDTH)
        if GROUPED:
            where = n[:, None] * (K // GROUP) + (j // (GROUP // FIELDS))[None, :]
            scale = tl.load(scales + where, mask=inside, other=0.0).to(tl.float32)
            if Z < 0:
                zero = tl.load(zeros + where, mask=inside, other=0.0).to(tl.float32)
            else:
                zero = Z
        start = j if BITS == 0 else j // 4 * (4 * FIELDS) + j % 4
        for field in tl.static_range(FIELDS):
            where_x = x + m[:, None] * K + (start + 4 * field)[None, :]
            inputs = tl.load(where_x, mask=(m[:, None] < M) & (j[None, :] < WIDTH), other=0.0)
            if BITS == 0:
                weights = words.to(tl.float32)
            elif GROUPED:
                weights = (_code(words, field, BITS) - zero) * scale
            else:
                weights = _code(words, field, BITS) - Z
            acc = tl.dot(inputs, tl.trans(weights.to(inputs.dtype)), acc, input_precision="ieee")
    if scales is not None and not GROUPED:
        acc *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def dequantize_kernel(
    data, scales, zeros, out, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The whole matrix in the type of `out`, for the tensor cores of a long prefill."""
    WIDTH: tl.constexpr = K if BITS == 0 else K * BITS // 32
    FIELDS: tl.constexpr = 1 if BITS == 0 else 32 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = (n[:, None] < N) & (j[None, :] < WIDTH)
    words = _load(data, n, j, N, WIDTH, False)
    where = n[:, None] * (K // GROUP) + (j // (GROUP // FIELDS))[None, :]
    scale = tl.load(scales + where, mask=inside, other=0.0).to(tl.float32)
    if Z < 0:
        zero = tl.load(zeros + where, mask=inside, other=0.0).to(tl.float32)
    else:
        zero = Z
    start = j if BITS == 0 else j // 4 * (4 * FIELDS) + j % 4
    for field in tl.static_range(FIELDS):
        if BITS == 0:
            value = words.to(tl.float32) * scale
        else:
            value = (_code(words, field, BITS) - zero) * scale
        to = out + n[:, None].to(tl.int64) * K + (start + 4 * field)[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=inside)
