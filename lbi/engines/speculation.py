"""Speculative decoding: the host's part, the same for every engine and every kind of draft.

A turn is a draft of some tokens and one verification by the model. The host waits for the device once
a turn, for the number of tokens that stood: without that it could not know when the text is long
enough, nor look anything up. How many tokens are drafted is one of a few numbers, so that each
verification is a graph of fixed shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from lbi.config import DecodingConfig
from lbi.engines import Generation, Mark
from lbi.engines.clock import Clock
from lbi.engines.lookup import Lookup
from lbi.engines.verification import Drafts
from lbi.metrics import Speculation, Timing


class Target(Protocol):
    """The model whose tokens are wanted, as an engine runs it."""

    def prepare(self, counts: Sequence[int]) -> None:
        """Empty the buffers, and capture what is not yet captured for verifications of so many drafts."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed the prompt (tokens,) and choose the first new token; its logits, (1, vocabulary)."""

    def last_token(self) -> int:
        """The token that is fed next; the host waits for it."""

    def verify(self, count: int, behind: int) -> torch.Tensor:
        """Verify the first `count` drafts; logits (count + 1, vocabulary). What stood is in the report.

        `behind` is the number of tokens before the one that is fed next.
        """

    def describe_cache(self) -> dict[str, Any]:
        """See `Generation.cache`."""


class Drafter(Protocol):
    """Where drafts come from.

    `finished`: the text needs no more tokens, nor its last `surplus` ones. `forced` drafts were the only ones
    that a grammar allowed, and `mask_s` are the seconds that it took, both since `prepare`.
    """

    finished: bool
    surplus: int
    forced: int
    mask_s: float

    def prepare(self, counts: Sequence[int]) -> None:
        """Forget the last text, and capture what is not yet captured."""

    def begin(self, prompt: list[int]) -> None:
        """A new text begins with this prompt."""

    def extend(self, tokens: list[int]) -> None:
        """These tokens came next."""

    def propose(self, count: int) -> int:
        """Put up to `count` drafts into the buffer; how many there are."""


class LookupDrafter:
    """Drafts from the text itself: see lookup.py."""

    finished, surplus, forced, mask_s = False, 0, 0, 0.0

    def __init__(self, drafts: Drafts, ngram: int) -> None:
        self.ngram, self.drafts = ngram, drafts
        self._lookup = Lookup(ngram)
        on_gpu = drafts.tokens.is_cuda
        # Pinned, or the copy would wait. It is written again only after the turn's report has come.
        self._staged = torch.zeros(len(drafts.tokens), dtype=torch.long, pin_memory=on_gpu)

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Drafter.prepare`."""
        self._lookup = Lookup(self.ngram)

    def begin(self, prompt: list[int]) -> None:
        """See `Drafter.begin`."""
        self._lookup.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        """See `Drafter.extend`."""
        self._lookup.extend(tokens)

    def propose(self, count: int) -> int:
        """See `Drafter.propose`: `count`, or none where the text's ending is new."""
        found = self._lookup.propose(count)
        if found:
            self._staged[:count] = torch.tensor(found)
            self.drafts.tokens[:count].copy_(self._staged[:count], non_blocking=True)
        return len(found)


class Pace:
    """How many tokens are drafted: always as many, or twice as many after all stood and half after less than half.

    It depends on the text alone, never on the clock, so that every repetition takes the same turns.
    """

    def __init__(self, decoding: DecodingConfig) -> None:
        self.most, self.adaptive = decoding.draft_tokens or 1, decoding.adaptive
        # What a grammar forces is of any length.
        self.by_grammar = decoding.grammar is not None
        self.count = self.most

    def counts(self) -> list[int]:
        """Every number of drafts that there can be, besides none."""
        if not self.adaptive and not self.by_grammar:
            return [self.most]
        return sorted({self.most >> shift for shift in range(self.most.bit_length())})

    def note(self, drafted: int, stood: int) -> None:
        """Learn from a turn."""
        if not self.adaptive:
            return
        steps = self.counts()
        at = steps.index(self.count)
        if drafted and stood == drafted:
            self.count = steps[min(at + 1, len(steps) - 1)]
        elif drafted and 2 * stood < drafted:
            self.count = steps[max(at - 1, 0)]


class Speculator:
    """Generates by drafting and verifying. `drafts` is shared with the target, which verifies what is in it."""

    def __init__(self, decoding: DecodingConfig, device: str, drafter: Drafter, drafts: Drafts) -> None:
        self.decoding, self.device, self.drafter, self.drafts = decoding, device, drafter, drafts

    def generate(
        self, target: Target, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool, mark: Mark
    ) -> Generation:
        """See `Engine.generate`. Tokens of one verification have its end as their time; what is too much is cut off."""
        clock, pace = Clock(self.device), Pace(self.decoding)
        counts = pace.counts()
        # A lookup may find nothing, a model always says something.
        target.prepare(counts if self.decoding.speculative in ("draft", "self") else [0, *counts])
        self.drafter.prepare(counts)
        ids = torch.tensor(prompt, device=self.drafts.tokens.device)
        torch.manual_seed(seed)
        if self.device == "cuda":
            torch.cuda.synchronize()
        clock.mark()
        logits = [target.prefill(ids)]
        self.drafter.begin(prompt)
        clock.mark()
        tokens = [target.last_token()]
        self.drafter.extend(tokens)
        turns: list[tuple[int, int]] = []
        while len(tokens) < new_tokens and not self.drafter.finished:
            count = self.drafter.propose(pace.count)
            clock.mark()
            with mark(1):
                found = target.verify(count, len(prompt) + len(tokens) - 1)
            clock.mark()
            made, *chosen = self.drafts.report[: count + 2].tolist()
            tokens += chosen[:made]
            self.drafter.extend(chosen[:made])
            pace.note(count, made - 1)
            turns.append((count, made))
            if inspect:
                logits.append(found[:made].to("cpu", copy=True))
        clock.mark()
        text = len(tokens) - self.drafter.surplus
        finished, new_tokens = self.drafter.finished and text <= new_tokens, min(text, new_tokens)
        timing, speculation = read_clock(clock.seconds(), turns, len(prompt), new_tokens)
        speculation = replace(speculation, forced=self.drafter.forced, mask_s=self.drafter.mask_s)
        if not inspect:
            return Generation(tokens[:new_tokens], timing, speculation=speculation, finished=finished)
        kept = torch.cat([one.cpu() for one in logits])[:new_tokens]
        return Generation(tokens[:new_tokens], timing, kept, target.describe_cache(), speculation, finished)


def read_clock(
    seconds: list[float], turns: list[tuple[int, int]], prompt_tokens: int, new_tokens: int
) -> tuple[Timing, Speculation]:
    """What the marks mean: start, first token, the end of each turn's draft and of its verification, end."""
    start, first, *marks, end = seconds
    drafted, verified = marks[::2], marks[1::2]
    times = [first]
    for at, (_, made) in zip(verified, turns, strict=True):
        times += [at] * made
    before = [first, *verified]
    speculation = Speculation(
        tokens=len(times[:new_tokens]),
        verifications=len(turns),
        drafted=sum(count for count, _ in turns),
        accepted=sum(made - 1 for _, made in turns),
        draft_s=sum(late - early for early, late in zip(before, drafted, strict=False)),
        verify_s=sum(late - early for early, late in zip(drafted, verified, strict=True)),
    )
    return Timing(start, tuple(times[:new_tokens]), end, prompt_tokens), speculation
