"""Which token comes next: chosen on the device, by operations that a CUDA graph can hold.

torch.multinomial cannot be captured: it asks the device whether the probabilities are valid, and
waits for the answer. What it does then for a single draw is argmax(p / q), with q drawn from
Exp(1): of independent exponential clocks with rates p_i the i-th rings first with probability
p_i / sum(p). So that is done here, and a seed gives the tokens that `generate()` draws for it.

The noise is drawn by the default generator, outside what inductor compiles. In a CUDA graph its
seed and its place in the stream are read from the device's memory, where torch writes them
before each replay, so replays draw what the same steps would draw eagerly. A buffer of noise drawn
before the first token would do as well, and cost half a MB of memory a token; inductor's own random
numbers are others than eager's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbi.config import DecodingConfig

Choose = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""From logits (rows, vocabulary), float32, and noise of the same shape to a token for each row, (rows,).

The third says which tokens each row has behind it, bool of the same shape; None where that is not asked.
"""


def chooser(decoding: DecodingConfig) -> Choose:
    """What chooses the next token; greedy takes no noise."""

    def greedy(logits: torch.Tensor, noise: torch.Tensor | None, seen: torch.Tensor | None = None) -> torch.Tensor:
        return logits.argmax(-1)

    def sampled(logits: torch.Tensor, noise: torch.Tensor | None, seen: torch.Tensor | None = None) -> torch.Tensor:
        return (probabilities(logits, decoding, seen) / noise).argmax(-1)

    return greedy if decoding.kind == "greedy" else sampled


def asks_what_was_seen(decoding: DecodingConfig) -> bool:
    """Whether the choice of a token depends on which tokens the text has already."""
    return decoding.kind == "sampling" and decoding.repetition_penalty not in (None, 1.0)


def note_seen(seen: torch.Tensor | None, tokens: torch.Tensor) -> None:
    """Mark `tokens` (n,) in `seen` (1, vocabulary), bool, if there is one."""
    if seen is not None:
        seen.scatter_(1, tokens[None], True)


def probabilities(logits: torch.Tensor, decoding: DecodingConfig, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities (rows, vocabulary) after repetition penalty, temperature, top-k, top-p and min-p, in that order.

    Order and bounds are transformers'. The penalty (Keskar et al., CTRL, 4.1, with signs: a positive logit is
    divided, a negative one multiplied) is for tokens that `seen`, bool of the logits' shape, marks.
    """
    scores = logits
    if seen is not None and decoding.repetition_penalty is not None:
        penalty = decoding.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    scores = scores / (decoding.temperature or 1.0)
    never = float("-inf")
    if decoding.top_k:
        least = scores.topk(min(decoding.top_k, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, never)
    if decoding.top_p is not None and decoding.top_p < 1.0:
        ordered, order = scores.sort()
        unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - decoding.top_p
        unlikely[..., -1:] = False
        scores = scores.masked_fill(unlikely.scatter(-1, order, unlikely), never)
    if decoding.min_p is not None:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < decoding.min_p * shares.amax(-1, keepdim=True), never)
    return scores.softmax(-1)
