"""GemLite: Triton kernels for every pair of activation and weight widths.

The package cannot be imported without a GPU (it asks for its compute capability), so it is
imported when a layer is made, and never earlier. A name says what multiplies what: a16w4 is
16-bit inputs and 4-bit weights, a8w8 quantizes the inputs at each call.

Its kernels are tuned at the first call of each shape, in the warm-up, all cores compiling the
candidates; `load_tuning` and `save_tuning` keep the result per environment, so that it is paid once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbi.config import QuantizerConfig
from lbi.errors import NotApplied, Unsupported
from lbi.quantizers import COMMON, Method, Needs, Observed
from lbi.quantizers.candidates_ahead import compile_candidates_ahead

if TYPE_CHECKING:
    import torch


def _helper() -> Any:
    """gemlite.helper. Raises `Unsupported` where it cannot be imported: nothing else takes its place."""
    try:
        import gemlite.helper
    except (ImportError, RuntimeError, AssertionError) as error:
        raise Unsupported(f"gemlite cannot be imported: {error}") from error
    return gemlite.helper


def from_hqq(layer: Any) -> Any:
    """An HQQLinear (axis 1) as a layer of GemLite, its parameters unchanged, its sums in float32."""
    kind = getattr(_helper(), f"A16W{layer.meta['nbits']}_HQQ_INT")
    _set_up("float32", "fast")
    return kind(device=layer.W_q.device, dtype=layer.compute_dtype).from_hqqlinear(layer)


_set_up_as: list[tuple[str, str]] = []
"""What this process's GemLite was set to, once it was: its settings act on every layer at each call."""


def _set_up(accumulate: str, tuning: str) -> None:
    """GemLite's settings for the process. Raises `NotApplied` where layers before ask for others.

    Its own default on Hopper adds up the partial sums of a row in bfloat16, 1% off at 2 bits.
    """
    _helper()
    import gemlite

    if (accumulate, tuning) in _set_up_as:
        return
    if _set_up_as:
        before = "accumulate={} tuning={}".format(*_set_up_as[0])
        raise NotApplied(f"GemLite is set for a whole process: {before} and accumulate={accumulate} tuning={tuning}")
    _set_up_as.append((accumulate, tuning))
    compile_candidates_ahead()
    gemlite.set_native_atomic_bfp16(accumulate == "native")
    if tuning != "fast":
        gemlite.set_autotune(tuning)


def _with(processor: str, **settings: Any) -> Callable[[torch.nn.Module, QuantizerConfig, frozenset[str]], None]:
    """A method that hands each target to one of GemLite's processors."""

    def apply(model: torch.nn.Module, config: QuantizerConfig, targets: frozenset[str]) -> None:
        _set_up(config.accumulate or "float32", config.tuning or "fast")
        made = None
        for name in sorted(targets):
            layer: Any = model.get_submodule(name)
            kind = getattr(_helper(), processor)
            made = made or kind(device=layer.weight.device, dtype=layer.weight.dtype, **settings)
            model.set_submodule(name, _convert(made, layer, config))

    return apply


def _convert(processor: Any, layer: Any, config: QuantizerConfig) -> Any:
    if hasattr(processor, "from_hqqlinear") and config.group_size is not None:
        from lbi.quantizers.hqq import as_hqq

        return processor.from_hqqlinear(as_hqq(layer, config))
    if hasattr(processor, "from_bitlinear"):
        weight, scale = _ternary(layer.weight)
        made = processor.from_weights(weight, scale, layer.bias)
        # A16W158 makes its scales on the CPU, wherever the weight is, and its kernel cannot read them there.
        made.scales.data = made.scales.data.to(weight.device)
        return made
    return processor.from_linear(layer)


def _ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BitNet b1.58 (arXiv 2402.17764): round(W / mean|W|) to -1, 0, 1, and the mean."""
    scale = weight.detach().float().abs().mean()
    return (weight.detach().float() / scale).round_().clamp_(-1, 1).to(weight.dtype), scale


def observe(layer: torch.nn.Module) -> Observed | None:
    """A GemLiteLinear; None for anything else."""
    if type(layer).__name__ != "GemLiteLinearTriton":
        return None
    held: Any = layer
    weights = held.in_features * held.out_features
    scales = int(held.scales.numel())
    group = None if scales <= held.out_features else weights // scales
    tensors = [held.W_q, held.scales, held.zeros]
    if held.bias is not None:
        tensors.append(held.bias)
    inputs = f"{held.input_dtype.name} inputs" if held.scaled_activations else held.input_dtype.name
    return Observed(
        kind=f"GemLiteLinear[{inputs}, {held.W_nbits} bit]",
        quantized=True,
        bits=8.0 * held.W_q.untyped_storage().nbytes() / weights,
        group_size=group,
        tensors=tensors,
    )


def takes_part(quantizer: QuantizerConfig) -> bool:
    """Whether layers of the option are GemLite's, or may be."""
    return quantizer.family in ("gemlite", "autoquant") or quantizer.backend == "gemlite"


