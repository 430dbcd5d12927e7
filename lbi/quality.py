"""How far a cell's next-token distribution is from the unquantized model's.

Teacher-forced: a fixed text is cut into windows, each a forward pass of its own, and
at every position but the last of a window the two distributions and the probability
of the token that follows are compared (llama.cpp's --kl-divergence figures).
Positions are treated as independent in the standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lbi.errors import BadNumerics


def windows(tokens: Sequence[int], count: int, width: int) -> list[list[int]]:
    """The first `count` tokens in pieces of `width`; a last piece of one token is left out."""
    used = list(tokens[:count])
    pieces = [used[start : start + width] for start in range(0, len(used), width)]
    return [piece for piece in pieces if len(piece) > 1]


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """Logits less their maximum in each row, in float16.

    A float16 is then within 2^-11 of its value relative to its distance from the top: the
    tokens that carry the probability are stored most precisely. What is further away than a
    float16 reaches has no probability either way.
    """
    logits = logits.float()
    return (logits - logits.amax(dim=-1, keepdim=True)).clamp_(min=torch.finfo(torch.float16).min).half()


ROUNDING, SMALLEST = 2.0**-11 + 2.0**-22, 2.0**-24
"""Largest relative error of a stored logit, the float32 subtraction included, and its error close to zero."""

ROWS = 64
"""Positions whose bound is computed at once, which holds a few arrays of the vocabulary's size for each."""


def storage_bound(stored: torch.Tensor, theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """How far each position's KLD may be from that against the reference's logits before they were stored.

    `theirs` and `ours` are log probabilities, `theirs` of the `stored` logits. lbi/reference.py derives it.
    """
    found = []
    for logits, p, q in zip(stored.split(ROWS), theirs.split(ROWS), ours.split(ROWS), strict=True):
        wide, weight = logits.float(), p.exp()
        error = wide.abs().mul_(ROUNDING / (1 - ROUNDING)).add_(SMALLEST)
        shift = (weight * error.exp()).sum(dim=-1, keepdim=True).log()
        off = error.add_(shift).expm1_()
        apart = (p - q).sub_((weight * (p - q)).sum(dim=-1, keepdim=True)).abs_()
        found.append((weight * off * (apart + off)).sum(dim=-1))
    # What float32 may have lost of the bound itself.
    return 1.01 * torch.cat(found)


@dataclass(slots=True)
class Score:
    """Per-position sums of the comparison; lists of one number a position."""

    kld: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, following: torch.Tensor) -> None:
        """Compare (positions, vocabulary) logits with the reference's; `following` are the true next tokens.

        Raises `BadNumerics` where the logits are not finite.
        """
        if not bool(torch.isfinite(logits).all()):
            raise BadNumerics("the logits hold NaN or infinity on the quality text")
        ours = torch.log_softmax(logits.float(), dim=-1)
        theirs = torch.log_softmax(reference.float(), dim=-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(dim=-1)
        # Rounding can leave a divergence of two equal distributions a hair below zero.
        self.kld += divergence.clamp(min=0).tolist()
        self.bound += storage_bound(reference, theirs, ours).tolist()
        self.same_top += (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).tolist()
        picked = following.unsqueeze(1)
        self.nll += (-ours.gather(1, picked).squeeze(1)).tolist()
        self.reference_nll += (-theirs.gather(1, picked).squeeze(1)).tolist()

    def metrics(self) -> dict[str, float | None]:
        """The quality metrics; a perplexity too large for a float is None."""
        kld, same = np.array(self.kld), np.array(self.same_top, dtype=float)
        nll, difference = np.array(self.nll), np.array(self.nll) - np.array(self.reference_nll)
        ratio = _exp(float(difference.mean()))
        return {
            "mean_kld": float(kld.mean()),
            "mean_kld_se": _standard_error(kld),
            "mean_kld_bound": float(np.mean(self.bound)),
            "p99_kld": float(np.percentile(kld, 99, method="higher")),
            "top1_agreement": float(same.mean()),
            "top1_agreement_se": _standard_error(same),
            "ppl": _exp(float(nll.mean())),
            "mean_nll": float(nll.mean()),
            "ppl_ratio": ratio,
            # First order: the exponential of a mean moves by itself times the mean's error.
            "ppl_ratio_se": None if ratio is None else ratio * _standard_error(difference),
            "quality_positions": float(len(self.kld)),
        }


def score(forward: Any, pieces: list[list[int]], reference: np.ndarray[Any, Any]) -> dict[str, float | None]:
    """Quality metrics of `forward` (tokens -> logits) against stored reference logits, a row a position."""
    total = Score()
    row = 0
    for piece, logits in _logits(forward, pieces):
        wanted = torch.from_numpy(np.array(reference[row : row + len(piece) - 1])).to(logits.device)
        total.add(logits, wanted, torch.tensor(piece[1:], device=logits.device))
        row += len(piece) - 1
    return total.metrics()


def replay(stored: np.ndarray[Any, Any]) -> Callable[[list[int]], torch.Tensor]:
    """A forward pass that gives back stored reference logits, window after window."""
    row = 0

    def forward(piece: list[int]) -> torch.Tensor:
        nonlocal row
        count = len(piece) - 1
        logits = torch.from_numpy(np.array(stored[row : row + count]))
        row += count
        # The last position of a window is not stored, for it is not scored.
        return torch.cat([logits, logits[-1:]])

    return forward


def reference_logits(forward: Any, pieces: list[list[int]]) -> np.ndarray[Any, Any]:
    """The unquantized model's logits at every scored position, as `score` wants them."""
    return np.concatenate([shifted(logits).cpu().numpy() for _, logits in _logits(forward, pieces)])


def _logits(forward: Any, pieces: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    for piece in pieces:
        # The last position predicts a token of the next window.
        yield piece, forward(piece)[:-1]


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens agree before the first that does not; all of them if none differs."""
    for index, (ours, theirs) in enumerate(zip(tokens, reference, strict=False)):
        if ours != theirs:
            return index
    return min(len(tokens), len(reference))


def _standard_error(values: np.ndarray[Any, Any]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None
