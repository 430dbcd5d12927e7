"""The model that drafts: a smaller one, or the same weights at fewer bits or with fewer layers.

It is made before the target is quantized, from the weights as they were loaded, and shares with the target
every tensor that its own quantizer does not replace. What was really made of it is read back like the target.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from lbi.config import LbiConfig, ModelConfig
from lbi.errors import InputError, Unsupported
from lbi.quantizers.options import draft_model


@dataclass(frozen=True, slots=True)
class Draft:
    """A model that drafts, in evaluation mode on the target's device.

    `shares_cache`: it reads the keys and values that the target has computed, and writes its own over the
    places of tokens that are not verified yet, which the verification writes anew.
    """

    model: Any
    shares_cache: bool


def load_draft(config: LbiConfig, target: Any) -> Draft | None:
    """The draft of a cell before it is quantized; None where nothing is drafted by a model.

    Raises `Unsupported` where the two models do not fit.
    """
    decoding = config.decoding
    if decoding.speculative == "self":
        model = shared_copy(target)
        if decoding.draft_layers is not None:
            keep_layers(model, decoding.draft_layers)
        return Draft(model, shares_cache=True)
    if decoding.speculative != "draft":
        return None
    from lbi.models import load

    model = load(drafts_from(config), config.engine).model
    ours, theirs = target.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise Unsupported(
            f"decoding.draft={decoding.draft} has {theirs} tokens in its vocabulary and the model {ours}: "
            "a draft must come from the same tokenizer"
        )
    return Draft(model, shares_cache=False)


def drafts_from(config: LbiConfig) -> ModelConfig:
    """The model whose weights the draft of a cell has."""
    if config.decoding.speculative == "self":
        return config.model
    return draft_model(str(config.decoding.draft), config.model.dtype)


def shared_copy(model: Any) -> Any:
    """A second model of the same tensors: what is replaced in one stays in the other."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def keep_layers(model: Any, count: int) -> None:
    """Leave out all blocks after the first `count`. Raises `InputError` where there are no more than that."""
    total = model.config.num_hidden_layers
    if count >= total:
        raise InputError(
            "decoding.draft_layers", count, f"is not fewer than the model's {total}", "Set it lower, or to null"
        )
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == total:
                setattr(module, name, child[:count])
                model.config.num_hidden_layers = count
                return
    raise Unsupported(f"decoding.draft_layers: a {type(model).__name__} has no list of {total} blocks")
