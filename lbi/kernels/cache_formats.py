"""How a low-bit cache stores keys and values: some bits a value, and a scale for each group of a head's values.

A token's values of one head are a row. Its codes are bytes of their own, its scales (and, for int4,
the groups' least values) bfloat16: they need float32's range, and codes are made with the rounded
numbers, so the rounding of a scale costs nothing but a clipped end. Rows know nothing of each other, so
a token is stored once, when it is appended, and never touched again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMATS = ("int8", "fp8", "int4")

LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}
"""What the largest value of a group is stored as: int8 and fp8 (e4m3) are symmetric, int4 counts from the least."""


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """One way of storing rows of `width` values. `group` values share a scale; it divides the width.

    Raises `ValueError` for a shape that cannot be.
    """

    name: str
    width: int
    group: int

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ValueError(f"there is no cache format {self.name}; there are {', '.join(FORMATS)}")
        if self.width % 2 or self.width % self.group:
            raise ValueError(f"groups of {self.group} do not divide heads of {self.width} values, an even number")

    @property
    def code_bytes(self) -> int:
        """Bytes of one row's codes."""
        return self.width // 2 if self.name == "int4" else self.width

    @property
    def numbers(self) -> int:
        """Scales of one row, and for int4 as many least values behind them."""
        return self.width // self.group * (2 if self.name == "int4" else 1)

    def allocate(self, heads: int, slots: int, device: torch.device | str) -> Rows:
        """Empty rows."""
        codes = torch.zeros(heads, slots, self.code_bytes, dtype=torch.uint8, device=device)
        return Rows(codes, torch.zeros(heads, slots, self.numbers, dtype=torch.bfloat16, device=device))

    def store(self, values: torch.Tensor) -> Rows:
        """`values` (..., width) as codes (..., code_bytes) and numbers (..., numbers)."""
        grouped = values.float().unflatten(-1, (-1, self.group))
        if self.name == "int4":
            return self._store_int4(grouped)
        scales = (grouped.abs().amax(-1, keepdim=True) / LARGEST[self.name]).bfloat16()
        # A group of zeros has a scale of zero, and codes of zero.
        scaled = torch.where(scales == 0, 0.0, grouped / scales.float())
        scaled = scaled.clamp(-LARGEST[self.name], LARGEST[self.name])
        codes = scaled.round().to(torch.int8) if self.name == "int8" else scaled.to(torch.float8_e4m3fn)
        return Rows(codes.view(torch.uint8).flatten(-2), scales.squeeze(-1))

    def _store_int4(self, grouped: torch.Tensor) -> Rows:
        low = grouped.amin(-1, keepdim=True).bfloat16()
        scales = ((grouped.amax(-1, keepdim=True) - low.float()) / LARGEST["int4"]).clamp(min=0).bfloat16()
        scaled = torch.where(scales == 0, 0.0, (grouped - low.float()) / scales.float())
        codes = scaled.round().clamp(0, 15).to(torch.uint8).flatten(-2)
        # Byte i has value i in its low half and value i + width / 2 in its high one: the halves that rope turns.
        first, second = codes.chunk(2, dim=-1)
        return Rows(first | second << 4, torch.cat([scales, low], dim=-2).squeeze(-1))

    def read(self, rows: Rows) -> torch.Tensor:
        """The values (..., width), float32."""
        if self.name == "int4":
            codes = torch.cat([rows.codes & 15, rows.codes >> 4], dim=-1).float()
            scales, low = rows.numbers.float().chunk(2, dim=-1)
            return (codes.unflatten(-1, (-1, self.group)) * scales[..., None] + low[..., None]).flatten(-2)
        codes = rows.codes.view(torch.int8 if self.name == "int8" else torch.float8_e4m3fn).float()
        return (codes.unflatten(-1, (-1, self.group)) * rows.numbers.float()[..., None]).flatten(-2)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """What is read of `values` (..., width) after they were stored, float32."""
        return self.read(self.store(values))


@dataclass(frozen=True, slots=True)
class Rows:
    """Stored rows: `codes` (..., code_bytes) uint8 and `numbers` (..., numbers) bfloat16."""

    codes: torch.Tensor
    numbers: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both."""
        return self.codes, self.numbers


def halves_problem(kind: CacheFormat) -> str | None:
    """Why device/cache.py and cache_attention.py cannot have this format; None if they can."""
    half = kind.width // 2
    if kind.group != kind.width and half % kind.group:
        return f"on a GPU groups are of a whole head or of its half; {kind.group} do not divide {half} values"
    piece = min(kind.group, half)
    if piece % 4:
        return f"on a GPU four values are read at once, and {piece} values of one scale are no multiple of that"
    return None
