"""engine=loop with speculative decoding: verifications are its steps, on the same buffers and compiled alike.

transformers refuses drafts on a static cache. Here they cost nothing but a counter: the pass of k + 1 tokens
has a fixed shape, and dropping what did not stand sets the cache's length back, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall, require_device_counters
from lbi.draft_models import Draft
from lbi.engines import Generation, Graphs
from lbi.engines.cache import describe_cache
from lbi.engines.loop import Buffers, LoopEngine
from lbi.engines.model_drafter import ModelDrafter
from lbi.engines.speculation import Drafter, LookupDrafter, Speculator
from lbi.engines.verification import Drafts, require_rewindable, verify_step


class SpeculativeLoop(LoopEngine):
    """engine=loop, decoding=speculative_*: an `Engine` to a run and a `Target` to its `Speculator`."""

    def __init__(self, model: Any, config: LbiConfig, slots: int, draft: Draft | None = None) -> None:
        super().__init__(model, config, slots)
        self._draft = draft
        self._ahead = config.decoding.draft_tokens or 0
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.drafts = Drafts.make(config.decoding, vocabulary, model.device)
        self._verify = verify_step(model, config.decoding, self._names)
        self._verifications: dict[int, GraphedCall] = {}
        self._drafter: Drafter | None = None

    def compile(self) -> None:
        """See `Engine.compile`."""
        from lbi.compilers import compile_function

        super().compile()
        if self._graphed is None:
            self._verify = compile_function(self._verify, self.config.compiler)

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """See `Engine.generate`. The tokens of one verification are known together, at its end."""
        self._check(prompt, new_tokens)
        with torch.no_grad():
            if self._drafter is None:
                self.prepare([])
                self._drafter = self._make_drafter()
            speculator = Speculator(self.config.decoding, self.device, self._drafter, self.drafts)
            return speculator.generate(self, prompt, new_tokens, seed=seed, inspect=inspect, mark=self._mark)

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        if self._graphed is None:
            return None
        graphs = [*self._verifications.values()]
        if isinstance(self._drafter, ModelDrafter):
            graphs += self._drafter.graphs.values()
        return Graphs(len(graphs), sum(graph.replays for graph in graphs))

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Target.prepare`."""
        buffers = self._buffers()
        require_rewindable(buffers.cache)
        if self._graphed is not None:
            require_device_counters(buffers.cache)
            for count in counts:
                if count not in self._verifications:
                    buffers.reset()
                    call = partial(self._run_verification, count, buffers)
                    self._verifications[count] = GraphedCall(call, buffers.reset)
        buffers.reset()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Target.prefill`."""
        self._buffers().tokens[: ids.shape[0]] = ids
        return self._prefill(ids)

    def last_token(self) -> int:
        """See `Target.last_token`."""
        return int(self._buffers().token)

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """See `Target.verify`."""
        if self._graphed is not None:
            return self._verifications[count]()  # type: ignore[no-any-return]
        buffers = self._buffers()
        # Without it transformers asks the device whether the cache is empty, and waits for the answer.
        buffers.cache.length = behind if self.config.compiler.backend == "eager" else None
        logits = self._run_verification(count, buffers)
        buffers.cache.length = None
        return logits

    def describe_cache(self) -> dict[str, Any]:
        """See `Target.describe_cache`."""
        found = describe_cache(self._buffers().cache)
        if isinstance(self._drafter, ModelDrafter) and not self._drafter.draft.shares_cache:
            own = describe_cache(self._drafter.cache)
            found["draft"] = {name: own[name] for name in ("class", "bytes", "bytes_per_slot")}
        return found

    def _run_verification(self, count: int, buffers: Buffers) -> torch.Tensor:
        buffers.draw()
        self.drafts.draw()
        own = (buffers.token, buffers.position, buffers.tokens, buffers.noise, buffers.seen, buffers.cache)
        return self._verify(*own, *self.drafts.first(count))

    def _make_drafter(self) -> Drafter:
        if self._draft is None:
            return LookupDrafter(self.drafts, self.config.decoding.ngram or 1)
        return ModelDrafter(self._draft, self.config, self._buffers(), self.drafts, self.slots)
