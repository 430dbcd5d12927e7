"""How many drafted tokens stand, decided on the device: what makes speculative decoding change no output.

A verification feeds the last token and its drafts in one pass. Row i of the logits is what the model
says after i drafts. Greedy: a draft stands if it is the likeliest token of its row, and the first row
whose draft fell gives the next token. Sampling: draft x of distribution q stands with probability
min(1, p(x) / q(x)), and the token in place of the first that fell is drawn from max(p - q, 0)
(Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023, appendix A.1), which gives
exactly the distribution p. All of it is operations on tensors, so that a graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lbi.config import DecodingConfig
from lbi.engines.sampling import asks_what_was_seen, probabilities
from lbi.errors import Unsupported

Accept = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""From logits (n + 1, vocabulary), drafts (n,), noise, uniform, shares and seen to tokens (n + 1,) and how many
of them stand, (1,): at least one. Those after them mean nothing."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """What a verification is given and gives back, for up to k drafts. No tensor is ever replaced.

    `tokens` (k,) are the drafts, `shares` (k, vocabulary), float32, the probabilities that they were drawn from;
    None where they are certain, as those of a lookup. `uniform` (k,) decides which stand; None where nothing is
    sampled. `report` (k + 2,) has the number of new tokens and then the tokens, for the host.
    """

    tokens: torch.Tensor
    shares: torch.Tensor | None
    uniform: torch.Tensor | None
    report: torch.Tensor

    @classmethod
    def make(cls, decoding: DecodingConfig, vocabulary: int, device: Any) -> Drafts:
        """Empty ones for a cell's decoding."""
        count, sampled = decoding.draft_tokens or 1, decoding.kind == "sampling"
        by_model = decoding.speculative in ("draft", "self")
        return cls(
            torch.zeros(count, dtype=torch.long, device=device),
            torch.zeros((count, vocabulary), device=device) if sampled and by_model else None,
            torch.zeros(count, device=device) if sampled else None,
            torch.zeros(count + 2, dtype=torch.long, device=device),
        )

    def draw(self) -> None:
        """New random numbers for the next verification."""
        if self.uniform is not None:
            self.uniform.uniform_()

    def first(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Views of the first `count` drafts' tokens, shares and uniform numbers, and of their report."""
        shares = None if self.shares is None else self.shares[:count]
        uniform = None if self.uniform is None else self.uniform[:count]
        return self.tokens[:count], shares, uniform, self.report[: count + 2]


def acceptance(decoding: DecodingConfig) -> Accept:
    """What decides on drafts; greedy takes no random numbers."""

    def greedy(
        logits: torch.Tensor, drafts: torch.Tensor, noise: Any, uniform: Any, shares: Any, seen: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = logits.argmax(-1)
        stand = (chosen[:-1] == drafts).long().cumprod(0)
        return chosen, stand.sum(0, keepdim=True) + 1

    def sampled(
        logits: torch.Tensor,
        drafts: torch.Tensor,
        noise: torch.Tensor,
        uniform: torch.Tensor,
        shares: torch.Tensor | None,
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = None if seen is None else seen_by_row(seen, drafts)
        wanted = probabilities(logits, decoding, before)
        given = torch.zeros_like(wanted[:-1]).scatter(1, drafts[:, None], 1.0) if shares is None else shares
        ratio = uniform * given.gather(1, drafts[:, None])[:, 0] < wanted[:-1].gather(1, drafts[:, None])[:, 0]
        stand = ratio.long().cumprod(0).sum(0, keepdim=True)
        rest = torch.cat([(wanted[:-1] - given).clamp(min=0.0), wanted[-1:]]).index_select(0, stand)
        # Where p and q differ by less than float32 can hold nothing is left, and either will do.
        rest = torch.where(rest.sum() > 0, rest, wanted.index_select(0, stand))
        last = (rest / noise).argmax(-1)
        chosen = torch.cat([drafts, drafts.new_zeros(1)]).index_copy(0, stand, last)
        return chosen, stand + 1

    return greedy if decoding.kind == "greedy" else sampled


def seen_by_row(seen: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """What each row has behind it, (n + 1, vocabulary): row i has `seen` (1, vocabulary) and the drafts before i."""
    one_hot = torch.zeros((drafts.shape[0], seen.shape[1]), dtype=torch.int32, device=seen.device)
    drafted = one_hot.scatter(1, drafts[:, None], 1).cumsum(0) > 0
    return torch.cat([seen, seen | drafted])


def verify_step(model: Any, decoding: DecodingConfig, names: frozenset[str]) -> Callable[..., torch.Tensor]:
    """One verification by a model of transformers; all that it reads and writes are its arguments.

    The arguments are those of loop.py's `Buffers`, its text as `tokens`, and of `Drafts.first`.
    """
    feed, settle = feed_step(model, names), settle_step(decoding)

    def step(
        token: torch.Tensor,
        position: torch.Tensor,
        tokens: torch.Tensor,
        noise: Any,
        seen: Any,
        cache: Any,
        *drafts: Any,
    ) -> torch.Tensor:
        logits = feed(token, position, cache, drafts[0])
        settle(logits, token, position, tokens, noise, seen, cache, *drafts)
        return logits

    return step


def feed_step(model: Any, names: frozenset[str]) -> Callable[..., torch.Tensor]:
    """The last token and its drafts through the model: logits (n + 1, vocabulary), float32."""

    def feed(token: torch.Tensor, position: torch.Tensor, cache: Any, drafts: torch.Tensor) -> torch.Tensor:
        fed = torch.cat([token[0], drafts])
        where = position + torch.arange(fed.shape[0], device=fed.device)
        given = {"position_ids": where[None]} if "position_ids" in names else {}
        logits: torch.Tensor = model(input_ids=fed[None], past_key_values=cache, use_cache=True, **given).logits
        return logits[0].float()

    return feed


def settle_step(decoding: DecodingConfig) -> Callable[..., None]:
    """What the logits of a verification come to: tokens, the next one to feed, the report, and the cache's length.

    What is rolled back is a counter: keys and values behind it are masked, and written over by the next pass.
    """
    accept, penalized = acceptance(decoding), asks_what_was_seen(decoding)

    def settle(
        logits: torch.Tensor,
        token: torch.Tensor,
        position: torch.Tensor,
        tokens: torch.Tensor,
        noise: torch.Tensor | None,
        seen: torch.Tensor | None,
        cache: Any,
        drafts: torch.Tensor,
        shares: torch.Tensor | None,
        uniform: torch.Tensor | None,
        report: torch.Tensor,
    ) -> None:
        chosen, made = accept(logits, drafts, noise, uniform, shares, seen)
        ahead = torch.arange(chosen.shape[0], device=chosen.device)
        if penalized and seen is not None:
            # The first always stands, so the others can be marked as that one where they do not.
            seen.scatter_(1, torch.where(ahead < made, chosen, chosen[:1])[None], True)
        tokens.index_copy_(0, position + 1 + ahead, chosen)
        token.copy_(chosen.index_select(0, made - 1)[None])
        position.add_(made)
        rewind(cache, position)
        report.copy_(torch.cat([made, chosen]))

    return settle


def rewind(cache: Any, position: torch.Tensor) -> None:
    """Let the cache hold the first `position` (1,) tokens and no more."""
    for layer in cache.layers:
        layer.cumulative_length.copy_(position[0])


def require_rewindable(cache: Any) -> None:
    """Raises `Unsupported` for a cache that cannot forget its last tokens."""
    for layer in cache.layers:
        if layer.is_sliding or not hasattr(layer, "cumulative_length"):
            raise Unsupported(
                f"decoding=speculative: a {type(layer).__name__} has written over older tokens when drafts are dropped "
                "from it; decoding=greedy runs this model"
            )
