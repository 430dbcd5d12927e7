"""Caches of transformers: made as a cell says, what one is, read from its tensors, and one that asks less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import StaticLayer

from lbi.config import CacheConfig
from lbi.errors import Unsupported
from lbi.quantizers.audit import plain_tensors, storage_bytes

CHUNK = 128
"""Tokens that a quality pass feeds a cache of fp8 at once: the first ones set its scales for good."""


class LoopCache(StaticCache):  # type: ignore[misc]
    """A static cache of which the host knows when it is empty.

    Before a prefill transformers asks the cache's counter whether the causal mask can be left
    out, and with that waits for the device.
    """

    empty = False
    length: int | None = None
    """Tokens that it holds, where the host knows; None to ask the counter, as a captured graph must."""

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens before the first query: transformers' answer, or 0 without looking where that is known."""
        known = 0 if self.empty else self.length
        return super().get_query_offset(layer_idx) if known is None else known


def attend_by(model: Any, name: str, function: Callable[..., Any]) -> None:
    """Have the model attend by a function of ours, registered under this name. Raises `Unsupported`."""
    if not getattr(model, "_supports_attention_backend", False):
        raise Unsupported(f"transformers takes no attention function of ours for a {type(model).__name__}")
    AttentionInterface.register(name, function)
    model.set_attn_implementation(name)


def refuse_extras(mask: torch.Tensor | None, others: Mapping[str, Any], what: str) -> None:
    """Raises `Unsupported` for what a model adds to plain attention to all that came before."""
    known = ("softcap", "s_aux", "position_bias", "sliding_window")
    added = [name for name in known if others.get(name) is not None] + (["attention mask"] if mask is not None else [])
    if added:
        raise Unsupported(f"{what} has no {added[0]}, which the model wants")


def require_full_attention(layers: Iterable[Any], what: str) -> None:
    """Raises `Unsupported` for a model whose layers are not all of full attention."""
    others = {type(layer).__name__ for layer in layers if type(layer) is not StaticLayer}
    if others:
        raise Unsupported(f"{what} is for full attention alone, and the model has a {min(others)}")


def describe_cache(cache: Any) -> dict[str, Any]:
    """Class (of transformers), slots, type and storage of a transformers cache, read from its tensors.

    `reads` says how far a step reads it: `slots`, all there are, or `live`, as far as the text has come.
    """
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    tensors = [tensor for layer in layers for tensor in _stored(layer)]
    slots = _slots(layers[0]) if layers else 0
    own = any(hasattr(layer, "format_name") for layer in layers)
    held = storage_bytes(tensors)
    return {
        "class": next(cls.__name__ for cls in type(cache).__mro__ if cls.__module__.startswith("transformers.")),
        "layer_class": type(layers[0]).__name__ if layers else None,
        "dtype": _type_of(layers[0]) if layers else None,
        "slots": slots,
        "bytes": held,
        "bytes_per_slot": sum(storage_bytes(_stored(layer)) / max(1, _slots(layer)) for layer in layers),
        "reads": "slots" if isinstance(cache, StaticCache) and not own else "live",
        **({"offloading": True} if getattr(cache, "offloading", False) else {}),
    }


def quantized_cache(kind: CacheConfig, model_config: Any) -> QuantizedCache:
    """transformers' own low-bit cache, empty. Raises `Unsupported` where it cannot be had."""
    axis = 0 if kind.axis is None else kind.axis
    grouped = {
        "nbits": kind.bits,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": kind.group_size,
        "residual_length": kind.residual,
    }
    try:
        return QuantizedCache(kind.backend, model_config, **({} if kind.backend == "fp8" else grouped))
    except (ImportError, ValueError, TypeError) as error:
        raise Unsupported(f"cache={kind.name}: {str(error).splitlines()[0]}") from error


def _stored(layer: Any) -> list[torch.Tensor]:
    """All tensors of one layer, packed ones and their scales as they lie in memory."""
    if hasattr(layer, "tensors"):
        return list(layer.tensors())
    kept = [layer.keys, layer.values]
    for held in (getattr(layer, "_quantized_keys", None), getattr(layer, "_quantized_values", None)):
        # hqq: codes and a mapping with their scales; fp8: codes and a scale; quanto: a tensor of its own class.
        kept += held if isinstance(held, tuple) else [held]
    return [tensor for part in kept for tensor in plain_tensors(part)]


def _slots(layer: Any) -> int:
    """Tokens that there is room for; of a cache that grows, its tokens."""
    return int(layer.cumulative_length) if hasattr(layer, "_quantized_keys") else int(layer.keys.shape[-2])


def _type_of(layer: Any) -> str:
    if hasattr(layer, "_quantized_keys"):
        backend = type(layer).__name__.removesuffix("QuantizedLayer").lower()
        return f"{backend}{getattr(layer, 'nbits', '')}"
    return getattr(layer, "format_name", None) or str(layer.keys.dtype).removeprefix("torch.")


def in_pieces(model: Any, tokens: list[int], rows: int) -> torch.Tensor:
    """Logits (tokens, vocabulary) of a text that the model gets `rows` tokens at a time, and its rest one by one."""
    ids, cache, found = torch.tensor([tokens], device=model.device), DynamicCache(config=model.config), []
    whole = len(tokens) - len(tokens) % rows
    with torch.no_grad():
        for piece in (*ids[:, :whole].split(rows, dim=1), *ids[:, whole:].split(1, dim=1)):
            if piece.shape[1]:
                found.append(model(piece, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(found)
