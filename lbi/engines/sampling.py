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

Choose = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From logits (1, vocabulary), float32, and noise of the same shape to the next token, (1,)."""


def chooser(decoding: DecodingConfig) -> Choose:
    """What chooses the next token; greedy takes no noise."""

    def greedy(logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return logits.argmax(-1)

    def sampled(logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return (probabilities(logits, decoding) / noise).argmax(-1)

    return greedy if decoding.kind == "greedy" else sampled


def probabilities(logits: torch.Tensor, decoding: DecodingConfig) -> torch.Tensor:
    """Probabilities (1, vocabulary) after temperature, top-k and top-p, in transformers' order and with its bounds."""
    scores = logits / (decoding.temperature or 1.0)
    never = float("-inf")
    if decoding.top_k:
        least = scores.topk(min(decoding.top_k, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, never)
    if decoding.top_p is not None and decoding.top_p < 1.0:
        ordered, order = scores.sort()
        unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - decoding.top_p
        unlikely[..., -1:] = False
        scores = scores.masked_fill(unlikely.scatter(-1, order, unlikely), never)
    return scores.softmax(-1)
