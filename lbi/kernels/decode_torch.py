"""decode.py's operations in torch: for a CPU, and what the kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lbi.kernels import cache_ops
from lbi.kernels.cache_formats import CacheFormat
from lbi.kernels.formats import Packed


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama: `hidden` values of the stream, query heads, key-value heads and their `width`, `slots` of
    the cache in tokens, `eps` of the norms."""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    slots: int
    eps: float


class TorchSteps:
    """The operations of a step, in the order in which a model calls them."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, cache: CacheFormat | None = None
    ) -> None:
        self.shape, self.dtype, self.cache = shape, dtype, cache
        self.tokens = torch.zeros(shape.slots + 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.values = torch.zeros(shape.hidden, device=device)
        self.gained = torch.zeros(shape.hidden, dtype=dtype, device=device)
        self.logits = torch.zeros(0)

    def embed(self, table: torch.Tensor, row_scales: torch.Tensor | None, gain: torch.Tensor) -> None:
        """See `TritonSteps.embed`."""
        token = self.tokens[self.position]
        values = table[token][0].float()
        self._flow(values if row_scales is None else values * row_scales[token].float(), gain)

    def norm_product(self, matrix: Packed) -> torch.Tensor:
        """See `TritonSteps.norm_product`."""
        root = torch.rsqrt(self.values.square().mean() + self.shape.eps)
        return times(matrix, self.gained).float() * root

    def norm_product_swiglu(self, matrix: Packed) -> torch.Tensor:
        """See `TritonSteps.norm_product_swiglu`."""
        gate, up = self.norm_product(matrix).view(-1, 2).unbind(1)
        return (F.silu(gate) * up).to(self.dtype)

    def product_add(self, matrix: Packed, x: torch.Tensor, gain: torch.Tensor) -> None:
        """See `TritonSteps.product_add`."""
        self._flow(self.values + times(matrix, x).float(), gain)

    def attention(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: Any, values: Any
    ) -> torch.Tensor:
        """See `TritonSteps.attention`."""
        shape, now = self.shape, int(self.position)
        heads, kv, width = shape.heads, shape.kv_heads, shape.width
        q, k, v = qkv.split([heads * width, kv * width, kv * width])
        q, k = (rotate(part.view(-1, width), cos[now], sin[now]).to(self.dtype) for part in (q, k))
        if self.cache is not None:
            cache_ops.put(keys, k[:, None], self.position, self.cache)
            cache_ops.put(values, v.view(kv, 1, width).to(self.dtype), self.position, self.cache)
            scale = width**-0.5
            return cache_ops.attend(q[:, None], keys, values, self.position, self.cache, scale, offset=1).reshape(-1)
        keys[:, now], values[:, now] = k, v.view(kv, width).to(values.dtype)
        mixed = F.scaled_dot_product_attention(
            q[None, :, None], keys[None, :, : now + 1], values[None, :, : now + 1], enable_gqa=heads != kv
        )
        return mixed.reshape(-1).to(self.dtype)

    def head(self, matrix: Packed, turn: int = 0) -> torch.Tensor:
        """See `TritonSteps.head`."""
        self.logits = self.norm_product(matrix)
        return self.logits

    def next_token(self) -> None:
        """See `TritonSteps.next_token`."""
        self.put(self.logits.argmax(keepdim=True))

    def put(self, token: torch.Tensor) -> None:
        """See `TritonSteps.put`."""
        self.position.add_(1)
        self.tokens.index_copy_(0, self.position.long(), token)

    def _flow(self, values: torch.Tensor, gain: torch.Tensor) -> None:
        self.values = values
        self.gained = (values * gain.float()).to(self.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` (..., width) turned by angles of (..., width / 2); the halves are turned into each other."""
    one, two = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def times(matrix: Packed, x: torch.Tensor) -> torch.Tensor:
    """(..., rows): the matrix times `x`, (..., inputs), in the type of `x`."""
    return F.linear(x, matrix.dequantize(x.dtype))
