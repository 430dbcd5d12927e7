"""engine=loop with speculative decoding: verifications are its steps, on the same buffers and compiled alike.

transformers refuses drafts on a static cache. Here they cost nothing but a counter: the pass of k + 1 tokens
has a fixed shape, and dropping what did not stand sets the cache's length back, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import require_device_counters
from lbi.draft_models import Draft
from lbi.engines import low_bit
from lbi.engines.cache import describe_cache
from lbi.engines.loop import LoopEngine
from lbi.engines.model_drafter import ModelDrafter
from lbi.engines.speculation import Drafter, LookupDrafter
from lbi.engines.speculative import Speculative
from lbi.engines.verification import require_rewindable, verify_step


class SpeculativeLoop(Speculative, LoopEngine):
    """engine=loop, decoding=speculative_*."""

    def __init__(self, model: Any, config: LbiConfig, slots: int, draft: Draft | None = None) -> None:
        LoopEngine.__init__(self, model, config, slots)
        self._draft = draft
        if draft is not None and draft.shares_cache and config.cache.format:
            low_bit.use(draft.model, config.cache.format, config.cache.group_size)
        self._expect_drafts(model.get_output_embeddings().weight.shape[0], model.device)
        self._verify = verify_step(model, config.decoding, self._names)

    def compile(self) -> None:
        """See `Engine.compile`."""
        from lbi.compilers import compile_function

        super().compile()
        if self._graphed is None:
            self._verify = compile_function(self._verify, self.config.compiler)

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Target.prepare`."""
        cache = self._buffers().cache
        require_rewindable(cache)
        if self._graphed is not None:
            require_device_counters(cache)
        super().prepare(counts)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Target.prefill`."""
        self._buffers().text[: ids.shape[0]] = ids
        return self._prefill(ids)

    def last_token(self) -> int:
        """See `Target.last_token`."""
        return int(self._buffers().token)

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """See `Target.verify`."""
        cache = self._buffers().cache
        # Without it transformers asks the device whether the cache is empty, and waits for the answer.
        cache.length = behind if self.config.compiler.backend == "eager" else None
        logits = super().verify(count, behind)
        cache.length = None
        return logits

    def describe_cache(self) -> dict[str, Any]:
        """See `Target.describe_cache`."""
        found = self._describe_cache()
        if isinstance(self._drafter, ModelDrafter) and not self._drafter.draft.shares_cache:
            own = describe_cache(self._drafter.cache)
            found["draft"] = {name: own[name] for name in ("class", "bytes", "bytes_per_slot")}
        return found

    def _run_verification(self, count: int) -> torch.Tensor:
        buffers = self._buffers()
        buffers.draw()
        self.drafts.draw()
        own = (buffers.token, buffers.position, buffers.text, buffers.noise, buffers.seen, buffers.cache)
        return self._verify(*own, *self.drafts.first(count))

    def _make_drafter(self) -> Drafter:
        if self._draft is None:
            return LookupDrafter(self.drafts, self.config.decoding.ngram or 1)
        return ModelDrafter(self._draft, self.config, self._buffers(), self.drafts, self.slots)
