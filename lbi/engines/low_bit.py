"""A low-bit cache for engine=loop: transformers' model, lbi's storage and attention.

transformers hands a layer's new keys and values to the cache, and what the cache answers to the
attention function. Here the answer is the stored rows themselves, and the function, registered with
transformers under a name of its own, reads them as they are: nothing is unpacked in between.

A prompt is another matter: its keys and values are at hand. They are rounded as the cache will hold
them and attended to at once, which is what a token would see that came one at a time. So one pass over
a text is the same as feeding it token by token, and quality is scored by such passes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import StaticLayer

from lbi.engines.cache import LoopCache, attend_by, refuse_extras, require_full_attention
from lbi.errors import Unsupported
from lbi.kernels import cache_ops
from lbi.kernels.cache_formats import CacheFormat, Rows


class Held(NamedTuple):
    """What an attention function gets in place of keys, or of values: rows, and how many are live."""

    codes: torch.Tensor
    numbers: torch.Tensor
    length: torch.Tensor

    @property
    def rows(self) -> Rows:
        """The rows alone."""
        return Rows(self.codes, self.numbers)


class LowBitLayer(StaticLayer):  # type: ignore[misc]
    """One layer's slots. `keys` and `values` are codes, (heads, slots, bytes); the numbers lie beside them."""

    def __init__(self, max_cache_len: int, name: str, group: int | None) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.cumulative_length: torch.Tensor = torch.tensor(0)
        self.format_name, self.group = name, group

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the slots for keys and values like these, (1, heads, tokens, width)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_kind = format_for(self.format_name, self.group, key_states.shape[-1])
        self.value_kind = format_for(self.format_name, self.group, value_states.shape[-1])
        self.key_rows = self.key_kind.allocate(key_states.shape[1], self.max_cache_len, self.device)
        self.value_rows = self.value_kind.allocate(value_states.shape[1], self.max_cache_len, self.device)
        self.keys, self.values = self.key_rows.codes, self.value_rows.codes
        self.cumulative_length = self.cumulative_length.to(self.device)
        for tensor in (*self.tensors(), self.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is stored."""
        return (*self.key_rows.tensors, *self.value_rows.tensors)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values (1, heads, tokens, width); what is held of both, these included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache_ops.put(self.key_rows, key_states[0], self.cumulative_length, self.key_kind)
        cache_ops.put(self.value_rows, value_states[0], self.cumulative_length, self.value_kind)
        self.cumulative_length.add_(key_states.shape[-2])
        length = self.cumulative_length
        return Held(*self.key_rows.tensors, length), Held(*self.value_rows.tensors, length)


class LowBitCache(LoopCache):
    """A static cache whose layers are low-bit ones; what comes first into an empty one is handed back as it came."""

    def __init__(self, config: Any, max_cache_len: int, name: str, group: int | None) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len)
        require_full_attention(self.layers, "a low-bit cache")
        self.layers: list[Any] = [LowBitLayer(max_cache_len, name, group) for _ in self.layers]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **_: Any) -> Any:
        """See `LowBitLayer.update`."""
        held = self.layers[layer_idx].update(key_states, value_states)
        return (key_states, value_states) if self.empty else held


def format_for(name: str, group: int | None, width: int) -> CacheFormat:
    """The format for heads of `width` values. Raises `Unsupported` for groups that do not divide them."""
    try:
        return CacheFormat(name, width, group or width)
    except ValueError as error:
        raise Unsupported(f"cache.group_size={group}: {error}") from error


def use(model: Any, name: str, group: int | None) -> None:
    """Have the model attend by `attention` from now on. Raises `Unsupported` for one that cannot be told so."""
    attend_by(model, f"lbi_{name}_{group or 'head'}", partial(attention, name=name, group=group))


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | Held,
    value: torch.Tensor | Held,
    attention_mask: torch.Tensor | None,
    *,
    name: str,
    group: int | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: (1, tokens, heads, width) for queries (1, heads, tokens, width).

    There is no mask: tokens attend to all that is before them. Raises `Unsupported` for what models add to that.
    """
    refuse_extras(attention_mask, others, "a low-bit cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Held):
        kind = format_for(name, group, query.shape[-1])
        made = cache_ops.attend(query[0], key.rows, value.rows, key.length, kind, scale)[None]  # type: ignore[union-attr]
    else:
        kinds = (format_for(name, group, key.shape[-1]), format_for(name, group, value.shape[-1]))  # type: ignore[union-attr]
        made = cache_ops.causal(query, key, value, *kinds, scale)  # type: ignore[arg-type]
    return made.transpose(1, 2).contiguous(), None
