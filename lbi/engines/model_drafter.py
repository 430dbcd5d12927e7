"""Drafts by a model: a few steps of a cheaper model, one token each, on the device.

A draft that has its own cache has not seen the last token that stood when all of its drafts did. So its
first step feeds two tokens, of which the first may be there already: writing it again changes nothing, and the
shapes are the same at every turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.draft_models import Draft
from lbi.engines.cache import LoopCache
from lbi.engines.loop import Buffers, last_logits, takes
from lbi.engines.sampling import probabilities
from lbi.engines.verification import Drafts, require_rewindable, rewind

DraftStep = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class ModelDrafter:
    """Drafts of `draft` for the text in `buffers`; see `Drafter`."""

    finished, surplus, forced, mask_s = False, 0, 0, 0.0

    def __init__(self, draft: Draft, config: LbiConfig, buffers: Buffers, drafts: Drafts, slots: int) -> None:
        self.draft, self.buffers, self.drafts = draft, buffers, drafts
        self.eager, self.graphed = config.compiler.backend == "eager", config.compiler.backend == "cudagraph"
        self._names = takes(draft.model)
        self._step = draft_step(draft.model, config, self._names)
        self.graphs: dict[int, GraphedCall] = {}
        self._known = 0
        self._fed_first = 1 if draft.shares_cache else 2
        self.cache = buffers.cache if draft.shares_cache else _own_cache(draft.model, slots)
        if not self.eager and not self.graphed:
            from lbi.compilers import compile_function

            self._step = compile_function(self._step, config.compiler)

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Drafter.prepare`."""
        self._known = 0
        for count in counts if self.graphed else ():
            if count not in self.graphs:
                # The first step looks back, so there must be something behind it.
                self._reset()
                self.graphs[count] = GraphedCall(partial(self._run, count), self._reset)
        self._reset()
        self.buffers.reset()

    def begin(self, prompt: list[int]) -> None:
        """See `Drafter.begin`: a draft with a cache of its own reads the prompt as well."""
        self._known = len(prompt)
        if self.draft.shares_cache:
            return
        self.cache.empty = True
        ids = torch.tensor([prompt], device=self.buffers.token.device)
        last_logits(self.draft.model, ids, torch.arange(len(prompt), device=ids.device)[None], self.cache, self._names)
        self.cache.empty = False

    def extend(self, tokens: list[int]) -> None:
        """See `Drafter.extend`."""
        self._known += len(tokens)

    def propose(self, count: int) -> int:
        """See `Drafter.propose`."""
        if self.graphed:
            self.graphs[count]()
        else:
            self._run(count)
        return count

    def _reset(self) -> None:
        self.buffers.reset()
        self.buffers.position.fill_(self._fed_first - 1)
        if not self.draft.shares_cache:
            self.cache.reset()

    def _run(self, count: int) -> None:
        buffers, drafts, first = self.buffers, self.drafts, self._fed_first
        at = buffers.position - (first - 1)
        rewind(self.cache, at)
        known = self._known - first if self.eager else None
        fed = buffers.text.index_select(0, at + torch.arange(first, device=at.device))[None]
        for index in range(count):
            self.cache.length = known
            if buffers.noise is not None:
                buffers.noise.exponential_()
            chosen, shares = self._step(fed, at, buffers.noise, buffers.seen, self.cache)
            drafts.tokens[index : index + 1].copy_(chosen)
            if shares is not None and drafts.shares is not None:
                drafts.shares[index].copy_(shares[0])
            at, known = at + fed.shape[1], None if known is None else known + fed.shape[1]
            fed = chosen[None].clone()
        self.cache.length = None
        if self.draft.shares_cache:
            rewind(self.cache, buffers.position)


def draft_step(model: Any, config: LbiConfig, names: frozenset[str]) -> DraftStep:
    """One step of a draft: from tokens (1, n) at position (1,) to the next, (1,), and what it was drawn from."""
    decoding = config.decoding

    def step(
        fed: torch.Tensor, at: torch.Tensor, noise: torch.Tensor | None, seen: torch.Tensor | None, cache: LoopCache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        where = at + torch.arange(fed.shape[1], device=fed.device)
        logits = last_logits(model, fed, where[None], cache, names)
        if noise is None:
            return logits.argmax(-1), None
        shares = probabilities(logits, decoding, seen)
        return (shares / noise).argmax(-1), shares

    return step


def _own_cache(model: Any, slots: int) -> LoopCache:
    cache = LoopCache(config=model.config, max_cache_len=slots)
    # One token through the model allocates every layer's slots.
    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    require_rewindable(cache)
    cache.reset()
    return cache
