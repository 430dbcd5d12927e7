"""Ternary weights as in BitNet b1.58, multiplied from 2 bits a weight or by RSR.

For models that were trained with such weights. Rounding an ordinary model's to three values
ruins its text; what is then measured is speed and size alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch


def bitnet(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Replace each target by a TernaryLinear: one scale for the whole matrix, 4 weights a byte."""
    from lbi.quantizers.ternary_layers import TernaryLinear

    for name in sorted(targets):
        model.set_submodule(name, TernaryLinear.of(model.get_submodule(name)))


def rsr(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Replace each target by an RsrLinear: the same weights, kept as the index that RSR multiplies by."""
    from lbi.quantizers.ternary_layers import RsrLinear

    for name in sorted(targets):
        model.set_submodule(name, RsrLinear.of(model.get_submodule(name)))


def observe(layer: torch.nn.Module) -> Observed | None:
    """A TernaryLinear or an RsrLinear; None for anything else."""
    made: Any = layer
    if type(layer).__name__ == "TernaryLinear":
        kind, weight = f"TernaryLinear[{made.route}]", [made.packed]
    elif type(layer).__name__ == "RsrLinear":
        kind, weight = f"RsrLinear[k={made.k}]", [made.index, made.starts]
    else:
        return None
    tensors = [*weight, made.scale] if made.bias is None else [*weight, made.scale, made.bias]
    stored = sum(tensor.untyped_storage().nbytes() for tensor in weight)
    return Observed(
        kind=kind,
        quantized=True,
        # Counted: padding belongs to it, and of RSR the whole index, which is all there is of the weights.
        bits=8.0 * stored / (made.in_features * made.out_features),
        group_size=None,
        tensors=tensors,
    )


_DTYPES = ("bfloat16", "float32")

METHODS = {
    "bitnet": Method(apply=bitnet, knobs=COMMON | {"bits"}, bits=(2,), needs=Needs(dtypes=_DTYPES)),
    "rsr": Method(
        apply=rsr,
        knobs=COMMON,
        needs=Needs(
            devices=("cpu",),
            because="its index takes more bytes than packed weights and is read by gathers, no gain in bandwidth",
            dtypes=_DTYPES,
        ),
        kernels={"cpu": "rsr_linear"},
    ),
}
