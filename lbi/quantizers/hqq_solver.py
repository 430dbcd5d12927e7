"""HQQ's half-quadratic solver, without the work that cannot change its answer: for hqq on a CPU, for ours anywhere.

HQQ moves each group's zero point so that the weights' error has a small p-norm (p = 0.7),
by 20 rounds over the whole matrix: quantize, shrink the error, average. On a CPU that took
7 ns a weight and round, 13 s for 135M weights and minutes on a busy machine. Where it went,
and why most of it is not needed:

- `|e| ** -0.3` for every weight, to shrink the error: max(|e| - |e|^(p-1) / beta, 0). That is
  zero for every |e| <= beta^(-1/(2-p)), 0.17 for hqq's beta of 10. A language model's errors
  are a hundredth of that, so the shrunken error is exactly zero and no power need be taken.
  It is checked per block, and taken where it does matter.
- Ten passes over buffers that do not fit any cache: here a block of rows goes through all
  rounds while it lies in the cache.

The stopping rule looks at the error of the whole matrix, so each block keeps the zero points
of every round, and the round at which hqq would have stopped is chosen at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROUNDS, BETA, NORM = 20, 10.0, 0.7
"""hqq's own settings (hqq.core.optimize.optimize_weights_proximal_legacy, whose beta stays as it is)."""

BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Weights that go through all rounds at once: half a megabyte in float32 on a CPU, for its cache; on a GPU
so many that launches cost nothing, and no more than its memory has room for."""


@contextmanager
def quick() -> Iterator[None]:
    """hqq with this solver for tensors on a CPU; on a GPU its own, in float16, takes no time that matters."""
    from hqq.core import quantize as hqq

    own_solver = hqq.Quantizer.optimize_weights

    def solver(tensor: torch.Tensor, scale: Any, zero: Any, min_max: list[int], axis: int = 0, **others: Any) -> Any:
        if tensor.device.type != "cpu" or str(others.get("device") or "cpu") != "cpu":
            return own_solver(tensor=tensor, scale=scale, zero=zero, min_max=min_max, axis=axis, **others)
        return optimize(tensor, scale, zero, min_max, axis)

    hqq.Quantizer.optimize_weights = staticmethod(solver)
    try:
        yield
    finally:
        hqq.Quantizer.optimize_weights = staticmethod(own_solver)


def optimize(
    tensor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, min_max: list[int], axis: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized weights, scale and zero, as hqq's own solver returns them.

    `tensor` is (groups, group size) for axis 1 and (group size, groups) for axis 0, float32;
    `scale` and `zero` have one entry a group: W_q = round(W * scale + zero).
    """
    rows = tensor if axis == 1 else tensor.t()
    flat_scale, flat_zero = scale.reshape(-1, 1).float(), zero.reshape(-1, 1).float()
    step = max(1, BLOCK[tensor.device.type] // rows.shape[1])
    zeros, errors = [], torch.zeros(ROUNDS, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, rows.shape[0], step):
            block = slice(start, start + step)
            found, error = _rounds(rows[block].float().contiguous(), flat_scale[block], flat_zero[block], min_max)
            zeros.append(found)
            errors += error
        # A copy: the zeros of the other rounds would be kept along with it.
        chosen = torch.cat(zeros, dim=1)[_stop(errors)].reshape(zero.shape).clone()
        stored = torch.round(tensor * scale + chosen).clamp_(*min_max)
    return stored, scale, chosen


def _rounds(
    weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, min_max: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The zeros after each round (rounds, groups, 1), and the sum of the absolute errors before it."""
    scaled, inverse = weights * scale, scale.reciprocal()
    found, errors = [], torch.zeros(ROUNDS, dtype=torch.float64)
    matters = 0.99 * BETA ** (-1 / (2 - NORM))
    buffer = torch.empty_like(weights)
    for number in range(ROUNDS):
        torch.add(scaled, zero, out=buffer)
        off = buffer.round_().clamp_(*min_max).sub_(scaled)
        error = (off - zero).mul_(inverse).neg_()
        size = error.abs()
        errors[number] = float(size.sum())
        if float(size.max()) > matters:
            kept = size.sub(size.pow(NORM - 1), alpha=1 / BETA).clamp_min_(0.0).mul_(error.sign())
            off = off + kept * scale
        zero = off.mean(dim=1, keepdim=True)
        found.append(zero)
    return torch.stack(found), errors


def _stop(errors: torch.Tensor) -> int:
    """The round whose zeros hqq keeps: the first after which the error had not become smaller."""
    best = float("inf")
    for number, error in enumerate(errors.float().tolist()):
        if not error < best:
            return number
        best = error
    return len(errors) - 1
