"""HQQ: half-quadratic quantization, each layer replaced by hqq's own module.

Used directly, because transformers 5 no longer implements its HqqConfig. The
backend is hqq's plain PyTorch one, which unpacks the whole weight at each call:
small in memory, slow in time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbi.config import QuantizerConfig
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch


def hqq(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Replace each target by an HQQLinear. Groups may cross rows where they do not divide them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    settings = BaseQuantizeConfig(nbits=config.bits, group_size=config.group_size, axis=config.axis)
    for name in sorted(targets):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, child)
        # hqq's own defaults are CUDA and float16, whatever the layer is.
        replaced = HQQLinear(
            layer, settings, compute_dtype=layer.weight.dtype, device=str(layer.weight.device), del_orig=True
        )
        setattr(parent, child, replaced)
    HQQLinear.set_backend(HQQBackend.PYTORCH)


def observe(layer: torch.nn.Module) -> Observed | None:
    """An HQQLinear; None for anything else."""
    if type(layer).__name__ != "HQQLinear":
        return None
    meta, packed = layer.meta, layer.W_q
    tensors = [packed, meta["scale"], meta["zero"]]
    if layer.bias is not None:
        tensors.append(layer.bias)
    return Observed(
        kind=f"HQQLinear[{meta['packing']}]",
        quantized=True,
        # Counted, not taken from meta: 3 bits are stored as ten weights in a 32-bit word, 3.2 bits each.
        bits=8.0 * packed.untyped_storage().nbytes() / (layer.in_features * layer.out_features),
        group_size=meta["group_size"],
        tensors=tensors,
    )


METHODS = {
    "hqq": Method(
        apply=hqq,
        knobs=COMMON | {"bits", "group_size", "axis"},
        bits=(8, 4, 3, 2, 1),
        needs=Needs(packages=("hqq",)),
    )
}
