"""Structured decoding as drafts: what a grammar forces is a draft that always stands.

Where the grammar leaves no choice its tokens are fed at once, in one verification; where a lookup is asked
for as well, its drafts are cut to what the grammar allows. Each row of a verification has a mask of the tokens
that may come there, one bit each. It is computed on the host while the device is at work on the row's logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lbi.config import DecodingConfig
from lbi.engines.lookup import Lookup
from lbi.engines.speculation import Pace
from lbi.engines.verification import Drafts
from lbi.errors import Unsupported

now: Callable[[], float] = time.perf_counter
"""The clock of `mask_s`; benchmarks on a busy machine take the thread's own seconds."""


class GrammarDrafter:
    """Drafts and masks for one grammar; see `Drafter`. `matcher` is llguidance's."""

    def __init__(self, decoding: DecodingConfig, matcher: Any, eos: int, drafts: Drafts, vocabulary: int) -> None:
        self.decoding, self.matcher, self.eos, self.drafts = decoding, matcher, eos, drafts
        self.sizes = [0, *Pace(decoding).counts()]
        on_gpu, rows, words = drafts.tokens.is_cuda, len(drafts.tokens) + 1, (vocabulary + 31) // 32
        self._bits = torch.zeros((rows, words), dtype=torch.int32, pin_memory=on_gpu)
        self._staged = torch.zeros(rows - 1, dtype=torch.long, pin_memory=on_gpu)
        # The host's view: one number is set faster through it than through a tensor.
        self._words = self._bits.numpy().view("uint32")
        self.masks = torch.zeros((rows, words), dtype=torch.int32, device="cuda") if on_gpu else self._bits
        self.finished, self.surplus, self.forced, self.mask_s = False, 0, 0, 0.0
        self._lookup: Lookup | None = None
        self._drafted: list[int] = []
        self._forced_now = 0
        self._ahead = 0

    def prepare(self, counts: Sequence[int]) -> None:
        """See `Drafter.prepare`."""
        self.matcher.reset()
        self.finished, self.surplus, self.forced, self.mask_s = False, 0, 0, 0.0
        self._drafted, self._forced_now, self._ahead = [], 0, 0
        self._lookup = Lookup(self.decoding.ngram or 1) if self.decoding.speculative == "lookup" else None

    def begin(self, prompt: list[int]) -> None:
        """See `Drafter.begin`."""
        if self._lookup is not None:
            self._lookup.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        """See `Drafter.extend`. The text is finished with EOS, or where the grammar allows nothing more."""
        start = now()
        # All but the last are drafts that stood, and `fill` has gone through all drafts.
        if self._ahead > len(tokens) - 1:
            self.matcher.rollback(self._ahead - len(tokens) + 1)
        self._ahead = 0
        # Behind a draft that completes the grammar there is nothing but EOS, which no model chose.
        self.surplus = int(self.matcher.is_stopped() and tokens[-1] == self.eos)
        if not self.surplus:
            self.matcher.consume_tokens(tokens[-1:])
        self._check()
        self.finished = self.eos in tokens or self.matcher.is_stopped()
        if self._lookup is not None:
            self._lookup.extend(tokens)
        self.mask_s += now() - start

    def propose(self, count: int) -> int:
        """See `Drafter.propose`: what is forced, else what a lookup finds and the grammar allows."""
        start = now()
        found = self.matcher.compute_ff_tokens() if self.decoding.fast_forward else []
        forced = len(found)
        if not found and self._lookup is not None:
            found = self._lookup.propose(count)
            found = found[: self.matcher.validate_tokens(found)] if found else []
            found = found[: found.index(self.eos)] if self.eos in found else found
        size = max(size for size in self.sizes if size <= len(found))
        self._drafted, self._forced_now = found[:size], min(forced, size)
        self.forced += self._forced_now
        if size:
            self._staged[:size] = torch.tensor(self._drafted)
            self.drafts.tokens[:size].copy_(self._staged[:size], non_blocking=True)
        self.mask_s += now() - start
        return size

    def fill(self, count: int) -> None:
        """Compute the masks of a verification of `count` drafts, and send them to the device."""
        start = now()
        start_of, row_bytes = self._bits.data_ptr(), self._bits.shape[1] * 4
        for row in range(count + 1):
            if row < self._forced_now:
                # The same text in other tokens would be allowed, but it is this one that was drafted.
                token = self._drafted[row]
                self._words[row] = 0
                self._words[row, token // 32] = 1 << token % 32
            else:
                self.matcher.unsafe_compute_mask_ptr(start_of + row * row_bytes, row_bytes)
            if row < count:
                self.matcher.consume_token(self._drafted[row])
        self._ahead = count
        self._check()
        if self.masks is not self._bits:
            self.masks[: count + 1].copy_(self._bits[: count + 1], non_blocking=True)
        self.mask_s += now() - start

    def _check(self) -> None:
        if self.matcher.is_error():
            raise Unsupported(f"decoding.grammar: {self.matcher.get_error()}")


def allowed_only(logits: torch.Tensor, masks: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`logits` (rows, vocabulary), minus infinity where the bit in `masks` (rows, words), int32, is not set.

    `table` is that of `byte_table`: eight truths at once are quicker than a shift for each.
    """
    bits = table.index_select(0, masks.view(torch.uint8).flatten().int()).view(masks.shape[0], -1)
    return logits.masked_fill(~bits[:, : logits.shape[1]], float("-inf"))


def byte_table(device: Any) -> torch.Tensor:
    """(256, 8) bool: the bits of each byte, the lowest first."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1 > 0
