"""Caches of transformers: what one is, read from its tensors, and one that asks the device less."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache


class LoopCache(StaticCache):  # type: ignore[misc]
    """A static cache of which the host knows when it is empty.

    Before a prefill transformers asks the cache's counter whether the causal mask can be left
    out, and with that waits for the device.
    """

    empty = False

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens before the first query: transformers' answer, or 0 without looking where that is known."""
        return 0 if self.empty else super().get_query_offset(layer_idx)


def describe_cache(cache: Any) -> dict[str, Any]:
    """Class (of transformers), slots, type and storage of a transformers cache, read from its tensors.

    `reads` says how far a step reads it: `slots`, all there are, or `live`, as far as the text has come.
    """
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    tensors = [tensor for layer in layers for tensor in _stored(layer)]
    static = isinstance(cache, StaticCache)
    return {
        "class": next(cls.__name__ for cls in type(cache).__mro__ if cls.__module__.startswith("transformers.")),
        "layer_class": type(layers[0]).__name__ if layers else None,
        "dtype": _type_of(layers[0]) if layers else None,
        "slots": int(tensors[0].shape[-2]) if tensors else 0,
        "bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        "bytes_per_slot": sum(tensor.numel() * tensor.element_size() // tensor.shape[-2] for tensor in tensors),
        "reads": "slots" if static and not any(hasattr(layer, "format_name") for layer in layers) else "live",
    }


def _stored(layer: Any) -> tuple[torch.Tensor, ...]:
    return layer.tensors() if hasattr(layer, "tensors") else (layer.keys, layer.values)


def _type_of(layer: Any) -> str:
    return getattr(layer, "format_name", None) or str(layer.keys.dtype).removeprefix("torch.")
