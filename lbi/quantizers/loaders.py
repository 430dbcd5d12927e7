"""What it takes to load weights that are already quantized, as far as config.json tells.

The plan asks, without torch: which format does the model hold, does the setting fit it, and
are the packages there that transformers loads it with. What is said here is read from
transformers 5.23.0, quantizers/quantizer_*.py: each one's `validate_environment`, and what it
does where that does not raise. Several formats are then dequantized on loading without an
error; those cells would measure the unquantized model, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbi.config import ModelConfig, QuantizerConfig
from lbi.errors import InputError
from lbi.model_files import ModelFacts, inspect
from lbi.quantizers import Needs

FP8 = "on anything less transformers dequantizes the weights when it loads them"

LOADERS: dict[str, Needs] = {
    "gptq": Needs(packages=("gptqmodel", "optimum")),
    "awq": Needs(packages=("gptqmodel",)),
    "compressed-tensors": Needs(packages=("compressed-tensors",)),
    "bitsandbytes": Needs(packages=("bitsandbytes",)),
    "torchao": Needs(packages=("torchao",)),
    "quanto": Needs(packages=("optimum-quanto",)),
    "auto-round": Needs(packages=("auto-round",)),
    "aqlm": Needs(packages=("aqlm",)),
    "sinq": Needs(packages=("sinq",)),
    "quark": Needs(packages=("amd-quark",)),
    "fouroversix": Needs(packages=("fouroversix",)),
    "gemma": Needs(),
    "bitnet": Needs(),
    "mxfp4": Needs(packages=("triton", "kernels")),
    "fp8": Needs(devices=("cuda",), capability=8.9, because=FP8),
    "mxfp8": Needs(devices=("cuda",), capability=8.9, because=FP8),
    "fbgemm_fp8": Needs(devices=("cuda",), capability=9.0, because="its fp8 kernel", packages=("fbgemm-gpu-genai",)),
    "eetq": Needs(devices=("cuda",), packages=("kernels",)),
    "vptq": Needs(devices=("cuda",), packages=("vptq",)),
    "spqr": Needs(devices=("cuda",), packages=("spqr_quant",)),
    "higgs": Needs(devices=("cuda",), packages=("flute-kernel", "fast_hadamard_transform")),
    "fp_quant": Needs(devices=("cuda",), packages=("fp_quant",)),
}
"""By `quant_method` of config.json: what transformers asks for, and what it keeps quantized at all."""

NEVER: dict[str, str] = {
    "hqq": "transformers 5 has no code to load HQQ weights",
    "nvfp4": "transformers 5.23 does not load NVFP4 weights yet",
    "metal": "transformers dequantizes Metal weights everywhere but on Apple's GPUs",
}
"""Formats that cannot be had as they are, whatever is installed."""

SHAPES = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Fields of config.json that a model and its quantized form have in common."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint is to be loaded: `device`, installed `packages`, a GPU's `capability` if it is known."""

    device: str
    packages: Mapping[str, str]
    capability: float | None


def stored_format(arch: Mapping[str, Any] | None) -> str | None:
    """`quant_method` of the weights that a config.json describes; None for plain weights."""
    arch = arch or {}
    held = arch.get("quantization_config") or (arch.get("text_config") or {}).get("quantization_config")
    if not held:
        return None
    if held.get("load_in_4bit") or held.get("load_in_8bit"):
        return "bitsandbytes"
    return str(held.get("quant_method", "unknown"))


def base_facts(base: str) -> ModelFacts:
    """The facts of the model that `quantizer.base` names. Raises `InputError` where it is not there or not whole."""
    try:
        return inspect(ModelConfig(name=base, source="hf", path=base, dtype="bfloat16"))
    except InputError as error:
        raise InputError("quantizer.base", base, error.problem, error.way_out) from error


def why_not(quantizer: QuantizerConfig, model: ModelConfig, facts: ModelFacts, place: Place) -> str | None:
    """Why the quantizer does not go with what the model's files hold; None if it does, or nothing is known yet."""
    # The shapes given for a hub id say nothing about how its weights are stored.
    known = facts.arch is not None and (model.source != "hf" or facts.fingerprint or facts.arch != model.arch)
    held = stored_format(facts.arch) if model.source == "hf" else None
    if quantizer.family != "checkpoint":
        return f"{model.path} holds {held} weights: use quantizer=checkpoint" if held else None
    if model.source != "hf":
        return (
            f"quantizer=checkpoint is for a folder or hub id (model=hf); {model.name} is made by lbi as plain weights"
        )
    if held is None:
        return f"{model.path} holds plain weights (its config.json has no quantization_config)" if known else None
    return _cannot_load(held, place) or _not_the_base(quantizer.base, facts)


def _cannot_load(held: str, place: Place) -> str | None:
    if held in NEVER:
        return NEVER[held]
    if held not in LOADERS:
        return f"transformers has no loader for {held} weights; it has: {', '.join(LOADERS)}"
    needs = LOADERS[held]
    because = f" ({needs.because})" if needs.because else ""
    if place.device not in needs.devices:
        return f"{held} weights need a GPU{because}"
    if place.device == "cuda" and place.capability is not None and place.capability < needs.capability:
        wanted, have = (f"sm_{round(10 * value)}" for value in (needs.capability, place.capability))
        return f"{held} weights need {wanted} or newer{because}; this GPU is {have}"
    missing = [name for name in needs.packages if name not in place.packages]
    if missing:
        return f"{held} weights need the package {missing[0]}: pip install {' '.join(missing)}"
    return None


def _not_the_base(base: str | None, facts: ModelFacts) -> str | None:
    """Why `base` cannot be the model that the checkpoint was made from."""
    if base is None:
        return None
    arch = base_facts(base).arch or {}
    held = stored_format(arch)
    if held:
        return f"quantizer.base={base} holds {held} weights itself; name the unquantized model"
    for field in SHAPES:
        here = (facts.arch or {}).get(field)
        if None not in (here, arch.get(field)) and here != arch[field]:
            return f"quantizer.base={base} is another model: its {field} is {arch[field]}, the checkpoint's {here}"
    return None
