"""Products of a matrix and one token, or a few: the kernels, and the loop for weights that are not packed.

A program has a few rows of W and reads them once, in 16-byte loads. `row_products` is also what
the kernels of the fused engine call, which differ in what they do before and after it. Packed
weights take another way (packed.py).
"""

import triton
import triton.language as tl

from lbi.kernels.device.packed import packed_products


@triton.jit
def _load(data, n, j, N, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """(BN, BW) of the matrix; what is outside of it reads 0."""
    where = data + n[:, None].to(tl.int64) * WIDTH + j[None, :]
    if EVEN:
        return tl.load(where, eviction_policy="evict_first")
    return tl.load(where, mask=(n[:, None] < N) & (j[None, :] < WIDTH), other=0.0, eviction_policy="evict_first")


@triton.jit
def _plain_products(
    x, data, scales, n, N, first,
    K: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`row_products` of weights in the model's type or e4m3.

    The first block is loaded before the inputs are waited for (PDL): weights depend on nothing.
    """
    acc = tl.zeros((BN, BW), tl.float32)
    weights = _load(data, n, first * BW + tl.arange(0, BW), N, K, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in tl.static_range(STEPS):
        k = (first + step) * BW + tl.arange(0, BW)
        if step + 1 < STEPS:
            following = _load(data, n, k + BW, N, K, EVEN)
        acc += weights.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if step + 1 < STEPS:
            weights = following
    found = tl.sum(acc, axis=1)
    if scales is not None:
        found *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    return found


@triton.jit
def row_products(
    x, data, scales, zeros, n, N, first,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(BN,) float32: rows `n` of the matrix times `x`, over `STEPS` blocks of `BW` words from block `first` on.

    BITS is 0 for weights that are not packed; a word is then one of them.
    """
    if BITS == 0:
        found = _plain_products(x, data, scales, n, N, first, K, BN, BW, STEPS, EVEN, PDL)
    else:
        found = packed_products(
            x, data, scales, zeros, n, N, 1, first, K, BITS, GROUP, Z, BN, BW, STEPS, 0, EVEN, PDL
        )  # fmt: skip
        # Columns of one token: a power of two of equal values adds up exactly.
        found = tl.sum(found, axis=1) / found.shape[1]
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
    COLS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Up to `COLS` tokens at once, in the tensor cores."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, COLS)
    if BITS == 0:
        acc = tl.zeros((BN, COLS), tl.float32)
        for step in range(STEPS):
            k = step * BW + tl.arange(0, BW)
            weights = _load(data, n, k, N, K, EVEN)
            inside = (k[:, None] < K) & (m[None, :] < M)
            inputs = tl.load(x + m[None, :] * K + k[:, None], mask=inside, other=0.0)
            if weights.dtype.primitive_bitwidth == 8:
                weights = weights.to(tl.float32)
            acc = tl.dot(weights.to(inputs.dtype), inputs, acc, input_precision="ieee")
        if scales is not None:
            acc *= tl.load(scales + n, mask=n < N, other=0.0)[:, None]
    else:
        acc = packed_products(
            x, data, scales, zeros, n, N, M, 0, K, BITS, GROUP, Z, BN, BW, STEPS, COLS, EVEN, False
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + m[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


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
    if BITS == 0:
        value = (words.to(tl.float32) * scale)[:, :, None]
    else:
        # Weights of a word in their order; formats.py says where each lies.
        k = tl.arange(0, FIELDS)
        pair = k // 2
        if BITS == 2:
            pair = pair & 4 | (pair & 1) << 1 | pair >> 1 & 1
        shift = BITS * (pair + k % 2 * (FIELDS // 2))
        codes = (words[:, :, None] >> shift[None, None, :] & (2**BITS - 1)).to(tl.float32)
        if Z < 0:
            zero = tl.load(zeros + where, mask=inside, other=0.0).to(tl.float32)
            value = (codes - zero[:, :, None]) * scale[:, :, None]
        else:
            value = (codes - Z) * scale[:, :, None]
    field = tl.arange(0, FIELDS)
    to = out + n[:, None, None].to(tl.int64) * K + (j * FIELDS)[None, :, None] + field[None, None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=inside[:, :, None])
