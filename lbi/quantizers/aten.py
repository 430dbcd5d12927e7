"""int8 with one scale a row, multiplied by the kernel that torch itself carries.

`aten::_weight_int8pack_mm` reads int8 and widens it in registers, eagerly as well as
compiled: on a CPU it is 2.5 times as fast as bf16 at batch 1, where torchao's int8, which
widens the whole weight first, is half as fast (docs/log.md). So it is what `lm_head=int8`
makes of the output projection, whatever the family of the other layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch


def int8_pack(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Replace each target by an Int8Linear."""
    from lbi.quantizers.int8_layers import Int8Linear

    for name in sorted(targets):
        model.set_submodule(name, Int8Linear.of(model.get_submodule(name)))


def observe(layer: torch.nn.Module) -> Observed | None:
    """An Int8Linear; None for anything else."""
    if type(layer).__name__ != "Int8Linear":
        return None
    weight: Any = layer.weight
    tensors = [weight, layer.scale] if layer.bias is None else [weight, layer.scale, layer.bias]
    return Observed(
        kind="Int8Linear", quantized=True, bits=8.0 * weight.element_size(), group_size=None, tensors=tensors
    )


METHODS = {
    "int8_pack": Method(
        apply=int8_pack,
        knobs=COMMON | {"bits"},
        bits=(8,),
        needs=Needs(dtypes=("bfloat16",)),
        kernels={"cpu": "int8pack", "cuda": "int8pack|weight_int8|int8"},
    )
}
