"""Which layer is stored how, decided by name before anything is touched, and then done.

Every family is told which layers it may replace. So a skipped layer is a decision that the
config shows, and the audit can hold each layer to its own option.
"""

from __future__ import annotations

from typing import Any

import torch

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied
from lbi.quantizers import method
from lbi.quantizers.options import PLAIN, ends_with, layer_config

Assignment = dict[str, QuantizerConfig]
"""The option of each linear layer, by name; `PLAIN` for a layer that stays as it is."""


def linear_shape(layer: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, of torch or of a library that quantizes; None for another module."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        inputs, outputs = (getattr(layer, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def linear_names(model: torch.nn.Module) -> frozenset[str]:
    """Names of all linear layers; of one that is made of others, those others."""
    linear = [name for name, layer in model.named_modules() if linear_shape(layer)]
    return frozenset(name for name in linear if not any(other.startswith(f"{name}.") for other in linear))


def by_name(model: torch.nn.Module, config: QuantizerConfig) -> Assignment:
    """The option of each linear layer. Raises `NotApplied` for a name in the config that matches no layer."""
    names = linear_names(model)
    for knob, endings in (("skip", config.skip), ("mix", config.mix or {})):
        for ending in endings:
            if ending != "default" and not any(ends_with(name, ending) for name in names):
                raise NotApplied(f"quantizer.{knob} names {ending}, and the model has no such linear layer")
    return {name: layer_config(name, config) for name in sorted(names)}


def apply(model: Any, assignment: Assignment) -> None:
    """Have each option replace the layers it was given."""
    groups: dict[str, tuple[QuantizerConfig, list[str]]] = {}
    for name, config in assignment.items():
        groups.setdefault(repr(config), (config, []))[1].append(name)
    for config, names in groups.values():
        if config != PLAIN:
            method(config).apply(model, config, frozenset(names))
