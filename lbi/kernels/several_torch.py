"""What lies between the products of a pass of several tokens behind a cache, in torch.

For a CPU, for passes that several.py's kernels do not take, and what these are tested against.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional as F

from lbi.kernels import cache_ops
from lbi.kernels.cache_formats import CacheFormat, Rows
from lbi.kernels.decode_torch import Shape, rotate

Held: TypeAlias = torch.Tensor | Rows
"""Keys, or values, of a layer: (kv heads, slots, width), or the rows of a low-bit cache."""


class TorchSeveral:
    """The operations of a pass, in the order in which a model calls them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, cache: CacheFormat | None) -> None:
        self.shape, self.dtype, self.cache = shape, dtype, cache

    def reads_live(self, count: int) -> bool:
        """Whether a pass of so many tokens reads the cache as far as the text has come, and not all of its slots."""
        return self.cache is not None

    def begin(self, where: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The pass is of tokens at `where`, (T,), one behind the other; tables of angles are (positions, width / 2).

        Attention goes over the whole cache under a mask, so nothing about the shapes depends on how far the text is.
        """
        self._where = where
        self._cos, self._sin = cos.index_select(0, where), sin.index_select(0, where)
        self._sees = torch.arange(self.shape.slots, device=where.device)[None] <= where[:, None]

    def norm(self, stream: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor) -> torch.Tensor:
        """(T, hidden): the norm of the stream, (T, hidden) float32, to which `delta` is added first."""
        if delta is not None:
            stream.add_(delta)
        return (F.rms_norm(stream, stream.shape[-1:], eps=self.shape.eps) * gain).to(self.dtype)

    def attention(self, qkv: torch.Tensor, keys: Held, values: Held) -> torch.Tensor:
        """(T, heads * width): attention over the cache and themselves of tokens that are put into it.

        `qkv` is (T, rows). A token sees what is not behind it.
        """
        shape, count = self.shape, qkv.shape[0]
        sizes = [shape.heads * shape.width, shape.kv_heads * shape.width, shape.kv_heads * shape.width]
        q, k, v = (part.view(count, -1, shape.width).transpose(0, 1) for part in qkv.split(sizes, dim=1))
        q, k = (rotate(part, self._cos, self._sin).to(self.dtype) for part in (q, k))
        return self._behind_cache(q, k, v, keys, values).transpose(0, 1).reshape(count, -1)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(T, n): silu(gate) * up, from (T, 2 n), in which they lie in turn."""
        gate, up = gate_up.view(gate_up.shape[0], -1, 2).unbind(2)
        return F.silu(gate) * up

    def _behind_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Held, values: Held
    ) -> torch.Tensor:
        where = self._where
        if isinstance(keys, Rows) and isinstance(values, Rows) and self.cache is not None:
            cache_ops.put(keys, k, where[:1], self.cache)
            cache_ops.put(values, v, where[:1], self.cache)
            return cache_ops.attend(q, keys, values, where[-1:], self.cache, self.shape.width**-0.5, offset=1)
        keys.index_copy_(1, where, k)  # type: ignore[union-attr]
        values.index_copy_(1, where, v)  # type: ignore[union-attr]
        several = self.shape.heads != self.shape.kv_heads
        held = keys[None], values[None]  # type: ignore[index]
        return F.scaled_dot_product_attention(q[None], *held, self._sees, enable_gqa=several)[0]
