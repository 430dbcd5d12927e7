"""Matrices in every format that lbi's kernels read, random and small: for tests and for what they start."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbi.kernels.formats import BITS, ZERO, Packed, pack


@dataclass(frozen=True)
class Form:
    """A format with what may vary in it; `group` None is one scale a row."""

    format: str
    group: int | None = None
    zeros: bool = False

    @property
    def unit(self) -> int:
        """What the inputs are a multiple of."""
        return 128 // BITS[self.format] if self.format in ZERO else 1


FORMS = {
    "plain": Form("plain"),
    "w8": Form("w8"),
    "fp8": Form("fp8"),
    "w4 g32": Form("w4", 32, zeros=True),
    "w4 g64": Form("w4", 64, zeros=True),
    "w4 g32 symmetric": Form("w4", 32),
    "w4 row": Form("w4", None, zeros=True),
    "w4 row symmetric": Form("w4"),
    "w2 g64": Form("w2", 64, zeros=True),
    "w2 row": Form("w2", None, zeros=True),
    "w158": Form("w158"),
}


def random_codes(form: Form, rows: int, inputs: int) -> torch.Tensor:
    """Every code that the format has, in (rows, inputs) uint8."""
    return torch.randint(0, 3 if form.format == "w158" else 2 ** BITS[form.format], (rows, inputs), dtype=torch.uint8)


def random_matrix(form: Form, rows: int, inputs: int, dtype: torch.dtype) -> Packed:
    """A matrix of the form; where groups of the form's size do not fit a row, with one a row."""
    if form.format == "plain":
        return Packed("plain", inputs, torch.randn(rows, inputs).to(dtype))
    groups = inputs // form.group if form.group else 1
    kept = dtype if groups > 1 else torch.float32
    scales = (torch.rand(rows, groups) * 0.1 + 0.01).to(kept)
    if form.format == "fp8":
        return Packed("fp8", inputs, (torch.randn(rows, inputs) * 100).clamp(-448, 448).to(torch.float8_e4m3fn), scales)
    zeros = (torch.rand(rows, groups) * (2 ** BITS[form.format] - 1)).to(kept) if form.zeros else None
    return Packed(form.format, inputs, pack(random_codes(form, rows, inputs), BITS[form.format]), scales, zeros)


def error(found: torch.Tensor, matrix: Packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Relative distance of a product from the one in float64 with the weights that are stored."""
    expected = exact(matrix, x, bias)
    return float((found.double() - expected).norm() / expected.norm())


def exact(matrix: Packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64."""
    return x.double() @ matrix.dequantize().double().T + (0.0 if bias is None else bias.detach().double())
