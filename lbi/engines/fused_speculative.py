"""engine=fused with speculative decoding: a verification of k + 1 tokens by the same matrices.

Without drafts it is the engine's own step. With drafts the products are those of a short prefill, and attention
looks at the whole cache under a mask, so that shapes are fixed. Nothing counts the cache but the
position, so that dropping drafts is setting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.engines import Generation, Graphs
from lbi.engines.fused import FusedEngine
from lbi.engines.speculation import LookupDrafter, Speculator
from lbi.engines.verification import Drafts, acceptance


class SpeculativeFused(FusedEngine):
    """engine=fused, decoding=speculative_lookup: an `Engine` to a run and a `Target` to its `Speculator`."""

    def __init__(self, model: Any, config: LbiConfig, slots: int) -> None:
        super().__init__(model, config, slots)
        self._ahead = config.decoding.draft_tokens or 0
        self.drafts = Drafts.make(config.decoding, self.llama.head.rows, self.llama.device)
        self._accept = acceptance(config.decoding)
        self._verifications: dict[int, GraphedCall] = {}
        self._drafter = LookupDrafter(self.drafts, config.decoding.ngram or 1)

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """See `Engine.generate`. The tokens of one verification are known together, at its end."""
        self._check(prompt, new_tokens)
        with torch.no_grad():
            speculator = Speculator(self.config.decoding, self.device, self._drafter, self.drafts)
            return speculator.generate(self, prompt, new_tokens, seed=seed, inspect=inspect, mark=self._mark)

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        if self._graphed is None:
            return None
        return Graphs(len(self._verifications), sum(graph.replays for graph in self._verifications.values()))

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Target.prepare`."""
        for count in counts if self._graphed is not None else ():
            if count not in self._verifications:
                self._reset()
                self._verifications[count] = GraphedCall(partial(self._run_verification, count), self._reset)
        self._reset()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Target.prefill`."""
        return self._prefill(ids)

    def last_token(self) -> int:
        """See `Target.last_token`."""
        steps = self.llama.steps
        return int(steps.tokens.index_select(0, steps.position.long()))

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """See `Target.verify`."""
        if self._graphed is not None:
            return self._verifications[count]()  # type: ignore[no-any-return]
        return self._run_verification(count)

    def describe_cache(self) -> dict[str, Any]:
        """See `Target.describe_cache`: a verification reads it to its end, but a low-bit one as far as the text is."""
        found = self._describe_cache()
        if self.llama.cache is None:
            del found["reads"]
        return found

    def _run_verification(self, count: int) -> torch.Tensor:
        steps, (drafts, shares, uniform, report) = self.llama.steps, self.drafts.first(count)
        noise = None if self._noise is None else self._noise.exponential_()
        if count == 0:
            logits = self.llama.step(None if noise is None else self._take, noise)
            chosen, made = steps.tokens.index_select(0, steps.position.long()), torch.ones_like(report[:1])
        else:
            self.drafts.draw()
            at = steps.position.long()
            where = at + torch.arange(count + 1, device=at.device)
            logits = self.llama.extend(torch.cat([steps.tokens.index_select(0, at), drafts]), where)
            chosen, made = self._accept(logits, drafts, noise, uniform, shares, self._seen)
            if self._seen is not None:
                stands = torch.arange(count + 1, device=at.device) < made
                self._seen.scatter_(1, torch.where(stands, chosen, chosen[:1])[None], True)
            steps.tokens.index_copy_(0, where + 1, chosen)
            steps.position.add_(made.to(steps.position.dtype))
        report.copy_(torch.cat([made, chosen]))
        return logits
