"""One decode step's operations on a GPU: what device/decode.py computes, with its buffers and launches.

decode_torch.py has the same operations in torch, for a CPU and as what these are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lbi.kernels import cache_gpu
from lbi.kernels.cache_formats import CacheFormat, Rows
from lbi.kernels.decode_torch import Shape
from lbi.kernels.device import decode as device
from lbi.kernels.formats import ZERO, Packed
from lbi.kernels.gemv import constants, steps
from lbi.kernels.tiles import step_tile_for

EMBED_BLOCK = 1024
ARGMAX_BLOCK = 4096


@dataclass(slots=True)
class Stream:
    """The residual stream between two products: itself, times the next norm's gain, and partial sums of squares."""

    values: torch.Tensor
    gained: torch.Tensor
    squares: torch.Tensor
    parts: int = 0


class TritonSteps:
    """The operations of a step. All work on `stream` and on buffers made once; nothing waits for the host."""

    def __init__(
        self, shape: Shape, device_: torch.device, dtype: torch.dtype, cache: CacheFormat | None = None
    ) -> None:
        self.shape, self.dtype, self.cache = shape, dtype, cache
        self._make = {"device": device_}
        self.stream = Stream(
            torch.zeros(shape.hidden, **self._make, dtype=torch.float32),
            torch.zeros(shape.hidden, **self._make, dtype=dtype),
            torch.zeros(shape.hidden, **self._make, dtype=torch.float32),
        )
        self.tokens = torch.zeros(shape.slots + 1, **self._make, dtype=torch.int64)
        self.position = torch.zeros(1, **self._make, dtype=torch.int32)
        self._scratch: dict[str, torch.Tensor] = {}
        self._pdl = device_.type == "cuda" and torch.cuda.get_device_capability(device_) >= (9, 0)
        self.cut(cache_gpu.cut_for(cache, shape.slots))

    def cut(self, cut: cache_gpu.Cut) -> None:
        """Have attention cut into programs otherwise than `cut_for` says; before anything is captured."""
        shape, where = self.shape, self.stream.values.device
        self._cut, self._splits = cut, cache_gpu.splits_for(where, shape.kv_heads, shape.slots, cut)
        self._room = cache_gpu.scratch(where, shape.heads, shape.kv_heads, shape.width, self._splits, cut)

    def embed(self, table: torch.Tensor, row_scales: torch.Tensor | None, gain: torch.Tensor) -> None:
        """The stream is the embedding of the token at the position; `gain` is the first norm's."""
        stream = self.stream
        stream.parts = -(-self.shape.hidden // EMBED_BLOCK)
        device.embed[(stream.parts,)](
            self.tokens, self.position, table, row_scales, gain, stream.values, stream.gained, stream.squares,
            K=self.shape.hidden, BLOCK=EMBED_BLOCK, **self._launch(4),
        )  # fmt: skip

    def norm_product(self, matrix: Packed) -> torch.Tensor:
        """(rows,) float32: the matrix times the normed stream."""
        out = self._buffer("product", matrix.rows, torch.float32)
        self._norm_product(device.norm_product, matrix, (out,))
        return out

    def norm_product_swiglu(self, matrix: Packed) -> torch.Tensor:
        """(rows / 2,): silu(gate) * up of the normed stream, gate and up being interleaved in the matrix."""
        out = self._buffer("act", matrix.rows // 2, self.dtype)
        self._norm_product(device.norm_product_swiglu, matrix, (out,))
        return out

    def product_add(self, matrix: Packed, x: torch.Tensor, gain: torch.Tensor) -> None:
        """The stream grows by the matrix times `x`; `gain` is that of the norm that comes next."""
        cut, programs, warps = _tiling(matrix, self.dtype)
        stream = self.stream
        device.product_add[(programs,)](
            x, matrix.data, matrix.scales, matrix.zeros, stream.values, gain, stream.gained, stream.squares,
            matrix.rows, **cut, **self._launch(warps),
        )  # fmt: skip
        stream.parts = programs

    def attention(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: Any, values: Any
    ) -> torch.Tensor:
        """(heads * width,): attention of the token over the cache and itself, which is put into the cache.

        `keys` and `values` are (kv heads, slots, width), or the rows of a low-bit cache.
        """
        if self.cache is not None:
            return self._low_bit_attention(qkv, (cos, sin), keys, values, self.cache)
        shape, kv = self.shape, self.shape.kv_heads
        block = _power(shape.width)
        group = shape.heads // kv
        out = self._buffer("mixed", shape.heads * shape.width, self.dtype)
        _, partial, arrived = self._room
        device.attention[(kv, self._splits)](
            qkv, cos, sin, keys, values, self.position, out, partial, arrived,
            shape.slots, shape.width**-0.5, HEADS=shape.heads, KV=kv, D=shape.width, BD=block,
            BH=max(16, _power(shape.width // 2)), BG=max(16, _power(group)), BT=self._cut.slots,
            SPLITS=self._splits, **self._launch(4),
        )  # fmt: skip
        return out

    def _low_bit_attention(
        self, qkv: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], keys: Rows, values: Rows, kind: CacheFormat
    ) -> torch.Tensor:
        """See `attention`."""
        shape, kv = self.shape, self.shape.kv_heads
        sizes = [shape.heads * shape.width, kv * shape.width, kv * shape.width]
        q, k, v = qkv.split(sizes)
        out = self._buffer("mixed", sizes[0], self.dtype)
        cache_gpu.attend(
            q, keys, values, self.position, 1, kind, shape.width**-0.5, out, self._room, self._splits,
            cut=self._cut, new=(k, v), angles=angles, launch=self._launch(),
        )  # fmt: skip
        return out

    def head(self, matrix: Packed, turn: int = 0) -> torch.Tensor:
        """(vocabulary,) float32 logits of the normed stream; where they are largest is noted for `next_token`.

        Steps of one CUDA graph have turns of their own, so that none overwrites another's logits.
        """
        logits = self._buffer(f"logits {turn}", matrix.rows, torch.float32)
        best = self._buffer("best", matrix.rows, torch.float32)
        self._norm_product(device.head, matrix, (logits, best, self._buffer("where", matrix.rows, torch.int32)))
        self._candidates = _tiling(matrix, self.dtype)[1]
        return logits

    def next_token(self) -> None:
        """The likeliest token is put behind the last one, and the position moves on to it."""
        best, where = self._scratch["best"], self._scratch["where"]
        device.next_token[(1,)](
            best, where, self.tokens, self.position, 0, PARTS=self._candidates, BLOCK=ARGMAX_BLOCK, **self._launch(8)
        )

    def put(self, token: torch.Tensor) -> None:
        """`token`, (1,), is put behind the last one, and the position moves on to it."""
        self.position.add_(1)
        self.tokens.index_copy_(0, self.position.long(), token)

    def _norm_product(self, kernel: Any, matrix: Packed, outputs: tuple[torch.Tensor, ...]) -> None:
        cut, programs, warps = _tiling(matrix, self.dtype)
        stream = self.stream
        kernel[(programs,)](
            stream.gained, stream.squares, matrix.data, matrix.scales, matrix.zeros, *outputs, matrix.rows,
            self.shape.eps, **cut, PARTS=stream.parts, **self._launch(warps),
        )  # fmt: skip

    def _launch(self, warps: int | None = None) -> dict[str, Any]:
        named = {} if warps is None else {"num_warps": warps}
        return {**named, "PDL": self._pdl, **({"launch_pdl": True} if self._pdl else {})}

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._scratch:
            self._scratch[name] = torch.zeros(size, **self._make, dtype=dtype)
        return self._scratch[name]


def _tiling(matrix: Packed, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """Arguments that cut the matrix into programs, the number of these, and the warps of one."""
    tile = step_tile_for(matrix)
    if matrix.data.is_cuda and dtype == torch.float32 and matrix.format in ZERO:
        # As in gemv.py: what is multiplied without the tensor cores takes registers.
        tile = replace(tile, rows=16, words=32)
    count, even = steps(matrix, tile)
    cut = {"BN": tile.rows, "BW": tile.words, "STEPS": count, "EVEN": even, "num_stages": tile.stages}
    return constants(matrix) | cut, -(-matrix.rows // tile.rows), tile.warps


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
