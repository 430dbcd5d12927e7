"""Drafts by a model on engine=fused: steps of a second Llama of the same kernels, on the device.

A draft that shares the cache writes behind the text, where the verification writes anew. One with a cache of its
own has not seen the last token that stood when all of its drafts did, so it first feeds two, of which one may be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.draft_models import Draft
from lbi.engines.fused_llama import Llama
from lbi.engines.sampling import probabilities
from lbi.engines.verification import Drafts


class FusedDrafter:
    """Drafts of `draft` for the text of `target`; see `Drafter`. Raises `Unsupported` for one that cannot be read.

    `noise` and `seen` are the target's own; see loop.py's `Buffers`.
    """

    finished, surplus, forced, mask_s = False, 0, 0, 0.0

    def __init__(
        self,
        draft: Draft,
        target: Llama,
        config: LbiConfig,
        drafts: Drafts,
        noise: torch.Tensor | None,
        seen: torch.Tensor | None,
    ) -> None:
        self.shares_cache = draft.shares_cache
        cache = config.cache if draft.shares_cache else None
        self.llama = Llama(draft.model, target.shape.slots, cache, beside=target if draft.shares_cache else None)
        # One text: what is drafted lies behind it, where the verification writes what stands.
        self.llama.steps.tokens = target.steps.tokens
        self.decoding, self.drafts, self.noise, self.seen = config.decoding, drafts, noise, seen
        self._at: torch.Tensor = target.steps.position
        self._graphed = config.compiler.backend == "cudagraph"
        self.graphs: dict[int, GraphedCall] = {}

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Drafter.prepare`."""
        for count in counts if self._graphed else ():
            if count not in self.graphs:
                # The first step looks back, so there must be something behind it.
                self._at.fill_(1)
                self.graphs[count] = GraphedCall(partial(self._run, count), partial(self._at.fill_, 1))
        self._at.zero_()

    def begin(self, prompt: list[int]) -> None:
        """See `Drafter.begin`: a draft with a cache of its own reads the prompt as well."""
        if not self.shares_cache:
            self.llama.prefill(torch.tensor(prompt, device=self.llama.device))

    def extend(self, tokens: list[int]) -> None:
        """See `Drafter.extend`: the text is on the device."""

    def propose(self, count: int) -> int:
        """See `Drafter.propose`."""
        if self._graphed:
            self.graphs[count]()
        else:
            self._run(count)
        return count

    def _run(self, count: int) -> None:
        steps, at = self.llama.steps, self._at.long()
        steps.position.copy_(self._at)
        for index in range(count):
            choose = None if self.noise is None else partial(self._draw, index)
            noise = None if self.noise is None else self.noise.exponential_()
            if index or self.shares_cache:
                self.llama.step(choose, noise)
                continue
            where = torch.cat([at - 1, at])
            logits = self.llama.extend(steps.tokens.index_select(0, where), where)[-1:]
            steps.put(logits.argmax(-1) if choose is None else choose(logits, noise))
        ahead = at + 1 + torch.arange(count, device=at.device)
        self.drafts.tokens[:count].copy_(steps.tokens.index_select(0, ahead))

    def _draw(self, index: int, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """A token (1,) by the draft's probabilities, which are noted: the verification asks for them."""
        shares = probabilities(logits, self.decoding, self.seen)
        if self.drafts.shares is not None:
            self.drafts.shares[index].copy_(shares[0])
        return (shares / noise).argmax(-1)


def share_blocks(draft: Any, target: Any) -> None:
    """Have `draft` take the blocks whose weights are all the target's: stacked, these would be in memory twice."""
    ours, theirs = draft.model.layers, target.model.layers
    for index, (own, block) in enumerate(zip(ours, theirs, strict=False)):
        pairs = zip(own.parameters(), block.parameters(), strict=False)
        if all(one is other for one, other in pairs) and _plain(own) and _plain(block):
            ours[index] = block


def _plain(block: Any) -> bool:
    """Whether all its linear layers are as they were loaded; what replaces one has no parameters to compare."""
    kinds = [type(part) for part in block.modules() if hasattr(part, "in_features")]
    return all(kind is torch.nn.Linear for kind in kinds)
