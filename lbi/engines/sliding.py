"""A bounded cache for engine=loop: the first tokens and the latest ones, whatever the length of the text.

The model was not trained with it, so it costs quality, which is scored; what it saves is memory and
reading. The first few tokens stay because attention puts there what it has no other place for (Xiao et
al., Efficient Streaming Language Models with Attention Sinks, 2023): without them a window ruins a model.
Keys keep the positions that they came with.

Slots are a ring, written in place at a place that the device counts, so a step can be one graph. A
prompt is attended to in blocks of queries, each token as far back as the ring would let it look: one
pass over a text is the same as feeding it token by token.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import StaticLayer

from lbi.engines.cache import LoopCache, attend_by, refuse_extras, require_full_attention
from lbi.errors import Unsupported

BLOCK = 256
"""Queries of a prompt that are attended to at once."""


class Ring(NamedTuple):
    """What an attention function gets in place of keys, or of values: (1, heads, slots, width), tokens so far."""

    held: torch.Tensor
    length: torch.Tensor


class SlidingLayer(StaticLayer):  # type: ignore[misc]
    """One layer's slots: `sinks` for the first tokens, the others for the latest ones in turn."""

    def __init__(self, slots: int, sinks: int) -> None:
        super().__init__(max_cache_len=slots)
        self.cumulative_length: torch.Tensor = torch.tensor(0)
        self.sinks = sinks

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Put one token's keys and values (1, heads, 1, width) into their slot; the ring. Raises `Unsupported`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] > 1:
            raise Unsupported("a sliding cache takes one token at a time after the prompt")
        self._write(self.cumulative_length[None], key_states, value_states)
        self.cumulative_length.add_(1)
        return Ring(self.keys, self.cumulative_length), Ring(self.values, self.cumulative_length)

    def begin(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put a whole prompt into the empty ring: what of it is still within reach at its end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        positions = torch.arange(count, device=key_states.device)
        if count > self.max_cache_len:
            positions = torch.cat([positions[: self.sinks], positions[count - self.max_cache_len + self.sinks :]])
        self._write(positions, key_states[:, :, positions], value_states[:, :, positions])
        self.cumulative_length.fill_(count)

    def _write(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        turning = (positions - self.sinks) % (self.max_cache_len - self.sinks) + self.sinks
        slots = torch.where(positions < self.sinks, positions, turning)
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)


class SlidingCache(LoopCache):
    """A static cache of `slots` slots whose layers are rings; what an empty one gets comes back as it is."""

    def __init__(self, config: Any, slots: int, sinks: int) -> None:
        super().__init__(config=config, max_cache_len=slots)
        require_full_attention(self.layers, "a sliding cache")
        self.layers: list[Any] = [SlidingLayer(slots, sinks) for _ in self.layers]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **_: Any) -> Any:
        """See `SlidingLayer.update`."""
        if not self.empty:
            return self.layers[layer_idx].update(key_states, value_states)
        self.layers[layer_idx].begin(key_states, value_states)
        return key_states, value_states


def use(model: Any, window: int, sinks: int) -> None:
    """Have the model attend by `attention` from now on. Raises `Unsupported` for one that cannot be told so."""
    attend_by(model, f"lbi_sliding_{window}_{sinks}", partial(attention, window=window, sinks=sinks))


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | Ring,
    value: torch.Tensor | Ring,
    attention_mask: torch.Tensor | None,
    *,
    window: int,
    sinks: int,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: (1, tokens, heads, width) for queries (1, heads, tokens, width)."""
    refuse_extras(attention_mask, others, "a sliding cache")
    if isinstance(key, Ring):
        made = over_ring(query, key, value, scaling)  # type: ignore[arg-type]
    else:
        made = banded(query, key, value, scaling, window, sinks)  # type: ignore[arg-type]
    return made.transpose(1, 2).contiguous(), None


def over_ring(query: torch.Tensor, keys: Ring, values: Ring, scale: float | None) -> torch.Tensor:
    """Attention of one token to all that the ring holds; its order does not matter."""
    heads = keys.held.shape[1]
    # Query heads of one key-value head as rows: with a mask, SDPA would have keys copied for each of them.
    rows = query.reshape(1, heads, -1, query.shape[-1])
    filled = torch.arange(keys.held.shape[2], device=query.device) < keys.length
    made = F.scaled_dot_product_attention(rows, keys.held, values.held, attn_mask=filled[None, None, None], scale=scale)
    return made.reshape(1, query.shape[1], 1, -1)


def banded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int, sinks: int
) -> torch.Tensor:
    """Attention of a text's beginning to itself: a token sees the first `sinks` and the latest `window - sinks`."""
    count, made = query.shape[2], []
    places = torch.arange(count, device=query.device)
    for start in range(0, count, BLOCK):
        asking = places[start : start + BLOCK]
        first = max(0, start - (window - sinks) + 1)
        seen = torch.cat([places[: min(sinks, first)], places[first : start + BLOCK]])
        ahead, behind = seen[None] > asking[:, None], seen[None] <= asking[:, None] - (window - sinks)
        mask = ~ahead & (~behind | (seen < sinks)[None])
        made.append(
            F.scaled_dot_product_attention(
                query[:, :, start : start + BLOCK], key[:, :, seen], value[:, :, seen],
                attn_mask=mask, scale=scale, enable_gqa=True,
            )
        )  # fmt: skip
    return torch.cat(made, dim=2)