def load_tuning(file: Path) -> bool:
    """Use the tuning of earlier runs, if there is one. Raises `Unsupported` like every use of GemLite."""
    _helper()
    import gemlite

    return file.exists() and bool(gemlite.load_config(str(file), print_error=False))


def save_tuning(file: Path) -> None:
    """Keep the tuning of this process and of those before it, as one whole file."""
    import gemlite

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=".tuning-")
    os.close(handle)
    gemlite.cache_config(scratch)
    Path(scratch).replace(file)


_DTYPES = ("float16", "bfloat16")
_INT8 = "its kernels are made of sm_80's instructions"
_FP8 = "Triton converts e4m3 from there on"
_NVFP = "Triton multiplies blocks with e4m3 scales only there; on sm_90 its compiler ends with an MLIR error"


def _method(
    apply: Any, bits: int, capability: float, because: str, *, group: bool = False, inputs: int = 16, divisor: int = 32
) -> Method:
    return Method(
        apply=apply,
        knobs=COMMON | {"bits", "accumulate", "tuning"} | ({"group_size", "axis"} if group else set()),
        bits=(bits,),
        needs=Needs(
            devices=("cuda",),
            capability=capability,
            because=because,
            dtypes=_DTYPES,
            packages=("gemlite", *(("hqq",) if group else ())),
            divisor=divisor,
        ),
        activations=inputs,
        kernels={"cuda": "gemv|gemm"},
    )


METHODS = {
    "a16w8_int8": _method(_with("A16W8_INT8"), 8, 8.0, _INT8),
    "a16w8_fp8": _method(_with("A16W8_FP8"), 8, 8.9, _FP8),
    "a16w8": _method(_with("A16W8_HQQ_INT"), 8, 8.0, _INT8, group=True),
    "a16w4": _method(_with("A16W4_HQQ_INT"), 4, 8.0, _INT8, group=True),
    "a16w2": _method(_with("A16W2_HQQ_INT"), 2, 8.0, _INT8, group=True),
    "a16w1": _method(_with("A16W1_HQQ_INT"), 1, 8.0, _INT8, group=True),
    "a16w8_mxfp": _method(_with("A16W8_MXFP"), 8, 8.9, _FP8),
    "a16w4_mxfp": _method(_with("A16W4_MXFP"), 4, 8.9, _FP8),
    "a16w4_nvfp": _method(_with("A16W4_NVFP"), 4, 10.0, _NVFP),
    "a8w8_int8": _method(_with("A8W8_INT8_dynamic"), 8, 8.0, _INT8, inputs=8),
    "a8w8_fp8": _method(_with("A8W8_FP8_dynamic"), 8, 8.9, _FP8, inputs=8),
    "a8w4": _method(_with("A8W4_HQQ_INT_dynamic"), 4, 8.9, _FP8, group=True, inputs=8),
    "a8w2": _method(_with("A8W2_HQQ_INT_dynamic"), 2, 8.9, _FP8, group=True, inputs=8),
    "a8w8_mxfp": _method(_with("A8W8_MXFP_dynamic"), 8, 8.9, _FP8, inputs=8),
    "a8w4_mxfp": _method(_with("A8W4_MXFP_dynamic"), 4, 8.9, _FP8, inputs=8),
    "a4w4_mxfp": _method(_with("A4W4_MXFP_dynamic"), 4, 8.9, _FP8, inputs=4),
    "a4w4_nvfp": _method(_with("A4W4_NVFP_dynamic"), 4, 10.0, _NVFP, inputs=4),
    "a16w158": _method(_with("A16W158_INT"), 2, 8.0, _INT8),
    "a8w158": _method(_with("A8W158_INT_dynamic"), 2, 8.0, _INT8, inputs=8),
}
