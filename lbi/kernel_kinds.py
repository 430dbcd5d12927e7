"""What a kernel or an operator does, by its name: matrix products, attention, norms, copies and so on.

Names are those of PyTorch 2.13's operators and kernels, cuBLAS, CUTLASS, TorchAO, HQQ, GemLite, inductor and lbi. A
fused kernel counts as what it is mostly for: a norm at the front of a product is a product.
"""

from __future__ import annotations

import re

OTHER = "other"

KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|flash|fmha|sdpa|softmax|SoftMax"),
    (
        "products",
        r"gemm|gemv|gemlite|cutlass|cublas|nvjet|splitK|tinygemm|int4pack|int8pack|int4mm|_int_mm|scaled_mm|mkldnn|onednn"
        r"|norm_product|product_add|packed_products|small_kernel|sum_kernel|^head$|ternary|rsr"
        r"|\bmm\b|addmm|\bbmm\b|baddbmm|aten::linear|aten::matmul|_mm(_|$)|_mv(_|$)|aten::mv|aten::dot",
    ),
    ("choice of the token", r"argmax|ArgMax|topk|TopK|multinomial|next_token|aten::sort|exponential|cumsum"),
    ("unpacking", r"dequantize|unpack|bitwise|__rshift__|shift|aten::__and__|aten::choose_qparams|quantize_affine"),
    ("norms", r"rms_?norm|RMSNorm|layer_?norm|LayerNorm|rsqrt|aten::mean|MeanOps|aten::pow|pow_tensor"),
    (
        "copies",
        r"copy|Memcpy|Memset|memset|aten::cat$|CatArray|index_put|index_copy|scatter|gather|aten::index|index_select"
        r"|embed|aten::fill_|FillFunctor|aten::zero_|aten::clone|aten::contiguous|\bput\b",
    ),
    (
        "element by element",
        r"elementwise|triton_poi|aten::(mul|add|sub|div|silu|neg|cos|sin|where|exp|abs|clamp|round|l[et]|g[et]|eq)"
        r"|mul_|add_|silu|aten::arange",
    ),
    (
        "views and allocation",
        r"aten::(view|_unsafe_view|reshape|_reshape_alias|transpose|t|permute|slice|narrow|select|unsqueeze|squeeze|expand"
        r"|flatten|alias|as_strided|empty|empty_like|empty_strided|detach|resolve_conj|resolve_neg|result_type|to|item"
        r"|_local_scalar_dense|unfold|split|chunk)$",
    ),
)
"""Kinds and patterns of names; the first that is found counts."""

COMPILED = re.compile(r"triton_(red|per|tem)|CompiledFxGraph|^kernel_cpp|^cpp_fused|Torch-Compiled", re.IGNORECASE)
"""Inductor's fusions whose name does not tell more."""

_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)


def kind_of(name: str) -> str:
    """The kind of a kernel or operator."""
    found = next((kind for kind, pattern in _PATTERNS if pattern.search(name)), None)
    if found:
        return found
    return "compiled, of several kinds" if COMPILED.search(name) else OTHER
