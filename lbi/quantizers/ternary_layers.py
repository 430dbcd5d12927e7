"""Linear layers whose weights are -1, 0 or 1 times one scale: packed in 2 bits, or as an index of sums.

Both multiply by kernels of our own on a CPU (lbi/kernels). Without a C++ compiler, and on a
GPU, the packed form is unpacked by torch at every call, which saves memory and no time.
"""

from __future__ import annotations

from typing import Any

import torch

from lbi.errors import Unsupported
from lbi.kernels import rsr_index, ternary_ops

UNPACK_ROWS = 512
"""Rows of input from which a CPU unpacks the weights once and multiplies them in float32 (docs/log.md)."""


def ternarize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BitNet b1.58's absmean rounding (arXiv 2402.17764, eq. 1 to 3): int8 codes of the weight's shape, float32 (1,).

    The scale is the mean of |W| over the whole matrix, at least 1e-5; a code is W / scale rounded and
    clamped to -1 .. 1.
    """
    wide = weight.detach().float()
    scale = wide.abs().mean().clamp(min=1e-5).reshape(1)
    return (wide / scale).round_().clamp_(-1, 1).to(torch.int8), scale


class TernaryLinear(torch.nn.Module):
    """y = (x @ codes.T) * scale + bias; `packed` is (out, in / 4) uint8, `scale` is (1,) float32."""

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.native = ternary_ops.problem() is None
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: Any) -> TernaryLinear:
        """The layer's weights, ternarized."""
        codes, scale = ternarize(linear.weight)
        return cls(ternary_ops.pack(codes), scale, _bias(linear), linear.in_features)

    @property
    def route(self) -> str:
        """What multiplies a decode step: our kernel or torch."""
        return "packed cpu kernel" if self.native and self.packed.is_cpu else "unpacked by torch"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out) in the inputs' type."""
        flat = inputs.reshape(-1, self.in_features)
        if self.native and flat.is_cpu and flat.shape[0] < UNPACK_ROWS:
            product = torch.ops.lbi.ternary_linear(flat, self.packed, self.scale)
        else:
            product = self._unpacked(flat)
        return _shaped(product, inputs, self.bias)

    def _unpacked(self, flat: torch.Tensor) -> torch.Tensor:
        # A CPU without bf16 instructions multiplies float32 at eight times the speed.
        dtype = torch.float32 if flat.is_cpu else flat.dtype
        codes = ternary_ops.unpack(self.packed, self.in_features).to(dtype)
        product = torch.nn.functional.linear(flat.to(dtype), codes)
        return (product * self.scale).to(flat.dtype)


class RsrLinear(torch.nn.Module):
    """The same product by RSR++ from blocks of `k` rows; `index` and `starts` as in lbi/kernels/rsr_index.py."""

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, k: int | None = None
    ) -> None:
        super().__init__()
        _want_operators()
        k = k or rsr_index.block_size(codes.shape[1])
        index, starts = rsr_index.build(codes.cpu().numpy(), k)
        self._hold(torch.from_numpy(index), torch.from_numpy(starts), scale, bias, (*codes.shape, k))

    def _hold(
        self,
        index: torch.Tensor,
        starts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        sizes: tuple[int, int, int],
    ) -> None:
        self.out_features, self.in_features, self.k = sizes
        self.register_buffer("index", index)
        self.register_buffer("starts", starts)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of_index(
        cls,
        index: torch.Tensor,
        starts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        sizes: tuple[int, int, int],
    ) -> RsrLinear:
        """A layer whose index is there already; `sizes` are its rows, its columns and k."""
        _want_operators()
        made = cls.__new__(cls)
        torch.nn.Module.__init__(made)
        made._hold(index, starts, scale, bias, sizes)
        return made

    @classmethod
    def of(cls, linear: Any) -> RsrLinear:
        """The layer's weights, ternarized. Raises `Unsupported` without a C++ compiler, or for rows too long."""
        if linear.in_features > rsr_index.COLUMNS:
            raise Unsupported(f"RSR's index has room for {rsr_index.COLUMNS} inputs, not {linear.in_features}")
        return cls(*ternarize(linear.weight), _bias(linear))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out) in the inputs' type."""
        flat = inputs.reshape(-1, self.in_features)
        product = torch.ops.lbi.rsr_linear(
            flat, self.index, self.starts, self.scale, self.out_features, self.k, fold=True
        )
        return _shaped(product, inputs, self.bias)


def _want_operators() -> None:
    """Load the compiled operators of RSR. Raises `Unsupported` where there are none."""
    problem = ternary_ops.problem()
    if problem:
        raise Unsupported(f"RSR has no form but the compiled one: {problem}")


def _bias(linear: Any) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _shaped(product: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    shaped = product.view(*inputs.shape[:-1], product.shape[-1])
    return shaped if bias is None else shaped + bias
