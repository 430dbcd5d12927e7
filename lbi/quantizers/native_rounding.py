"""Weights rounded to the formats of lbi's own kernels.

Codes are the nearest to what is stored: scales and zeros are first rounded to the type that
they are kept in. No group divides by zero: one of zeros only, or of one value, has the
smallest step there is, or a step of its own size.
"""

from __future__ import annotations

import torch

from lbi.config import QuantizerConfig
from lbi.kernels.formats import BITS, ZERO, Packed, pack
from lbi.quantizers import hqq_solver
from lbi.quantizers.ternary_layers import ternarize

LARGEST_E4M3 = 448.0


def packed(weight: torch.Tensor, config: QuantizerConfig) -> Packed:
    """The (rows, inputs) weight in the format that `config.method` names.

    Raises `ValueError` where the rows are not a multiple of the format's words.
    """
    form, wide = config.method, weight.detach().float()
    if form == "w4" or form == "w2":
        return _grouped(wide, config, weight.dtype)
    if form == "fp8":
        scales = _row_scales(wide, LARGEST_E4M3)
        # The quotient of the largest may be rounded to more than e4m3 has.
        data = (wide / scales).clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        return Packed(form, wide.shape[1], data, scales)
    if form == "w8":
        scales = _row_scales(wide, 127.0)
        codes = (wide / scales).round_().clamp_(-127, 127)
    else:
        ternary, scale = ternarize(weight)
        scales, codes = scale.expand(wide.shape[0], 1).contiguous(), ternary.float()
    words = pack(codes.add_(ZERO[form]).to(torch.uint8), BITS[form])
    return Packed(form, wide.shape[1], words, scales)


def _row_scales(wide: torch.Tensor, levels: float) -> torch.Tensor:
    """(rows, 1) float32 by which the largest weight of a row becomes `levels`."""
    return (wide.abs().amax(dim=1, keepdim=True) / levels).clamp_(min=torch.finfo(torch.float32).tiny)


def _grouped(wide: torch.Tensor, config: QuantizerConfig, dtype: torch.dtype) -> Packed:
    rows, inputs = wide.shape
    size, bits = config.group_size or inputs, BITS[config.method]
    groups = wide.reshape(-1, size)
    # The formats' rule: float32 where a row has one group.
    kept = torch.float32 if size == inputs else dtype
    if config.symmetric:
        codes, scales = _around_a_constant(groups, ZERO[config.method], 2**bits - 1, kept)
        zeros = None
    else:
        codes, scales, zero = _affine(groups, 2**bits - 1, kept, solved=config.qparams == "hqq")
        zeros = zero.to(kept).view(rows, -1)
    words = pack(codes.to(torch.uint8).view(rows, inputs), bits)
    return Packed(config.method, inputs, words, scales.to(kept).view(rows, -1), zeros)


def _affine(
    groups: torch.Tensor, levels: int, kept: torch.dtype, *, solved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 to `levels`, scales and zeros of (groups, size) weights: w = (code - zero) * scale.

    The range of a group reaches from its least to its largest weight and holds 0, so that its zero is
    a small number whose rounding costs little. `solved`: HQQ moves the zero.
    """
    low, high = groups.amin(dim=1, keepdim=True).clamp_(max=0.0), groups.amax(dim=1, keepdim=True).clamp_(min=0.0)
    # Divided before they are subtracted: the range of two huge weights is no float32.
    step = (high / levels - low / levels).to(kept).clamp_(min=torch.finfo(kept).tiny).float()
    zero = -low / step
    if solved:
        zero = hqq_solver.optimize(groups, step.reciprocal(), zero, [0, levels], axis=1)[2]
    zero = zero.to(kept).float()
    return (groups / step).add_(zero).round_().clamp_(0, levels), step, zero


def _around_a_constant(
    groups: torch.Tensor, zero: int, levels: int, kept: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of (groups, size) weights with the zero in the middle of the codes.

    There is a code more below it than above: the weight of largest size is put at the lower end, its
    scale takes the sign that this needs, and steps are 1/8 of it instead of 1/7.
    """
    peak = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    step = (peak / -zero).to(kept).float()
    tiny = torch.finfo(kept).tiny
    step = torch.where(step.abs() < tiny, tiny, step)
    return (groups / step).add_(zero).round_().clamp_(0, levels), step
