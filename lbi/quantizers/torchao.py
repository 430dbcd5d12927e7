"""TorchAO: weights become tensor subclasses inside ordinary linear layers.

Written against torchao 0.18. Its configs are told not to touch inductor's settings
(`set_inductor_config=False`): those belong to the compiler group, for the baseline
as for the quantized cells. torchao skips a layer whose width the group size does
not divide with no more than an INFO message; the audit finds such layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch


def _quantize(model: torch.nn.Module, config: Any, targets: frozenset[str]) -> None:
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=lambda layer, name: name in targets)


def int8_wo(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Symmetric int8, one float32 scale per output row."""
    from torchao.quantization import Int8WeightOnlyConfig

    _quantize(model, Int8WeightOnlyConfig(set_inductor_config=False), targets)


def int4_wo(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Asymmetric int4 with bf16 scales and zeros, packed for the CPU kernel of aten.

    torchao's public int4 config has no CPU form in 0.18 (it asks for mslk or CUDA).
    """
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    made = PrototypeInt4WeightOnlyConfig(
        group_size=config.group_size, int4_choose_qparams_algorithm=config.qparams, set_inductor_config=False
    )
    _quantize(model, made, targets)


def intx_sim(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Round to `bits` levels, stored one int8 a weight: accuracy of a width that has no kernel here."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    made = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{config.bits}"),
        granularity=PerGroup(config.group_size) if config.group_size else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if config.symmetric else MappingType.ASYMMETRIC,
    )
    _quantize(model, made, targets)


def observe(layer: torch.nn.Module) -> Observed | None:
    """A Linear whose weight is one of torchao's tensors; None for anything else."""
    import torch

    weight = getattr(layer, "weight", None)
    reader = _READERS.get(type(weight).__name__)
    if not isinstance(layer, torch.nn.Linear) or weight is None or reader is None:
        return None
    names, _ = weight.__tensor_flatten__()
    tensors = [getattr(weight, name) for name in names if getattr(weight, name) is not None]
    if layer.bias is not None:
        tensors.append(layer.bias)
    group = int(weight.block_size[-1])
    return Observed(
        kind=f"Linear[{type(weight).__name__}]",
        quantized=True,
        bits=reader(weight),
        group_size=None if group == layer.in_features else group,
        tensors=tensors,
    )


def _stored_bits(weight: Any) -> float:
    """Bits that one weight takes in the packed data."""
    return 8.0 * int(weight.qdata.untyped_storage().nbytes()) / int(weight.numel())


def _simulated_bits(weight: Any) -> float:
    """Bits that the values in use need, whatever they are stored in."""
    spread = int(weight.qdata.max()) - int(weight.qdata.min())
    return float(max(1, spread.bit_length()))


_READERS: dict[str, Callable[[Any], float]] = {
    "Int8Tensor": _stored_bits,
    "Int4OpaqueTensor": _stored_bits,
    "IntxUnpackedToInt8Tensor": _simulated_bits,
}

METHODS = {
    "int8_wo": Method(apply=int8_wo, knobs=COMMON | {"bits"}, bits=(8,), needs=Needs(packages=("torchao",))),
    "int4_wo": Method(
        apply=int4_wo,
        knobs=COMMON | {"bits", "group_size", "qparams"},
        bits=(4,),
        needs=Needs(packages=("torchao",)),
    ),
    "intx_sim": Method(
        apply=intx_sim,
        knobs=COMMON | {"bits", "group_size", "symmetric"},
        bits=(1, 2, 3, 4, 5, 6, 7, 8),
        needs=Needs(packages=("torchao",)),
        simulated=True,
    ),
}
