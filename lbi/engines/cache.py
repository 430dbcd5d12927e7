"""Caches of transformers: what one is, read from its tensors, and one that asks the device less."""

from __future__ import annotations

from typing import Any

from transformers import StaticCache


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


def describe_cache(cache: Any) -> dict[str, Any]:
    """Class (of transformers), slots, type and storage of a transformers cache, read from its tensors."""
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return {
        "class": next(cls.__name__ for cls in type(cache).__mro__ if cls.__module__.startswith("transformers.")),
        "layer_class": type(layers[0]).__name__ if layers else None,
        "dtype": str(tensors[0].dtype).removeprefix("torch.") if tensors else None,
        "slots": int(tensors[0].shape[-2]) if tensors else 0,
        "bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        "bytes_per_slot": sum(tensor.numel() * tensor.element_size() // tensor.shape[-2] for tensor in tensors),
    }
