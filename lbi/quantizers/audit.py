"""Reads back what the linear layers really are, and refuses what was not asked for.

Libraries skip layers without an error: a group size that does not divide, a backend
that is not installed. So the report never says what was configured; it says what
this file found in the tensors of the model that then ran.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied
from lbi.quantizers import FAMILIES, Observed, method
from lbi.quantizers.assign import Assignment, linear_shape


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer as found: its name, its inputs, its weights' number, its storage."""

    name: str
    inputs: int
    params: int
    stored_bytes: int
    seen: Observed


def read_layers(model: torch.nn.Module, names: frozenset[str]) -> list[Layer]:
    """What each named linear layer is now. Raises `NotApplied` for one that no family can read."""
    observers = [importlib.import_module(f"lbi.quantizers.{family}").observe for family in FAMILIES]
    layers = []
    for name in sorted(names):
        module = model.get_submodule(name)
        seen = next((found for observe in observers if (found := observe(module)) is not None), None)
        if seen is None:
            raise NotApplied(f"{name} became a {type(module).__name__} with a weight the audit cannot read")
        inputs, outputs = linear_shape(module) or (0, 0)
        layers.append(Layer(name, inputs, inputs * outputs, storage_bytes(seen.tensors), seen))
    return layers


def check(layers: list[Layer], assignment: Assignment, title: str) -> None:
    """Raises `NotApplied` unless each layer is what its option asks for, and every skipped one is plain."""
    wrong: dict[str, list[str]] = {}
    for layer in layers:
        problem = _problem(layer, assignment[layer.name])
        if problem:
            wrong.setdefault(problem, []).append(layer.name)
    if wrong:
        parts = [f"{len(names)} of {len(layers)} layers {text} (such as {names[0]})" for text, names in wrong.items()]
        raise NotApplied(f"{title}: {'; '.join(parts)}")


def _problem(layer: Layer, config: QuantizerConfig) -> str | None:
    seen = layer.seen
    if config.family == "none":
        return f"were to be left as they are and are {seen.kind}" if seen.quantized else None
    if not seen.quantized:
        # Which layers of a checkpoint are quantized was decided by whoever made it.
        return None if config.family == "checkpoint" else f"are still {seen.kind}"
    if config.bits is not None:
        simulated = method(config).simulated
        # Packing 3 bits into 32-bit words takes 3.2; an unused level of a simulation takes less.
        fits = seen.bits <= config.bits if simulated else config.bits <= seen.bits < config.bits + 0.5
        if not fits:
            return f"hold {seen.bits:.3g} bits a weight instead of {config.bits}"
    wanted, found = config.group_size or layer.inputs, seen.group_size or layer.inputs
    if "group_size" in method(config).knobs and found != wanted:
        return f"have groups of {found} instead of {wanted}"
    return None


def summarize(layers: list[Layer]) -> dict[str, Any]:
    """The layers by kind, and the shares that the report shows."""
    kinds: dict[str, dict[str, Any]] = {}
    for layer in layers:
        seen = layer.seen
        key = f"{seen.kind} {seen.bits:.3g} bit group {seen.group_size or 'row'}"
        kind = kinds.setdefault(
            key,
            {"kind": seen.kind, "bits": round(seen.bits, 3), "group_size": seen.group_size, "quantized": seen.quantized}
            | {"layers": 0, "params": 0, "bytes": 0, "example": layer.name},
        )
        kind["layers"] += 1
        kind["params"] += layer.params
        kind["bytes"] += layer.stored_bytes
    params = sum(layer.params for layer in layers)
    return {
        "kinds": list(kinds.values()),
        "linear_params": params,
        "quantized_fraction": sum(layer.params for layer in layers if layer.seen.quantized) / params,
        "bits_per_weight": 8.0 * sum(layer.stored_bytes for layer in layers) / params,
        "unquantized": [layer.name for layer in layers if not layer.seen.quantized][:20],
    }


def storage_bytes(tensors: list[Any]) -> int:
    """Bytes of the storages behind plain tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
    return sum(storages.values())


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors inside a parameter, a tensor subclass, or a container of them."""
    if isinstance(value, dict):
        for item in value.values():
            yield from plain_tensors(item)
    elif isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def beside(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a module keeps beside its parameters and buffers, by name: scales of hqq and of bitsandbytes."""
    meta: Any = getattr(module, "meta", None)
    state: Any = getattr(module, "state", None)
    kept: dict[str, Any] = dict(meta) if isinstance(meta, dict) else {}
    for parameter in module._parameters.values():
        if hasattr(parameter, "quant_state"):
            kept |= parameter.quant_state.as_dict() if parameter.quant_state else {}
        kept |= {"SCB": parameter.SCB} if getattr(parameter, "SCB", None) is not None else {}
    if type(state).__name__ == "MatmulLtState":
        kept |= {"CB": state.CB, "SCB": state.SCB}
    for name, value in kept.items():
        yield from ((name, tensor) for tensor in plain_tensors(value))


def weight_bytes(model: torch.nn.Module) -> int:
    """Storage of everything the model keeps: parameters, buffers, and scales beside them, shared storage once."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            found.extend(plain_tensors(value))
        found.extend(tensor for _, tensor in beside(module))
    return storage_bytes(found)
