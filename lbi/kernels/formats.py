"""How lbi's own kernels store a weight matrix: what a GEMV can stream, and take apart in few instructions.

A row is stored contiguously, whatever the format, so rows can be taken, put together and
interleaved without unpacking: q, k and v become one matrix, gate and up another.

8, 4 and 2 bits: an int32 word holds 4, 8 or 16 consecutive weights, the first of each pair in its
lower half and the second as far up in its upper half: one and takes two weights out, as a pair of
16-bit numbers, which is how the tensor cores want them (device/packed.py). The pairs follow each
other upwards, but for 2 bits, where four weights in a row are those that one plane has. Four words, the 16 bytes
that a GPU thread loads at once, belong to one group. Codes are unsigned, for they become floats by
being put into a mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

PAIRS = {8: (0, 1), 4: (0, 1, 2, 3), 2: (0, 2, 1, 3, 4, 6, 5, 7)}
"""Bits, and which pair of a word's weights lies in each place of a half; a place's pair lies in the pair's place."""

WORDS = 4
"""Words of which a row, and a group, has a multiple: 16 bytes."""

BITS = {"plain": 16, "w8": 8, "fp8": 8, "w4": 4, "w2": 2, "w158": 2}
"""Formats and the bits of one weight: unquantized, int8, e4m3, 4 bits, 2 bits, ternary in 2 bits."""

ZERO = {"w8": 128, "w4": 8, "w2": 2, "w158": 1}
"""Formats that are packed into words, and the code of weight zero where a matrix has no zeros of its own."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of (rows, inputs) weights.

    `data` is (rows, inputs) in the model's type or e4m3, or (rows, inputs * bits / 32) int32.
    `scales` is (rows, groups), float32 with one group a row and the model's type with more; None
    for unquantized weights. `zeros` is like `scales`, in steps: w = (q - zero) * scale; None where
    the zero is `ZERO` of the format.
    """

    format: str
    inputs: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self.data.shape[0])

    @property
    def group_size(self) -> int:
        """Weights of one row that share a scale; the whole row where there is one scale or none."""
        return self.inputs if self.scales is None else self.inputs // self.scales.shape[1]

    def tensors(self) -> list[torch.Tensor]:
        """All that a product reads."""
        return [tensor for tensor in (self.data, self.scales, self.zeros) if tensor is not None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(rows, inputs) as the kernels understand them: computed in float32, rounded once."""
        if self.scales is None:
            return self.data.to(dtype)
        codes, zero = self.data, 0.0
        if self.format in ZERO:
            codes, zero = unpack(self.data, BITS[self.format]), float(ZERO[self.format])
        grouped = codes.float().view(self.rows, self.scales.shape[1], -1)
        zeros = zero if self.zeros is None else self.zeros.float()[..., None]
        return grouped.sub_(zeros).mul_(self.scales.float()[..., None]).view(self.rows, self.inputs).to(dtype)


def positions(bits: int, inputs: int) -> torch.Tensor:
    """(words, fields): which of a row's weights each field of each word holds."""
    fields = 32 // bits
    field = torch.arange(fields)
    within = torch.tensor(PAIRS[bits])[field % (fields // 2)] * 2 + field // (fields // 2)
    return torch.arange(0, inputs, fields)[:, None] + within


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, inputs) codes from 0 to 2^bits - 1 as (rows, inputs * bits / 32) int32.

    `inputs` must be a multiple of 128 / bits: raises `ValueError`.
    """
    rows, inputs = codes.shape
    if inputs % (WORDS * 32 // bits):
        raise ValueError(f"{inputs} inputs are not a multiple of {WORDS * 32 // bits}, four words of {bits} bits")
    # (rows, words, fields): by `positions`, the second weights of pairs lie behind the first ones.
    pairs = codes.reshape(rows, -1, 16 // bits, 2)[:, :, PAIRS[bits]]
    fields = pairs.transpose(2, 3).reshape(rows, -1, 32 // bits)
    words = torch.zeros(rows, fields.shape[1], dtype=torch.int32, device=codes.device)
    for field in range(fields.shape[2]):
        words |= fields[:, :, field].to(torch.int32) << (bits * field)
    return words


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes that `pack` was given, (rows, inputs) uint8."""
    fields = torch.stack([(words >> low & (2**bits - 1)).to(torch.uint8) for low in range(0, 32, bits)], dim=-1)
    pairs = fields.view(*words.shape, 2, -1).transpose(2, 3)
    return pairs[:, :, PAIRS[bits]].reshape(words.shape[0], -1)


def stacked(parts: Sequence[Packed]) -> Packed:
    """The rows of several matrices of one format and shape of groups, one below the other.

    Raises `ValueError` where they do not fit together.
    """
    first = parts[0]
    for part in parts[1:]:
        for name in ("format", "inputs", "group_size"):
            if getattr(part, name) != getattr(first, name):
                raise ValueError(f"{name} {getattr(part, name)} does not fit {getattr(first, name)}")
        if (part.zeros is None) != (first.zeros is None):
            raise ValueError("with and without zeros do not fit together")
    return replace(
        first,
        data=torch.cat([part.data for part in parts]),
        scales=_joined([part.scales for part in parts]),
        zeros=_joined([part.zeros for part in parts]),
    )


def interleaved(one: Packed, other: Packed) -> Packed:
    """Rows of two matrices in turn: row 2i is row i of `one`, row 2i + 1 that of `other`."""
    both = stacked([one, other])
    order = torch.arange(both.rows, device=both.data.device).view(2, -1).T.reshape(-1)

    def taken(tensor: torch.Tensor | None) -> torch.Tensor | None:
        # torch has no indexing for e4m3: its bytes are moved instead.
        if tensor is None or tensor.dtype != torch.float8_e4m3fn:
            return None if tensor is None else tensor[order]
        return tensor.view(torch.uint8)[order].view(torch.float8_e4m3fn)

    data = taken(both.data)
    return replace(both, data=both.data if data is None else data, scales=taken(both.scales), zeros=taken(both.zeros))


def _joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
