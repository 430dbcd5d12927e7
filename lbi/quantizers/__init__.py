"""Quantizers: a YAML under conf/quantizer and a method of one family module here.

A family module holds `METHODS`, a table from method name to `Method`, and
`observe`, which reads back what one of its layers really is. Neither imports
torch until it is called, so that the plan can ask what a method needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.errors import InputError

if TYPE_CHECKING:
    import torch

FAMILIES = ("none", "torchao", "hqq")
"""Family modules whose layers the audit knows how to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to quantize.

    `apply(model, config, targets)` replaces the weights of the linear layers named
    in `targets`. `knobs` are the fields of QuantizerConfig that it reads.
    `bits` are the widths it can make; empty where the width is not a question.
    `package` is the distribution it needs. `simulated` says that the weights are
    stored wider than `bits`, for accuracy only.
    """

    apply: Callable[[torch.nn.Module, QuantizerConfig, frozenset[str]], None]
    knobs: frozenset[str]
    bits: tuple[int, ...] = ()
    package: str | None = None
    simulated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What one linear layer really is, read from its tensors.

    `bits` is the width of one weight without scales, `group_size` the weights that
    share a scale (None: the whole row), `tensors` everything a forward pass reads.
    """

    kind: str
    quantized: bool
    bits: float
    group_size: int | None
    tensors: list[Any]


def method(config: QuantizerConfig) -> Method:
    """The method a config asks for. Raises `InputError` where there is none."""
    try:
        module = importlib.import_module(f"lbi.quantizers.{config.family}")
    except ModuleNotFoundError as error:
        if error.name != f"lbi.quantizers.{config.family}":
            raise
        raise InputError(
            "quantizer.family", config.family, "there is no such family", f"There are: {', '.join(FAMILIES)}"
        ) from None
    methods: dict[str, Method] = module.METHODS
    if config.method not in methods:
        raise InputError(
            "quantizer.method", config.method, f"{config.family} has no such method", f"It has: {', '.join(methods)}"
        )
    return methods[config.method]


def is_skipped(name: str, config: QuantizerConfig) -> bool:
    """Whether the config leaves the linear layer `name` unquantized on purpose."""
    return any(name == ending or name.endswith(f".{ending}") for ending in config.skip)
