"""Products of a packed matrix and one token, or a few.

A program has a few rows of W and reads them once, in 16-byte loads, all of a step before the
first is needed. The inner loop is what decides below 8 bits, where a GPU has about two integer
instructions a weight at full bandwidth: so a code q is put into the mantissa of a float
(shift, and-or: v = 1 + q / 2^bits) and multiplied as it is; that 1 is taken off once a group:

    sum (q - z) x  =  2^bits * sum v x  -  (2^bits + z) * sum x

`row_products` is the loop, for the kernels of the fused engine too, which differ in what they do
before and after it.
"""

import triton
import triton.language as tl


@triton.jit
def _floats(words, field: tl.constexpr, BITS: tl.constexpr):
    """1 + q / 2^BITS, q being the field of each word."""
    TOP: tl.constexpr = 23 - BITS
    LOW: tl.constexpr = field * BITS
    if LOW <= TOP:
        moved = words << (TOP - LOW)
    else:
        moved = words >> (LOW - TOP)
    MASK: tl.constexpr = (2**BITS - 1) * 2**TOP
    return ((moved & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _load(data, n, j, N, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """(BN, BW) of the matrix; what is outside of it reads 0."""
    where = data + n[:, None].to(tl.int64) * WIDTH + j[None, :]
    if EVEN:
        return tl.load(where, eviction_policy="evict_first")
    return tl.load(where, mask=(n[:, None] < N) & (j[None, :] < WIDTH), other=0.0, eviction_policy="evict_first")


@triton.jit
def _step(
    words, x, scales, zeros, acc, sums, n, j, N,
    K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Add the products of one block of words (or plain weights, BITS 0) with their inputs.

    One return at the end: Triton compiles what follows a return inside an if, whatever the if says.
    """
    if BITS == 0:
        inputs = tl.load(x + j, mask=j < WIDTH, other=0.0).to(tl.float32)
        acc += words.to(tl.float32) * inputs[None, :]
    else:
        FIELDS: tl.constexpr = 32 // BITS
        ONE: tl.constexpr = 2**BITS
        start = j // 4 * (4 * FIELDS) + j % 4
        part = tl.zeros_like(acc)
        total = tl.zeros_like(sums)
        for field in tl.static_range(FIELDS):
            if EVEN:
                inputs = tl.load(x + start + 4 * field).to(tl.float32)
            else:
                inputs = tl.load(x + start + 4 * field, mask=j < WIDTH, other=0.0).to(tl.float32)
            part += _floats(words, field, BITS) * inputs[None, :]
            total += inputs
        if GROUP == K:
            acc += part
            sums += total
        else:
            GROUPS: tl.constexpr = K // GROUP
            where = n[:, None] * GROUPS + (j // (GROUP // FIELDS))[None, :]
            inside = (n[:, None] < N) & (j[None, :] < WIDTH)
            scale = tl.load(scales + where, mask=inside, other=0.0).to(tl.float32)
            if Z >= 0:
                acc += scale * (part * ONE - (total * (ONE + Z))[None, :])
            else:
                zero = tl.load(zeros + where, mask=inside, other=0.0).to(tl.float32)
                acc += scale * (part * ONE - (zero + ONE) * total[None, :])
    return acc, sums


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
    acc = tl.zeros((BN, BW), tl.float32)
    sums = tl.zeros((BW,), tl.float32)
    j = first * BW + tl.arange(0, BW)
    words = _load(data, n, j, N, WIDTH, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in tl.static_range(STEPS):
        if step + 1 < STEPS:
            following = _load(data, n, j + BW, N, WIDTH, EVEN)
        acc, sums = _step(words, x, scales, zeros, acc, sums, n, j, N, K, WIDTH, BITS, GROUP, Z, EVEN)
        if step + 1 < STEPS:
            words = following
            j += BW
    found = tl.sum(acc, axis=1)
    if GROUP == K and BITS > 0:
        zero = tl.load(zeros + n, mask=n < N, other=0.0).to(tl.float32) if Z < 0 else Z
        found = found * (2**BITS) - tl.sum(sums, axis=0) * (2**BITS + zero)
    if GROUP == K and scales is not None:
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
                weights = ((_floats(words, field, BITS) - 1.0) * (2**BITS) - zero) * scale
            else:
                weights = (_floats(words, field, BITS) - 1.0) * (2**BITS) - Z
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
            value = ((_floats(words, field, BITS) - 1.0) * (2**BITS) - zero) * scale
        to = out + n[:, None].to(tl.int64) * K + (start + 4 * field)[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=inside)
