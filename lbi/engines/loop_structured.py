"""engine=loop with a grammar: forward pass and choice are two launches, and the masks are made in between.

Text ends where the grammar is complete: with EOS, or where nothing more may come. So it has as many tokens as
it needs, at most `workload.new_tokens`, and its speed is that of the tokens it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lbi import structured
from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.engines import Graphs
from lbi.engines.grammar_drafter import GrammarDrafter, allowed_only, byte_table
from lbi.engines.loop import keep, last_logits
from lbi.engines.loop_speculative import SpeculativeLoop
from lbi.engines.sampling import note_seen
from lbi.engines.speculation import Drafter
from lbi.engines.verification import feed_step, settle_step


class StructuredLoop(SpeculativeLoop):
    """engine=loop, decoding=structured*. `tokenizer` is the model's, from Hugging Face."""

    def __init__(self, model: Any, config: LbiConfig, slots: int, tokenizer: Any) -> None:
        super().__init__(model, config, slots)
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        matcher = structured.matcher(config.decoding, tokenizer, self._vocabulary)
        self._grammar = GrammarDrafter(
            config.decoding, matcher, int(tokenizer.eos_token_id), self.drafts, self._vocabulary
        )
        self._table = byte_table(model.device)
        self._verify = feed_step(model, self._names)
        self._settle = settle_step(config.decoding)
        self._choices: dict[int, GraphedCall] = {}

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Target.prepare`."""
        super().prepare(counts)
        for count in counts if self._graphed is not None else ():
            if count not in self._choices:
                logits = self._verifications[count]()
                restore = self._buffers().reset
                restore()
                self._choices[count] = GraphedCall(partial(self._run_choice, count, logits), restore)

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        found = super().graphs()
        if found is None:
            return None
        choices = self._choices.values()
        return Graphs(found.captured + len(choices), found.replays + sum(graph.replays for graph in choices))

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Target.prefill`: the first token follows the grammar as well."""
        buffers, length = self._buffers(), ids.shape[0]
        buffers.cache.empty = True
        positions = torch.arange(length, device=ids.device)[None]
        logits = last_logits(self._forward, ids[None], positions, buffers.cache, self._names)
        buffers.cache.empty = False
        self._grammar.fill(0)
        buffers.tokens[:length] = ids
        buffers.position.fill_(length - 1)
        buffers.draw()
        note_seen(buffers.seen, ids)
        chosen = self._choose(allowed_only(logits, self._grammar.masks[:1], self._table), buffers.noise, buffers.seen)
        keep(chosen, buffers.token, buffers.position, buffers.tokens)
        note_seen(buffers.seen, chosen)
        return logits

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """See `Target.verify`."""
        logits = super().verify(count, behind)
        self._grammar.fill(count)
        if self._graphed is not None:
            self._choices[count]()
        else:
            self._run_choice(count, logits)
        return logits

    def _run_verification(self, count: int, buffers: Any) -> torch.Tensor:
        logits: torch.Tensor = self._verify(buffers.token, buffers.position, buffers.cache, self.drafts.tokens[:count])
        return logits

    def _run_choice(self, count: int, logits: torch.Tensor) -> None:
        buffers = self._buffers()
        buffers.draw()
        self.drafts.draw()
        allowed = allowed_only(logits, self._grammar.masks[: count + 1], self._table)
        own = (buffers.token, buffers.position, buffers.tokens, buffers.noise, buffers.seen, buffers.cache)
        self._settle(allowed, *own, *self.drafts.first(count))

    def _make_drafter(self) -> Drafter:
        return self._grammar
