"""Quantizers: a YAML under conf/quantizer and a method of one family module here.

A family module holds `METHODS`, a table from method name to `Method`, and
`observe`, which reads back what one of its layers really is. Neither imports
torch until it is called, so that the plan can ask what a method needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.errors import InputError

if TYPE_CHECKING:
    import torch

FAMILIES = tuple("custom checkpoint none aten native torchao hqq gemlite ternary mix autoquant".split())
"""Family modules. The first that can read a layer is believed, so those that layers name themselves come first."""

COMMON = frozenset({"lm_head", "embeddings", "skip"})
"""Knobs that every family but `none` has: which layers are meant is decided here, not by the family."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a method asks of the machine, as far as it is known before anything runs.

    `devices` it runs on; `capability`: least compute capability of a GPU (8.9 for fp8 in the
    tensor cores), with `because`, what the hardware lacks below it; `dtypes` of the model;
    `packages`: the distributions, by device where they differ ("cuda:mslk-cuda"); `groups`:
    the group sizes it has, where it has not all; `divisor` of every row's length.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    capability: float = 0.0
    because: str = ""
    dtypes: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    divisor: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to quantize.

    `apply(model, config, targets)` replaces the weights of the linear layers named
    in `targets`. `knobs` are the fields of QuantizerConfig that it reads.
    `bits` are the widths it can make; empty where the width is not a question.
    `simulated` says that the weights are stored wider than `bits`, for accuracy only;
    `activations` that inputs are quantized too, to this many bits. `kernels` is, by device,
    a pattern of which a short trace of the decode step must show at least one match. `unpacked_on`
    names the devices where torch unpacks whole weights at every call, for want of a kernel.
    """

    apply: Callable[[torch.nn.Module, QuantizerConfig, frozenset[str]], None]
    knobs: frozenset[str]
    bits: tuple[int, ...] = ()
    needs: Needs = Needs()
    simulated: bool = False
    activations: int = 16
    kernels: Mapping[str, str] = field(default_factory=dict)
    unpacked_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What one linear layer really is, read from its tensors.

    `bits` is the width of one weight without scales, `group_size` the weights that
    share a scale (None: the whole row or more), `tensors` everything a forward pass reads.
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
