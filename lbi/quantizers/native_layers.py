"""A linear layer that is stored as lbi's own kernels read it.

On a GPU up to 16 tokens are multiplied by the packed weights, more by unpacked ones. On a CPU
there is no kernel: torch unpacks at every call.
"""

from __future__ import annotations

from typing import Any

import torch

from lbi.config import QuantizerConfig
from lbi.kernels.formats import Packed
from lbi.kernels.packed_ops import packed_linear
from lbi.quantizers.native_rounding import packed


class NativeLinear(torch.nn.Module):
    """y = x @ W.T + bias; `data`, `scales` and `zeros` are those of the matrix (lbi/kernels/formats.py)."""

    def __init__(self, matrix: Packed, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.format, self.in_features, self.out_features = matrix.format, matrix.inputs, matrix.rows
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("zeros", matrix.zeros)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: Any, config: QuantizerConfig) -> NativeLinear:
        """The layer's weights, rounded as `config` says. Raises `ValueError` where the format cannot hold them."""
        return cls(packed(linear.weight, config), None if linear.bias is None else linear.bias.detach())

    def matrix(self) -> Packed:
        """What is stored, as the kernels take it."""
        return Packed(self.format, self.in_features, self.data, self.scales, self.zeros)

    def adopt(self, matrix: Packed) -> None:
        """Let this layer be a view of `matrix`, which holds the same weights."""
        self.data, self.scales, self.zeros = matrix.data, matrix.scales, matrix.zeros

    @property
    def kind(self) -> str:
        """The format, and what multiplies by it where that is not a kernel of lbi's."""
        return f"NativeLinear[{self.format}{', torch' if self.data.is_cpu else ''}]"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out) in the inputs' type."""
        flat = inputs.reshape(-1, self.in_features)
        product = packed_linear(flat, self.data, self.scales, self.zeros, self.bias, self.format)
        return product.view(*inputs.shape[:-1], self.out_features)
