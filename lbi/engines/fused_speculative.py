"""engine=fused with speculative decoding: a verification of k + 1 tokens by the same matrices.

Without drafts it is the engine's own step. With drafts the products are those of a short prefill, and what lies
between them has kernels of its own (kernels/several.py). Shapes are fixed, however far the text is. Nothing
counts the cache but the position, so that dropping drafts is setting it.
"""

from __future__ import annotations

from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.draft_models import Draft
from lbi.engines.fused import FusedEngine, describe_slots
from lbi.engines.fused_drafter import FusedDrafter, share_blocks
from lbi.engines.speculation import Drafter, LookupDrafter
from lbi.engines.speculative import Speculative
from lbi.engines.verification import acceptance


class SpeculativeFused(Speculative, FusedEngine):
    """engine=fused, decoding=speculative_*. Raises `Unsupported` where the draft cannot be read either."""

    def __init__(self, model: Any, config: LbiConfig, slots: int, draft: Draft | None = None) -> None:
        if draft is not None:
            share_blocks(draft.model, model)
        FusedEngine.__init__(self, model, config, slots)
        self._expect_drafts(self.llama.head.rows, self.llama.device)
        self._accept = acceptance(config.decoding)
        own = (self.llama, config, self.drafts, self._noise, self._seen)
        self._by_model = None if draft is None else FusedDrafter(draft, *own)

    def last_token(self) -> int:
        """See `Target.last_token`."""
        return int(self._last())

    def describe_cache(self) -> dict[str, Any]:
        """See `Target.describe_cache`: by torch a verification reads a cache that is not low-bit to its end."""
        found = self._describe_cache()
        if self.llama.cache is None and not self.llama.several.reads_live(self.drafts.tokens.shape[0] + 1):
            found["reads"] = "slots"
        if self._by_model is not None and not self._by_model.shares_cache:
            own = describe_slots(self._by_model.llama)
            found["draft"] = {name: own[name] for name in ("class", "bytes", "bytes_per_slot")}
        return found

    def _run_verification(self, count: int) -> torch.Tensor:
        if count:
            logits = self._feed(count)
            self._settle(count, logits)
            return logits
        noise = None if self._noise is None else self._noise.exponential_()
        logits = self.llama.step(None if noise is None else self._take, noise)
        self.drafts.report[:2].copy_(torch.cat([torch.ones_like(self.drafts.report[:1]), self._last()]))
        return logits

    def _feed(self, count: int) -> torch.Tensor:
        """The last token and its drafts through the model: logits (count + 1, vocabulary), float32."""
        if count == 0:
            return self.llama.feed()
        where = self.llama.steps.position.long() + torch.arange(count + 1, device=self.llama.device)
        return self.llama.extend(torch.cat([self._last(), self.drafts.tokens[:count]]), where)

    def _settle(self, count: int, logits: torch.Tensor) -> None:
        """What the logits of a verification come to: tokens, position and report."""
        self.drafts.draw()
        steps, (drafts, shares, uniform, report) = self.llama.steps, self.drafts.first(count)
        noise = None if self._noise is None else self._noise.exponential_()
        chosen, made = self._accept(logits, drafts, noise, uniform, shares, self._seen)
        ahead = torch.arange(count + 1, device=self.llama.device)
        if self._seen is not None:
            # The first always stands, so the others can be marked as that one where they do not.
            self._seen.scatter_(1, torch.where(ahead < made, chosen, chosen[:1])[None], True)
        steps.tokens.index_copy_(0, steps.position + 1 + ahead, chosen)
        steps.position.add_(made.to(steps.position.dtype))
        report.copy_(torch.cat([made, chosen]))

    def _last(self) -> torch.Tensor:
        steps = self.llama.steps
        last: torch.Tensor = steps.tokens.index_select(0, steps.position.long())
        return last

    def _make_drafter(self) -> Drafter:
        if self._by_model is None:
            return LookupDrafter(self.drafts, self.config.decoding.ngram or 1)
        return self._by_model
