"""Did an option that must not change the output change it?

A static cache and a compiler are lossless in exact arithmetic. In bfloat16 another
order of additions can turn a near-tie the other way, after which two greedy texts
part for good. So tokens are compared, and at the first that differs the question is
whether the model itself was that undecided: its logits are computed in two equally
valid ways (token by token, and in one pass), and how far the gap between its two
likeliest tokens moves from one to the other is the noise of this model on this
machine. A gap within twice the largest such move is a tie; a larger one is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lbi.errors import BadNumerics
from lbi.quality import first_divergence

TIE_FACTOR = 2.0


def compare(
    tokens: Sequence[int], expected: Sequence[int], stepwise: torch.Tensor, in_one_pass: torch.Tensor
) -> dict[str, Any]:
    """Compare greedy `tokens` with the plain path's `expected`.

    `stepwise` and `in_one_pass` are the plain path's logits, (tokens, vocabulary), for
    the same positions computed in the two ways. The result says `equal` or `tie`; raises
    `BadNumerics` for a difference that noise does not explain.
    """
    where = first_divergence(tokens, expected)
    if where == len(expected) == len(tokens):
        return {"verdict": "equal", "tokens": len(expected)}
    noise = gap_noise(stepwise, in_one_pass)
    gap = float(stepwise[where, expected[where]] - stepwise[where, tokens[where]])
    found = {"tokens": len(expected), "first_divergence": where, "logit_gap": gap, "logit_noise": noise}
    if gap > TIE_FACTOR * noise:
        raise BadNumerics(
            f"greedy token {where} differs from the eager, dynamic-cache path although its logit leads by {gap:.3g} "
            f"(noise of the two plain paths: {noise:.3g})"
        )
    return {"verdict": "tie", **found}


def gap_noise(stepwise: torch.Tensor, in_one_pass: torch.Tensor) -> float:
    """Largest move of the gap between the two likeliest tokens, over all positions."""
    top = stepwise.topk(2, dim=-1).indices
    gap = stepwise.gather(1, top)
    other = in_one_pass.gather(1, top)
    return float(((gap[:, 0] - gap[:, 1]) - (other[:, 0] - other[:, 1])).abs().max())
