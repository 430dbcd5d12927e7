"""A mix: each layer stored as the option that its name asks for, across families.

torchao has the same for its own configs (FqnToConfig); here a layer of HQQ may stand
beside one of torchao. `lbi.quantizers.options` decides per layer, so nothing is left to
do for the method itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied
from lbi.quantizers import COMMON, Method, Observed

if TYPE_CHECKING:
    import torch


def mix(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Never asked to: every layer has an option of its own. Raises `NotApplied`."""
    raise NotApplied(f"quantizer.mix names no option for {min(targets)}")


def observe(layer: torch.nn.Module) -> Observed | None:
    """A mix has no layers of its own."""
    return None


METHODS = {"mix": Method(apply=mix, knobs=COMMON | {"mix"})}
