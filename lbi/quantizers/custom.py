"""A quantizer of the user's own: a function anywhere on Python's path, no file of lbi touched.

    quantize(linear: torch.nn.Linear, name: str, **options) -> torch.nn.Module

It is called once for each layer that the config does not leave alone, with the layer's dotted
name and `quantizer.options`, and returns what takes the layer's place. What that stores is read
back like everything else: it is a layer of one of lbi's families, or it says so itself by

    lbi_observed() -> {"kind": str, "bits": float, "group_size": int | None, "tensors": [Tensor, ...]}

where `bits` is the width of one weight without scales, `group_size` the weights that share a
scale (None: a row or more), `tensors` all that a forward pass reads. `"quantized": False` is
for a layer that was left as it is.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied, Unsupported
from lbi.quantizers import COMMON, Method, Observed, target

if TYPE_CHECKING:
    import torch

PROMISE = "lbi_observed() -> {kind: str, bits: float, group_size: int or None, tensors: list of tensors}"


def custom(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Have the user's function replace each target. Raises `NotApplied` for a result that cannot be read back."""
    import torch

    from lbi.quantizers.audit import read_layers

    quantize, options = function(config), config.options or {}
    for name in sorted(targets):
        linear: Any = model.get_submodule(name)
        made: Any = quantize(linear, name, **options)
        if not isinstance(made, torch.nn.Module):
            raise NotApplied(
                f"{config.target} returned {type(made).__name__} for {name}; it must return a torch.nn.Module"
            )
        for size in ("in_features", "out_features"):
            if not hasattr(made, size):
                setattr(made, size, getattr(linear, size))
        model.set_submodule(name, made)
    try:
        read_layers(model, targets)
    except NotApplied as error:
        raise NotApplied(f"{error}. A class that lbi does not know needs {PROMISE}") from None


def function(config: QuantizerConfig) -> Callable[..., Any]:
    """The function that `config.target` names. Raises `Unsupported` if it cannot be imported or called so."""
    problem = target.why_not(config.target)
    named = target.split(config.target or "")
    if problem or named is None:
        raise Unsupported(str(problem))
    target.make_importable()
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(named[0]), named[1], None)
    except (Exception, SystemExit) as error:
        raise Unsupported(f"{named[0]} could not be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise Unsupported(f"{config.target}: {named[0]} has no function {named[1]}")
    try:
        inspect.signature(found).bind(None, "", **(config.options or {}))
    except TypeError as error:
        raise Unsupported(
            f"{config.target} cannot be called with (linear, name) and {config.options}: {error}"
        ) from None
    except ValueError:
        pass  # What is written in C has no signature to ask.
    return found


def observe(layer: torch.nn.Module) -> Observed | None:
    """What a layer says of itself by `lbi_observed`; None for one that has no such method."""
    say: Any = getattr(layer, "lbi_observed", None)
    if say is None:
        return None
    said, kind = say(), type(layer).__name__
    seen = said if isinstance(said, Observed) else _from_mapping(said, kind)
    _check_width(layer, seen)
    return seen


def _from_mapping(said: Any, kind: str) -> Observed:
    try:
        if not isinstance(said, Mapping):
            raise TypeError(f"it is {type(said).__name__}")
        unknown = set(said) - {"kind", "bits", "group_size", "tensors", "quantized"}
        if unknown:
            raise TypeError(f"it has {sorted(unknown)[0]} too")
        group = said["group_size"]
        return Observed(
            kind=str(said["kind"]),
            quantized=bool(said.get("quantized", True)),
            bits=float(said["bits"]),
            group_size=None if group is None else int(group),
            tensors=_tensors(said["tensors"]),
        )
    except KeyError as error:
        raise NotApplied(f"{kind}.lbi_observed() lacks {error}; lbi reads {PROMISE}") from None
    except (TypeError, ValueError) as error:
        raise NotApplied(f"{kind}.lbi_observed() cannot be read: {error}; lbi reads {PROMISE}") from None


def _tensors(said: Any) -> list[Any]:
    import torch

    from lbi.quantizers.audit import plain_tensors

    given = list(said)
    if not given or not all(isinstance(tensor, torch.Tensor) for tensor in given):
        raise TypeError("tensors must be a list of at least one tensor")
    return [plain for tensor in given for plain in plain_tensors(tensor)]


def _check_width(layer: Any, seen: Observed) -> None:
    """No weight can hold more bits than the tensors that hold all of them."""
    from lbi.quantizers.audit import storage_bytes

    stored = 8.0 * storage_bytes(seen.tensors) / (layer.in_features * layer.out_features)
    if seen.bits > stored * 1.001:
        raise NotApplied(
            f"{type(layer).__name__}.lbi_observed() says {seen.bits:g} bits a weight, "
            f"and its tensors have room for {stored:.3g}"
        )


METHODS = {"custom": Method(apply=custom, knobs=COMMON | {"bits", "target", "options"})}
