"""A model whose weights come quantized: loaded by transformers as it is, then read like any other.

Nothing is replaced here. What is done is to find out what runs: some loaders keep the packed
weights until the first forward pass and then unpack them for good (compressed-tensors 0.20,
which has no kernels of its own), so the layers are read before and after one. A layer that was
unpacked is reported as the dense layer that runs, with the bits that its weights came from.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied
from lbi.quantizers import FAMILIES, Method, Observed

if TYPE_CHECKING:
    import torch

HELD = "lbi_held"
"""Attribute that marks a layer of a checkpoint: what it held when it was loaded."""

CODES = ("weight_packed", "qweight", "W_q", "codes", "weight")
"""Names that loaders give to the quantized weights themselves."""

SCALES = ("scale", "absmax", "SCB")
"""Parts of the names that loaders give to scales."""

NOT_WEIGHTS = ("input", "output", "global", "k_scale", "v_scale", "nested")
"""Parts of the names of scales that are not those of weights."""


def checkpoint(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Note what each linear layer holds, and have lazy loaders finish. Raises `NotApplied` if all are plain."""
    held = {name: read(model.get_submodule(name)) for name in targets}
    plain = [name for name, seen in held.items() if seen is not None and not seen.quantized]
    if len(plain) == len(held):
        kind = getattr(held[plain[0]], "kind", "Linear") if plain else "Linear"
        raise NotApplied(f"no linear layer is quantized after loading: all {len(held)} are {kind}")
    _first_pass(model)
    for name, seen in held.items():
        # Without the tensors: those of an unpacked layer would stay in memory.
        setattr(model.get_submodule(name), HELD, seen and replace(seen, tensors=[]))


def _first_pass(model: Any) -> None:
    import torch

    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long, device=model.device))


def observe(layer: torch.nn.Module) -> Observed | None:
    """A linear layer of a checkpoint; None for anything else, or a storage that cannot be read."""
    held: Observed | None = getattr(layer, HELD, None)
    now = read(layer) if held else None
    if held is None or now is None or now.quantized or not held.quantized:
        return now
    return replace(now, kind=f"{now.kind} from {held.kind}", quantized=True, bits=held.bits, group_size=held.group_size)


def read(layer: Any) -> Observed | None:
    """What a linear layer is: by the families that know it, else from the sizes of its tensors."""
    others = (importlib.import_module(f"lbi.quantizers.{family}") for family in FAMILIES if family != "checkpoint")
    seen: Observed | None = next((found for family in others if (found := family.observe(layer))), None)
    return seen or _by_size(layer)


def _by_size(layer: Any) -> Observed | None:
    """Bits from the bytes of the quantized weights, the group from the number of scales."""
    from lbi.quantizers.assign import linear_shape

    tensors = {name: tensor for name, tensor in _named_tensors(layer) if tensor.numel()}
    shape = linear_shape(layer)
    if not tensors or shape is None:
        return None
    inputs, weights = shape[0], shape[0] * shape[1]
    name = next((name for name in CODES if name in tensors), None)
    name = name or max(tensors, key=lambda key: tensors[key].numel() * tensors[key].element_size())
    codes = tensors[name]
    kind = str(codes.dtype).removeprefix("torch.")
    return Observed(
        kind=f"{type(layer).__name__}[{kind}]",
        quantized=not (codes.is_floating_point() and codes.element_size() > 1),
        bits=8.0 * codes.numel() * codes.element_size() / weights,
        group_size=_group(tensors, inputs, weights),
        tensors=list(tensors.values()),
    )


def _group(tensors: dict[str, Any], inputs: int, weights: int) -> int | None:
    """Weights that share a scale; None for a row, a block of rows, or no scales found."""
    counts = [
        tensor.numel()
        for name, tensor in tensors.items()
        if any(part in name for part in SCALES) and not any(part in name for part in NOT_WEIGHTS)
    ]
    group = weights // max(counts) if counts else inputs
    return group if group < inputs else None


def _named_tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    """All tensors of a layer by name, those inside tensor subclasses and beside bitsandbytes' weights too."""
    from lbi.quantizers.audit import beside, plain_tensors

    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        inside = list(plain_tensors(value))
        yield from ((name if len(inside) == 1 else f"{name}.{index}", tensor) for index, tensor in enumerate(inside))
    yield from beside(layer)


METHODS = {"checkpoint": Method(apply=checkpoint, knobs=frozenset({"base"}))}
