"""Did an option that must not change the output change it?

A static cache and a compiler are lossless in exact arithmetic. In bfloat16 another
order of additions can turn a near-tie the other way, after which two greedy texts
part for good. So tokens are compared, and at the first that differs the question is
whether the model itself was that undecided: its logits are computed in two equally
valid ways (token by token, and in one pass), and how far the gap between its two
likeliest tokens moves from one to the other is the noise of this model on this
machine. A gap within twice the largest such move is a tie; a larger one is an error.

One of the two ways may be broken as well, and then they are far apart. So noise is never more
than rounding explains, `Arithmetic.largest_share` of what the likeliest logit leads the mean by. In
float32 that is next to nothing, and is taken as the noise itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lbi.errors import BadNumerics
from lbi.quality import first_divergence

TIE_FACTOR = 2.0

MOST_SHARE = 0.125
"""Noise, as a share of the lead over the mean, beyond which no model's two ways are called equally valid."""

SUM_FACTOR = 16.0
"""Roundings of a sum of thousands of terms that is kept in the type of its terms, in units of one: about the
square root of their number. Narrower types are summed in float32."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What rounding there is: of which type, in how many layers, and whether of nothing but that type.

    `plain` is false where codes of a few bits are made while the model runs, of activations or of keys and values, or a
    library's kernels decide for themselves: there a rounding can turn a code, which is far more than the rounding.
    """

    dtype: torch.dtype
    layers: int
    plain: bool

    @property
    def exact(self) -> bool:
        """Whether noise is known without looking."""
        return self.plain and self.dtype == torch.float32

    def largest_share(self) -> float:
        """Largest noise of a gap, as a share of what the likeliest logit leads the mean of its row by.

        A layer adds a rounding or so to the stream, relative to what is there; all of one sign would be the number of
        layers, and the head is one more. docs/log.md has what was measured: 1/3 to 1/35 of it.
        """
        if not self.plain:
            return MOST_SHARE
        roundings = (self.layers + 1) * (SUM_FACTOR if self.dtype == torch.float32 else 1.0)
        return min(MOST_SHARE, roundings * float(torch.finfo(self.dtype).eps))


def compare(
    tokens: Sequence[int],
    expected: Sequence[int],
    stepwise: torch.Tensor,
    in_one_pass: torch.Tensor,
    arithmetic: Arithmetic,
) -> dict[str, Any]:
    """Compare greedy `tokens` with the plain path's `expected`.

    `stepwise` and `in_one_pass` are the plain path's logits, (tokens, vocabulary), for
    the same positions computed in the two ways. The result says `equal` or `tie`; raises
    `BadNumerics` for a difference that noise does not explain.
    """
    where = first_divergence(tokens, expected)
    if where == len(expected) == len(tokens):
        return {"verdict": "equal", "tokens": len(expected)}
    row = stepwise[where]
    bound = arithmetic.largest_share() * float(row.max() - row.mean())
    seen = gap_noise(stepwise, in_one_pass)
    noise = bound if arithmetic.exact else min(seen, bound)
    gap = float(row[expected[where]] - row[tokens[where]])
    found = {"tokens": len(expected), "first_divergence": where, "logit_gap": gap, "logit_noise": noise}
    if gap > TIE_FACTOR * noise:
        raise BadNumerics(
            f"greedy token {where} differs from the plain path's although its logit leads by {gap:.3g} "
            f"(noise: {noise:.3g}; token by token and in one pass the plain path's gaps are up to {seen:.3g} apart)"
        )
    return {"verdict": "tie", **found}


def gap_noise(stepwise: torch.Tensor, in_one_pass: torch.Tensor) -> float:
    """Largest move of the gap between the two likeliest tokens, over all positions."""
    top = stepwise.topk(2, dim=-1).indices
    gap = stepwise.gather(1, top)
    other = in_one_pass.gather(1, top)
    return float(((gap[:, 0] - gap[:, 1]) - (other[:, 0] - other[:, 1])).abs().max())
