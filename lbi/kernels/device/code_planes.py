"""Codes of a low-bit cache turned into numbers that the tensor cores take, for device/cache_attention.py.

What bounds attention there is the instructions of this file, so there are as few as can be, about one a code: a byte
becomes a float16 by being put into a mantissa (1024 + code), by one instruction for two of them. What the mantissa
adds comes off again: from a key by where its dot product begins, which costs nothing, from values by a subtraction.
FMT is 0 for int8, 1 for fp8 (e4m3), 2 for int4. FAST: by inline assembly, to float16; HARD: the GPU has e4m3.
"""

import triton
import triton.language as tl

from lbi.kernels.device.cache import widened


@triton.jit
def key_planes(codes, FMT: tl.constexpr, HARD: tl.constexpr, FAST: tl.constexpr, KIND: tl.constexpr):
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
        one = widened(codes.to(tl.int32), FMT).to(KIND)
        two = one
    elif FMT == 0:
        one = codes.to(tl.int8, bitcast=True).to(KIND)
        two = one
    else:
        one, two = (codes & 15).to(KIND), (codes >> 4).to(KIND)
    return one, two


@triton.jit
def value_planes(words, FMT: tl.constexpr, HARD: tl.constexpr, FAST: tl.constexpr, KIND: tl.constexpr):
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
def high_planes(words, FAST: tl.constexpr, KIND: tl.constexpr):
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
    return widened(code, FMT).to(KIND)
