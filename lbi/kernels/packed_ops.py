"""The product with a packed matrix as one torch operator, whatever the number of tokens and the device.

An operator, so that torch.compile with fullgraph takes it without looking inside, and a CUDA
graph captures what it launches; defined as in ternary_ops.py, without `custom_op`'s 44 µs a
call. Triton is imported at the first call on a GPU: a CPU has no use for it, and may not have it.
"""

from __future__ import annotations

import torch

from lbi.kernels.formats import Packed


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
    from lbi.kernels.gemv import MOST_ROWS, dequantized, gemv, matmul_small

    # Rows of a matrix that two layers share may lie in turn; the kernels read rows one after the other.
    data, scales, zeros = data.contiguous(), _contiguous(scales), _contiguous(zeros)
    x, matrix = x.contiguous(), Packed(kind, x.shape[1], data, scales, zeros)
    if x.shape[0] == 1:
        return gemv(x.view(-1), matrix, bias).view(1, -1)
    if x.shape[0] <= MOST_ROWS:
        return matmul_small(x, matrix, bias)
    return torch.nn.functional.linear(x, dequantized(matrix, x.dtype), bias)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
