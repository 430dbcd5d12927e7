"""The weights as they are, and how a plain linear layer reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbi.config import QuantizerConfig
from lbi.quantizers import Method, Observed

if TYPE_CHECKING:
    import torch


def keep(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Nothing is changed."""


def observe(layer: torch.nn.Module) -> Observed | None:
    """A torch Linear with a plain weight; None for anything else."""
    import torch

    weight = getattr(layer, "weight", None)
    if (
        weight is None
        or not isinstance(layer, torch.nn.Linear)
        or type(weight) not in (torch.Tensor, torch.nn.Parameter)
        # int8 and fp8 weights lie in ordinary layers too, their scales beside them.
        or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ):
        return None
    tensors = [weight] if layer.bias is None else [weight, layer.bias]
    return Observed(
        kind=f"Linear[{str(weight.dtype).removeprefix('torch.')}]",
        quantized=False,
        bits=8.0 * weight.element_size(),
        group_size=None,
        tensors=tensors,
    )


METHODS = {"none": Method(apply=keep, knobs=frozenset())}
