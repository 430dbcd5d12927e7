"""engine=fused with a grammar: see speculative.py, which has what is not this engine's own."""

from __future__ import annotations

from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.engines.fused_speculative import SpeculativeFused
from lbi.engines.speculative import Structured


class StructuredFused(Structured, SpeculativeFused):
    """engine=fused, decoding=structured*. `tokenizer` is the model's, from Hugging Face."""

    def __init__(self, model: Any, config: LbiConfig, slots: int, tokenizer: Any) -> None:
        SpeculativeFused.__init__(self, model, config, slots)
        self._follow(tokenizer, self.llama.head.rows, self.llama.device)

    def _run_verification(self, count: int) -> torch.Tensor:
        return self._feed(count)

    def _settle_among(self, count: int, allowed: torch.Tensor) -> None:
        self._settle(count, allowed)

    def _take(self, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """The prompt's token: all others are settled."""
        return super()._take(self._first_allowed(logits), noise)
