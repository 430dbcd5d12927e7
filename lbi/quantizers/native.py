"""lbi's own formats and kernels: weight-only at 8, 4 and 2 bits, e4m3 and ternary.

Rows are stored so that a GPU streams them in 16-byte loads and widens them in registers
(lbi/kernels). On a CPU torch unpacks whole weights at every call: good for quality and size,
useless for speed, and the audit says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied
from lbi.quantizers import COMMON, Method, Needs, Observed

if TYPE_CHECKING:
    import torch

WORDS = {"w8": 16, "fp8": 1, "w4": 32, "w2": 64, "w158": 64}
"""By format: weights of a row that 16 bytes interleave; rows and groups are multiples of it."""


def native(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
    """Replace each target by a NativeLinear. Raises `NotApplied` for a layer that the format cannot hold."""
    from lbi.quantizers.native_layers import NativeLinear

    for name in sorted(targets):
        layer: Any = model.get_submodule(name)
        problem = why_not(config, layer.in_features)
        if problem:
            raise NotApplied(f"{name}: {problem}")
        model.set_submodule(name, NativeLinear.of(layer, config))


def why_not(config: QuantizerConfig, inputs: int) -> str | None:
    """Why rows of `inputs` weights cannot be stored as the config says; None where they can."""
    unit, group = WORDS[config.method], config.group_size
    if inputs % unit:
        return f"{config.name} wants rows of a multiple of {unit}, not {inputs}: quantizer.skip leaves layers alone"
    if group is not None and inputs % group:
        return f"quantizer.group_size={group} does not divide {inputs} inputs; null takes the whole row"
    return no_such_form(config)


def no_such_form(config: QuantizerConfig) -> str | None:
    """What is wrong with the config's knobs, whatever the layer; None where nothing is."""
    unit, group = WORDS[config.method], config.group_size
    if group is not None and group % unit:
        return f"quantizer.group_size={group}: {config.name} has groups of a multiple of {unit}, or null for whole rows"
    if config.qparams not in (None, "rtn", "hqq"):
        return f"quantizer.qparams={config.qparams}: {config.name} finds its scales and zeros by rtn or hqq"
    if config.symmetric and config.qparams == "hqq":
        return "quantizer.symmetric=true has no zeros for hqq to move: set quantizer.qparams=rtn too"
    return None


def observe(layer: torch.nn.Module) -> Observed | None:
    """A NativeLinear; None for anything else."""
    if type(layer).__name__ != "NativeLinear":
        return None
    made: Any = layer
    groups = made.scales.shape[1]
    return Observed(
        kind=made.kind,
        quantized=True,
        # Its own part of the storage, which engine=fused has several layers share.
        bits=8.0 * made.data.nbytes / (made.in_features * made.out_features),
        group_size=None if groups == 1 else made.in_features // groups,
        tensors=[tensor for tensor in (made.data, made.scales, made.zeros, made.bias) if tensor is not None],
    )


def _method(form: str, bits: int, knobs: set[str], capability: float = 8.0, because: str = "") -> Method:
    return Method(
        apply=native,
        knobs=COMMON | {"bits"} | knobs,
        bits=(bits,),
        needs=Needs(
            capability=capability,
            because=because or "Triton makes its tensor core products for sm_80 and newer",
            dtypes=("bfloat16", "float16", "float32"),
            packages=("cuda:triton",),
            divisor=WORDS[form],
        ),
        # The second half are the kernels of engine=fused, which multiply by the same matrices.
        kernels={"cuda": "gemv_kernel|small_kernel|norm_product|product_add"},
        unpacked_on=("cpu",),
    )


METHODS = {
    "w8": _method("w8", 8, set()),
    "fp8": _method("fp8", 8, set(), 8.9, "Triton converts e4m3 from there on"),
    "w4": _method("w4", 4, {"group_size", "symmetric", "qparams"}),
    "w2": _method("w2", 2, {"group_size", "qparams"}),
    "w158": _method("w158", 2, set()),
}
