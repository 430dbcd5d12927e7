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
from lbi.errors import Unsupported
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch


def _quantize(model: torch.nn.Module, config: Any, targets: frozenset[str]) -> None:
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=lambda layer, name: name in targets)


def _granularity(config: QuantizerConfig) -> Any:
    from torchao.quantization import PerRow, PerTensor

    return PerTensor() if config.granularity == "tensor" else PerRow()


def int8_wo(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Symmetric int8, one float32 scale per output row."""
    from torchao.quantization import Int8WeightOnlyConfig

    _quantize(model, Int8WeightOnlyConfig(set_inductor_config=False), targets)


def fp8_wo(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """float8 (e4m3), one float32 scale per output row or one for the matrix."""
    from torchao.quantization import Float8WeightOnlyConfig

    _quantize(model, Float8WeightOnlyConfig(granularity=_granularity(config), set_inductor_config=False), targets)


def int8_da(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """int8 weights, and inputs put into int8 at each call, by row or by tensor."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    made = Int8DynamicActivationInt8WeightConfig(granularity=_granularity(config), set_inductor_config=False)
    _quantize(model, made, targets)


def fp8_da(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """float8 weights, and inputs put into float8 at each call, by row or by tensor."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    made = Float8DynamicActivationFloat8WeightConfig(granularity=_granularity(config), set_inductor_config=False)
    _quantize(model, made, targets)


def int4_wo(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Asymmetric int4 with bf16 scales and zeros, in the layout of the device's own kernel.

    On a GPU tinygemm's tiles (or the layouts of the package mslk). On a CPU the prototype for
    aten's kernel: torchao's public int4 config has no CPU form in 0.18.
    """
    if model.get_submodule(min(targets)).weight.device.type == "cuda":
        _quantize(model, _int4_gpu(config), targets)
        return
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    if config.packing not in (None, "auto"):
        raise Unsupported(f"quantizer.packing={config.packing} is a layout for GPUs")
    made = PrototypeInt4WeightOnlyConfig(
        group_size=config.group_size, int4_choose_qparams_algorithm=config.qparams, set_inductor_config=False
    )
    _quantize(model, made, targets)


def _int4_gpu(config: QuantizerConfig) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    packing = "tile_packed_to_4d" if config.packing in (None, "auto") else config.packing
    return Int4WeightOnlyConfig(
        group_size=config.group_size,
        int4_packing_format=packing,
        int4_choose_qparams_algorithm=config.qparams,
        set_inductor_config=False,
    )


def fp8_int4(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """int4 weights in groups of 128, inputs put into float8 at each call: a kernel of the package mslk."""
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig

    _quantize(model, Float8DynamicActivationInt4WeightConfig(int4_packing_format=config.packing), targets)


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


def mx_da(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """MX (blocks of 32 with a power of two each) of weights and inputs, in the GPU's own instructions."""
    from torchao.quantization.quantize_.common import KernelPreference

    _quantize(model, _mx(config, KernelPreference.AUTO), targets)


def mx_sim(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """The same numbers as `mx_da`, multiplied in bf16: its accuracy on a machine without the instructions."""
    from torchao.quantization.quantize_.common import KernelPreference

    _quantize(model, _mx(config, KernelPreference.EMULATED), targets)


def _mx(config: QuantizerConfig, kernels: Any) -> Any:
    import torch
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig

    element = torch.float8_e4m3fn if config.bits == 8 else torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(activation_dtype=element, weight_dtype=element, kernel_preference=kernels)


def nvfp4_wo(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """NVFP4 weights (blocks of 16 with an fp8 scale each, one float32 for the matrix), widened before each use."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    _quantize(model, NVFP4WeightOnlyConfig(), targets)


def nvfp4_da(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """NVFP4 weights and inputs, in the GPU's own instructions."""
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    _quantize(model, NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False), targets)


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
    inputs_too = getattr(weight, "act_quant_kwargs", None) is not None
    return Observed(
        kind=f"Linear[{type(weight).__name__}{', inputs quantized' if inputs_too else ''}]",
        quantized=True,
        bits=reader(weight),
        group_size=_group(weight, layer.in_features),
        tensors=tensors,
    )


def _group(weight: Any, inputs: int) -> int | None:
    block = weight.block_size
    group = int(block if isinstance(block, int) else block[-1])
    return None if group >= inputs else group


def _stored_bits(weight: Any) -> float:
    """Bits that one weight takes in the packed data."""
    return 8.0 * int(weight.qdata.untyped_storage().nbytes()) / int(weight.numel())


def _tiled_bits(weight: Any) -> float:
    """tinygemm's tiles fill rows up to a multiple of 1024 inputs: the filling is in the bytes, not in the width."""
    rows, inputs = weight.shape
    padded = int(-(-inputs // 1024) * 1024 * (-(-rows // 8) * 8))
    return 8.0 * int(weight.qdata.untyped_storage().nbytes()) / padded


def _simulated_bits(weight: Any) -> float:
    """Bits that the values in use need, whatever they are stored in."""
    spread = int(weight.qdata.max()) - int(weight.qdata.min())
    return float(max(1, spread.bit_length()))


_READERS: dict[str, Callable[[Any], float]] = {
    "Int8Tensor": _stored_bits,
    "Float8Tensor": _stored_bits,
    "MXTensor": _stored_bits,
    "NVFP4Tensor": _stored_bits,
    "Int4Tensor": _stored_bits,
    "Int4PreshuffledTensor": _stored_bits,
    "Int4TilePackedTo4dTensor": _tiled_bits,
    "Int4OpaqueTensor": _stored_bits,
    "IntxUnpackedToInt8Tensor": _simulated_bits,
}

_AO = ("torchao",)
_FP8 = "float8 matrix multiplies began with it"
_BLOCKS = "block-scaled matrix multiplies began with it"

METHODS = {
    "int8_wo": Method(apply=int8_wo, knobs=COMMON | {"bits"}, bits=(8,), needs=Needs(packages=_AO)),
    "fp8_wo": Method(apply=fp8_wo, knobs=COMMON | {"bits", "granularity"}, bits=(8,), needs=Needs(packages=_AO)),
    "int8_da": Method(
        apply=int8_da,
        knobs=COMMON | {"bits", "granularity"},
        bits=(8,),
        needs=Needs(packages=_AO, capability=7.5, because="int8 matrix multiplies began with it"),
        activations=8,
    ),
    "fp8_da": Method(
        apply=fp8_da,
        knobs=COMMON | {"bits", "granularity"},
        bits=(8,),
        needs=Needs(
            packages=_AO,
            devices=("cuda",),
            capability=8.9,
            because=_FP8,
            dtypes=("bfloat16",),
            divisor=16,
        ),
        activations=8,
        kernels={"cuda": "_scaled_mm|nvjet|gemm|cutlass"},
    ),
    "int4_wo": Method(
        apply=int4_wo,
        knobs=COMMON | {"bits", "group_size", "qparams", "packing"},
        bits=(4,),
        needs=Needs(
            packages=_AO,
            capability=8.0,
            because="tinygemm's tensor core instructions began with it",
            dtypes=("bfloat16",),
            groups=(32, 64, 128, 256),
        ),
        kernels={"cpu": "int4pack", "cuda": "tinygemm|int4|i4"},
    ),
    "fp8_int4": Method(
        apply=fp8_int4,
        knobs=COMMON | {"bits", "packing"},
        bits=(4,),
        needs=Needs(
            packages=(*_AO, "mslk-cuda"),
            devices=("cuda",),
            capability=9.0,
            because="the kernel is made of Hopper's instructions",
            dtypes=("bfloat16",),
            divisor=128,
        ),
        activations=8,
    ),
    "intx_sim": Method(
        apply=intx_sim,
        knobs=COMMON | {"bits", "group_size", "symmetric"},
        bits=(1, 2, 3, 4, 5, 6, 7, 8),
        needs=Needs(packages=_AO),
        simulated=True,
    ),
    "mx_da": Method(
        apply=mx_da,
        knobs=COMMON | {"bits"},
        bits=(8, 4),
        needs=Needs(
            packages=_AO, devices=("cuda",), capability=10.0, because=_BLOCKS, dtypes=("bfloat16",), divisor=32
        ),
        activations=8,
    ),
    "mx_sim": Method(
        apply=mx_sim,
        knobs=COMMON | {"bits"},
        bits=(8, 4),
        needs=Needs(packages=_AO, dtypes=("bfloat16",), divisor=32),
        activations=8,
    ),
    "nvfp4_wo": Method(
        apply=nvfp4_wo, knobs=COMMON | {"bits"}, bits=(4,), needs=Needs(packages=_AO, dtypes=("bfloat16",), divisor=16)
    ),
    "nvfp4_da": Method(
        apply=nvfp4_da,
        knobs=COMMON | {"bits"},
        bits=(4,),
        needs=Needs(
            packages=_AO, devices=("cuda",), capability=10.0, because=_BLOCKS, dtypes=("bfloat16",), divisor=16
        ),
        activations=4,
    ),
}
