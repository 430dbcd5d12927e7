"""Launches of device/several.py: what lies between the products of a pass of up to 16 tokens, on a GPU.

Five kernels a layer beside its four products, where torch takes some thirty. A low-bit cache, and passes of more
rows than a tile has room for, go by torch as on a CPU.
"""

from __future__ import annotations

import torch

from lbi.kernels.cache_formats import CacheFormat, Rows
from lbi.kernels.decode_torch import Shape
from lbi.kernels.device import several as device
from lbi.kernels.gemv import MOST_ROWS
from lbi.kernels.several_torch import Held, TorchSeveral

MOST_IN_TILE = 128
"""Rows of attention's tile: the tokens times the query heads of a key-value head."""

SLOTS = 64
"""Slots that a program of attention attends to at once."""

SWIGLU_BLOCK = 1024


class TritonSeveral(TorchSeveral):
    """See `TorchSeveral`."""

    def __init__(self, shape: Shape, device_: torch.device, dtype: torch.dtype, cache: CacheFormat | None) -> None:
        super().__init__(shape, dtype, cache)
        self._splits = splits_for(device_, shape)

    def reads_live(self, count: int) -> bool:
        """See `TorchSeveral.reads_live`."""
        in_tile = count * self.shape.heads // self.shape.kv_heads <= MOST_IN_TILE
        return self.cache is not None or (count <= MOST_ROWS and in_tile)

    def begin(self, where: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """See `TorchSeveral.begin`. The kernels read as far as the text has come."""
        self._taken = self.cache is None and self.reads_live(where.shape[0])
        if self._taken:
            self._where, self._cos, self._sin = where, cos, sin
        else:
            super().begin(where, cos, sin)

    def norm(self, stream: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor) -> torch.Tensor:
        """See `TorchSeveral.norm`."""
        count, hidden = stream.shape
        out = torch.empty(count, hidden, device=stream.device, dtype=self.dtype)
        device.add_norm[(count,)](
            stream, delta, gain, out, self.shape.eps, K=hidden, BLOCK=_power(hidden), num_warps=8
        )  # fmt: skip
        return out

    def attention(self, qkv: torch.Tensor, keys: Held, values: Held) -> torch.Tensor:
        """See `TorchSeveral.attention`."""
        if not self._taken or isinstance(keys, Rows) or isinstance(values, Rows):
            return super().attention(qkv, keys, values)
        shape, count, splits = self.shape, qkv.shape[0], self._splits
        heads, kv, width = shape.heads, shape.kv_heads, shape.width
        queries = torch.empty(count, heads * width, device=qkv.device, dtype=self.dtype)
        device.rotate_and_put[(count, heads + 2 * kv)](
            qkv, self._cos, self._sin, keys, values, self._where, queries, shape.slots, width**-0.5,
            HEADS=heads, KV=kv, D=width, BH=_power(width // 2), num_warps=1,
        )  # fmt: skip
        out, block = torch.empty_like(queries), _power(width)
        partial = torch.empty(count * heads * splits * (block + 2), device=qkv.device)
        rows = max(16, _power(count * heads // kv))
        device.attention[(kv, splits)](
            queries, keys, values, self._where, out, partial, shape.slots,
            T=count, HEADS=heads, KV=kv, D=width, BD=block, BR=rows, BT=SLOTS, SPLITS=splits,
            num_warps=8 if rows > 64 else 4,
        )  # fmt: skip
        if splits > 1:
            device.merge[(count * heads,)](partial, out, D=width, BD=block, SPLITS=splits, BS=_power(splits))
        return out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `TorchSeveral.swiglu`."""
        count, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(count, size, device=gate_up.device, dtype=gate_up.dtype)
        device.swiglu[(count, -(-size // SWIGLU_BLOCK))](gate_up, out, size, BLOCK=SWIGLU_BLOCK, num_warps=4)
        return out


def splits_for(where: torch.device, shape: Shape) -> int:
    """Programs a key-value head: as many as fill the GPU once, none of which has less than a block."""
    if where.type != "cuda":
        return 3
    multiprocessors = int(torch.cuda.get_device_properties(where).multi_processor_count)
    return max(1, min(multiprocessors // shape.kv_heads, -(-shape.slots // SLOTS)))


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
