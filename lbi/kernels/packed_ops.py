"""The product with a packed matrix as one torch operator, whatever the number of tokens and the device.

An operator, so that torch.compile with fullgraph takes it without looking inside, and a CUDA
graph captures what it launches; defined as in ternary_ops.py, without `custom_op`'s 44 µs a
call. Triton is imported at the first call on a GPU: a CPU has no use for it, and may not have it.
"""

from __future__ import annotations

import torch

from lbi.kernels.formats import Packed

MOST_AT_ONCE = 1 << 25
"""Weights that a GPU unpacks at once for many tokens: 7 bytes of buffers each, 235 MB."""


def packed_linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    """(M, rows) of `x`'s type: `x`, (M, inputs), times the matrix, plus `bias`, (rows,).

    The matrix is given by its tensors and the name of its format: an operator takes no dataclass.
    """
    return torch.ops.lbi.packed_linear(x, data, scales, zeros, bias, kind)  # type: ignore[no-any-return]


def _on_cpu(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    # A CPU without bf16 instructions multiplies float32 at eight times the speed.
    weight = Packed(kind, x.shape[1], data, scales, zeros).dequantize(torch.float32)
    product = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return product.to(x.dtype)


def _on_gpu(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    from lbi.kernels.gemv import MOST_ROWS, gemv, matmul_small

    x, matrix = x.contiguous(), Packed(kind, x.shape[1], data, scales, zeros)
    if x.shape[0] == 1:
        return gemv(x.view(-1), matrix, bias).view(1, -1)
    return matmul_small(x, matrix, bias) if x.shape[0] <= MOST_ROWS else unpacked_linear(x, matrix, bias)


def unpacked_linear(x: torch.Tensor, matrix: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """`packed_linear` by the device's own matrix product, from some rows' unpacked weights after the other's."""
    step = max(1, MOST_AT_ONCE // matrix.inputs)
    parts = []
    for start in range(0, matrix.rows, step):
        chosen = slice(start, start + step)
        scales, zeros = (None if given is None else given[chosen] for given in (matrix.scales, matrix.zeros))
        part = Packed(matrix.format, matrix.inputs, matrix.data[chosen], scales, zeros)
        added = None if bias is None else bias[chosen]
        parts.append(torch.nn.functional.linear(x, part.dequantize(x.dtype), added))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _define() -> None:
    torch.library.define(
        "lbi::packed_linear",
        "(Tensor x, Tensor data, Tensor? scales, Tensor? zeros, Tensor? bias, str kind) -> Tensor",
    )
    torch.library.impl("lbi::packed_linear", "CPU", _on_cpu)
    torch.library.impl("lbi::packed_linear", "CUDA", _on_gpu)
    torch.library.register_fake(
        "lbi::packed_linear",
        lambda x, data, scales, zeros, bias, kind: x.new_empty(x.shape[0], data.shape[0]),
    )


_define()
