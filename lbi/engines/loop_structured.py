"""engine=loop with a grammar: see speculative.py, which has what is not the loop's own."""

from __future__ import annotations

from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.engines.loop import keep, last_logits
from lbi.engines.loop_speculative import SpeculativeLoop
from lbi.engines.sampling import note_seen
from lbi.engines.speculative import Structured
from lbi.engines.verification import feed_step, settle_step


class StructuredLoop(Structured, SpeculativeLoop):
    """engine=loop, decoding=structured*. `tokenizer` is the model's, from Hugging Face."""

    def __init__(self, model: Any, config: LbiConfig, slots: int, tokenizer: Any) -> None:
        SpeculativeLoop.__init__(self, model, config, slots)
        self._follow(tokenizer, model.get_output_embeddings().weight.shape[0], model.device)
        self._verify = feed_step(model, self._names)
        self._settle = settle_step(config.decoding)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Target.prefill`: the first token follows the grammar as well."""
        buffers, length = self._buffers(), ids.shape[0]
        buffers.cache.empty = True
        positions = torch.arange(length, device=ids.device)[None]
        logits = last_logits(self._forward, ids[None], positions, buffers.cache, self._names)
        buffers.cache.empty = False
        allowed = self._first_allowed(logits)
        buffers.text[:length] = ids
        buffers.position.fill_(length - 1)
        buffers.draw()
        note_seen(buffers.seen, ids)
        chosen = self._choose(allowed, buffers.noise, buffers.seen)
        keep(chosen, buffers.token, buffers.position, buffers.tokens)
        note_seen(buffers.seen, chosen)
        return logits

    def _run_verification(self, count: int) -> torch.Tensor:
        buffers = self._buffers()
        logits: torch.Tensor = self._verify(buffers.token, buffers.position, buffers.cache, self.drafts.tokens[:count])
        return logits

    def _settle_among(self, count: int, allowed: torch.Tensor) -> None:
        buffers = self._buffers()
        buffers.draw()
        self.drafts.draw()
        own = (buffers.token, buffers.position, buffers.text, buffers.noise, buffers.seen, buffers.cache)
        self._settle(allowed, *own, *self.drafts.first(count))
