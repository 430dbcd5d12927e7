"""HQQ: half-quadratic quantization, each layer replaced by hqq's own module or by a kernel's.

Used directly, because transformers 5 no longer implements its HqqConfig. `backend` is what
multiplies: hqq's plain PyTorch (unpacks the whole weight at each call: small in memory, slow
in time), tinygemm through hqq's patch for torchao_int4, or GemLite's kernels. hqq itself
falls back to PyTorch without a word where GemLite is missing; here that is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch


def hqq(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Replace each target. With the plain backend groups may cross rows where they do not divide them."""
    from hqq.core.quantize import HQQBackend, HQQLinear

    for name in sorted(targets):
        layer = as_hqq(model.get_submodule(name), config)
        model.set_submodule(name, _for_backend(layer, config))
    HQQLinear.set_backend(HQQBackend.PYTORCH)


def as_hqq(layer: Any, config: QuantizerConfig) -> Any:
    """One linear layer as an HQQLinear; its own weight is given up."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    from lbi.quantizers.hqq_solver import quick

    settings = BaseQuantizeConfig(nbits=config.bits, group_size=config.group_size, axis=config.axis)
    with quick():
        # hqq's own defaults are CUDA and float16, whatever the layer is.
        return HQQLinear(
            layer, settings, compute_dtype=layer.weight.dtype, device=str(layer.weight.device), del_orig=True
        )


def _for_backend(layer: Any, config: QuantizerConfig) -> Any:
    if config.backend == "torchao_int4":
        return _as_tinygemm(layer)
    if config.backend == "gemlite":
        from lbi.quantizers.gemlite import from_hqq

        return from_hqq(layer)
    return layer


def _as_tinygemm(layer: Any) -> Any:
    """An HQQLinear (4 bits, axis 1) as hqq's module for tinygemm.

    hqq decides from the first three characters of torch's version whether two weights go into a
    byte, and takes 2.11 for 2.1: what it left unpacked is packed here.
    """
    import torch
    from hqq.backends.torchao import HQQLinearTorchWeightOnlynt4

    class Packed(HQQLinearTorchWeightOnlynt4):  # type: ignore[misc]
        def hqq_quants_to_torch_quants(self, *given: Any, **named: Any) -> Any:
            weights, scales, zeros = super().hqq_quants_to_torch_quants(*given, **named)
            if weights.dtype == torch.int32:
                weights = (weights[:, ::2] << 4 | weights[:, 1::2]).to(torch.uint8)
            return weights, scales, zeros

    Packed.__name__ = HQQLinearTorchWeightOnlynt4.__name__
    made = Packed(
        None,
        quant_config=layer.quant_config,
        compute_dtype=layer.compute_dtype,
        device=layer.device,
        del_orig=False,
        initialize=False,
        padding=False,
    )
    return made.initialize_with_hqq_quants(layer.W_q, layer.meta, layer.bias)


def observe(layer: torch.nn.Module) -> Observed | None:
    """An HQQLinear, or hqq's tinygemm module; None for anything else."""
    if type(layer).__name__ == "HQQLinearTorchWeightOnlynt4":
        return _tinygemm(layer)
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


def _tinygemm(layer: Any) -> Observed:
    packed, scales = layer.weight_int4pack, layer.scales_and_zeros
    tensors = [packed, scales] if layer.bias is None else [packed, scales, layer.bias]
    return Observed(
        kind="HQQLinear[tinygemm]",
        quantized=True,
        bits=8.0 * packed.untyped_storage().nbytes() / (layer.in_features * layer.out_features),
        group_size=layer.groupsize,
        tensors=tensors,
    )


METHODS = {
    "hqq": Method(
        apply=hqq,
        knobs=COMMON | {"bits", "group_size", "axis", "backend"},
        bits=(8, 4, 3, 2, 1),
        needs=Needs(packages=("hqq",)),
    )
}
