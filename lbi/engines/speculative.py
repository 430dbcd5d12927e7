"""What speculative and structured decoding are on engine=loop and engine=fused alike: who waits, captures and counts.

An engine's own part is a verification on its own buffers; see speculation.py for the host's part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lbi import structured
from lbi.cuda_graphs import GraphedCall
from lbi.engines import Generation, Graphs
from lbi.engines.grammar_drafter import GrammarDrafter, allowed_only, byte_table
from lbi.engines.launching import LaunchingEngine
from lbi.engines.speculation import Drafter, Speculator
from lbi.engines.verification import Drafts


class Speculative(LaunchingEngine):
    """An `Engine` to a run and a `Target` to its `Speculator`. Its `__init__` calls `_expect_drafts`."""

    drafts: Drafts
    _drafter: Drafter | None = None
    _verifications: dict[int, GraphedCall]

    @abstractmethod
    def _run_verification(self, count: int) -> torch.Tensor:
        """Verify the first `count` drafts; see `Target.verify`."""

    @abstractmethod
    def _make_drafter(self) -> Drafter:
        """Who drafts."""

    def _expect_drafts(self, vocabulary: int, device: Any) -> None:
        self._ahead = self.config.decoding.draft_tokens or 0
        self.drafts = Drafts.make(self.config.decoding, vocabulary, device)
        self._verifications = {}

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """See `Engine.generate`. The tokens of one verification are known together, at its end."""
        self._check(prompt, new_tokens)
        with torch.no_grad():
            if self._drafter is None:
                self.prepare([])
                self._drafter = self._make_drafter()
            speculator = Speculator(self.config.decoding, self.device, self._drafter, self.drafts)
            return speculator.generate(self, prompt, new_tokens, seed=seed, inspect=inspect, mark=self._mark)

    def without_drafts(self, prompt: list[int], new_tokens: int) -> Generation:
        """Greedy tokens one at a time, by the same model on the same buffers, and their logits."""
        return super().generate(prompt, new_tokens, seed=0, inspect=True)

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        if self._graphed is None:
            return None
        graphs = self._captured()
        return Graphs(len(graphs), sum(graph.replays for graph in graphs))

    def _captured(self) -> list[GraphedCall]:
        # A drafter that is a model has graphs of its own.
        return [*self._verifications.values(), *getattr(self._drafter, "graphs", {}).values()]

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

    @abstractmethod
    def last_token(self) -> int:
        """See `Target.last_token`."""

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """See `Target.verify`."""
        if self._graphed is not None:
            return self._verifications[count]()  # type: ignore[no-any-return]
        return self._run_verification(count)

    def describe_cache(self) -> dict[str, Any]:
        """See `Target.describe_cache`."""
        return self._describe_cache()


class Structured(Speculative):
    """With a grammar pass and choice are two launches, and masks are made in between. `__init__` calls `_follow`.

    Text ends where the grammar is complete: with EOS, or where nothing more may come. So it has as many tokens
    as it needs, at most `workload.new_tokens`, and its speed is that of the tokens it has.
    """

    _grammar: GrammarDrafter
    _table: torch.Tensor
    _choices: dict[int, GraphedCall]

    @abstractmethod
    def _settle_among(self, count: int, allowed: torch.Tensor) -> None:
        """Settle what stands of `count` drafts by logits (count + 1, vocabulary), of which only allowed are finite."""

    def _follow(self, tokenizer: Any, vocabulary: int, device: Any) -> None:
        """`tokenizer` is the model's, from Hugging Face."""
        decoding = self.config.decoding
        matcher = structured.matcher(decoding, tokenizer, vocabulary)
        self._grammar = GrammarDrafter(decoding, matcher, int(tokenizer.eos_token_id), self.drafts, vocabulary)
        self._table = byte_table(device)
        self._choices = {}

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Target.prepare`."""
        super().prepare(counts)
        for count in counts if self._graphed is not None else ():
            if count not in self._choices:
                logits = self._verifications[count]()
                self._reset()
                self._choices[count] = GraphedCall(partial(self._run_choice, count, logits), self._reset)

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """See `Target.verify`."""
        logits = super().verify(count, behind)
        self._grammar.fill(count)
        if self._graphed is not None:
            self._choices[count]()
        else:
            self._run_choice(count, logits)
        return logits

    def _captured(self) -> list[GraphedCall]:
        return [*super()._captured(), *self._choices.values()]

    def _run_choice(self, count: int, logits: torch.Tensor) -> None:
        self._settle_among(count, allowed_only(logits, self._grammar.masks[: count + 1], self._table))

    def _first_allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """What of the prompt's logits (1, vocabulary) the grammar lets begin the text."""
        self._grammar.fill(0)
        return allowed_only(logits, self._grammar.masks[:1], self._table)

    def _make_drafter(self) -> Drafter:
        return self._grammar
