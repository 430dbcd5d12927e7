"""What cannot be combined, and why.

A rule is a function from a cell to a reason, or None where it has nothing against
the cell. Each carries its evidence: what was run or read, and in which version,
so that it can be tried again when a library moves on (`sweep.prune=false` runs
what a rule refuses). Rules see the machine through `Machine`, without torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

from lbi import environment
from lbi.config import LbiConfig, QuantizerConfig
from lbi.model_files import ModelFacts
from lbi.quantizers import method
from lbi.quantizers.options import parts


@dataclass(frozen=True, slots=True)
class Machine:
    """What a rule may ask of the machine that will run the cell.

    `capability` is the GPU's compute capability (9.0 for an H100); None where it is not known yet.
    """

    device: str
    packages: Mapping[str, str]
    has_compiler: bool
    capability: float | None = None

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine, for runs on `device` (cpu or cuda)."""
        compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
        return cls(device, environment.packages(), compiler, environment.capability() if device == "cuda" else None)


Check = Callable[[LbiConfig, ModelFacts, Machine], str | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A check with its name and the evidence for it."""

    name: str
    evidence: str
    check: Check


RULES: list[Rule] = []


def rule(evidence: str) -> Callable[[Check], Check]:
    """Register a check under its function's name."""

    def register(check: Check) -> Check:
        RULES.append(Rule(check.__name__, evidence, check))
        return check

    return register


def refuse(
    config: LbiConfig, facts: ModelFacts, machine: Machine, without: frozenset[str] = frozenset()
) -> tuple[Rule, str] | None:
    """The first rule against a cell with its reason, or None; the rules named in `without` are not asked."""
    for part in (config, *(replace(config, quantizer=part) for part in parts(config.quantizer))):
        for candidate in RULES:
            reason = None if candidate.name in without else candidate.check(part, facts, machine)
            if reason is not None:
                return candidate, reason
    return None


@rule("a knob that nothing reads would give two names to one measurement")
def unused_quantizer_knob(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    read = method(config.quantizer).knobs | {"name", "family", "method"}
    for spec in fields(QuantizerConfig):
        if spec.name not in read and getattr(config.quantizer, spec.name) != _idle(spec):
            return f"{config.quantizer.name} does not read quantizer.{spec.name}"
    return None


def _idle(spec: Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


@rule("a knob that nothing reads would give two names to one measurement")
def unused_knob(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    compiler, decoding = config.compiler, config.decoding
    if compiler.backend == "eager":
        for name, idle in (("mode", "default"), ("prefill", False), ("coordinate_descent", False), ("options", {})):
            if getattr(compiler, name) != idle:
                return f"compiler.{name} is for inductor; {compiler.name} runs eagerly"
    if decoding.kind == "greedy":
        for name in ("temperature", "top_k", "top_p", "seed"):
            if getattr(decoding, name) is not None:
                return f"decoding.{name} is for sampling; {decoding.name} is greedy"
    if config.cache.kind == "dynamic" and config.cache.max_len is not None:
        return "cache.max_len is for a static cache; a dynamic one grows as needed"
    return None


@rule("sampling without a temperature or a seed could not be repeated")
def sampling_is_complete(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.decoding.kind != "sampling":
        return None
    missing = [name for name in ("temperature", "seed") if getattr(config.decoding, name) is None]
    return f"sampling needs decoding.{missing[0]}" if missing else None


@rule("importlib.metadata finds no such distribution")
def package_is_installed(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    for package in method(config.quantizer).needs.packages:
        device, _, name = package.rpartition(":")
        if device in ("", machine.device) and name not in machine.packages:
            return f"{config.quantizer.name} needs the package {name}: pip install {name}"
    return None


@rule(
    "torchao 0.18.0, gemlite 0.6.0.post2: asserted there, or read from the instructions their kernels use; "
    "fp8 matrix multiply from sm_89, block-scaled formats (MX, NVFP4) from sm_100"
)
def hardware_fits(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    needs, name = method(config.quantizer).needs, config.quantizer.name
    if machine.device not in needs.devices:
        return f"{name} runs on {'a GPU' if needs.devices == ('cuda',) else 'a CPU'} only" + (
            f": {needs.because}" if needs.because else ""
        )
    known = machine.device == "cuda" and machine.capability is not None
    if known and float(machine.capability or 0) < needs.capability:
        wanted, have = (f"sm_{round(10 * value)}" for value in (needs.capability, machine.capability or 0))
        return f"{name} needs {wanted} or newer ({needs.because}); this GPU is {have}"
    return None


@rule("the methods' own tables (torchao 0.18.0, hqq 0.2.8.post1, gemlite 0.6.0.post2)")
def dtype_and_group_exist(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    needs, quantizer = method(config.quantizer).needs, config.quantizer
    if needs.dtypes and config.model.dtype not in needs.dtypes:
        return f"{quantizer.name} has kernels for {' and '.join(needs.dtypes)}; model.dtype is {config.model.dtype}"
    if needs.groups and quantizer.group_size not in needs.groups:
        return f"{quantizer.name} has groups of {', '.join(map(str, needs.groups))}, not {quantizer.group_size}"
    for layer, (inputs, _) in facts.matrices().items():
        if inputs % needs.divisor:
            return f"{quantizer.name} wants rows of a multiple of {needs.divisor}; {layer} has {inputs} inputs"
    return None


@rule("the methods' own tables (torchao 0.18.0, hqq 0.2.8.post1)")
def bits_exist(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    allowed, bits = method(config.quantizer).bits, config.quantizer.bits
    if not allowed or bits in allowed:
        return None
    return f"{config.quantizer.name} has no {bits}-bit form; it has {', '.join(map(str, allowed))}"


@rule("a GPU is found by nvidia-smi or not at all")
def gpu_is_there(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if machine.device == "cuda" and not environment.gpus():
        return "engine.device=cuda, and this machine shows no NVIDIA GPU"
    return None


@rule(
    "torchao 0.18.0: Int4Tensor asserts in_features % group_size == 0 or leaves the layer as it is with an INFO "
    "message; IntxWeightOnlyConfig fails with 'Expecting input size at 1 dimension: 576 to be divisible'"
)
def group_divides_rows(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    group = config.quantizer.group_size
    if config.quantizer.family != "torchao" or group is None:
        return None
    widths: dict[int, list[str]] = {}
    for layer, (inputs, _) in facts.matrices().items():
        if inputs % group:
            widths.setdefault(inputs, []).append(layer)
    for width, layers in widths.items():
        return (
            f"groups of {group} do not divide the {width} inputs of {', '.join(layers)}: torchao would leave "
            "those layers unquantized"
        )
    return None


@rule("hqq 0.2.8.post1: Quantizer.quantize asserts that group_size divides the number of weights")
def group_divides_matrix(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    group = config.quantizer.group_size
    if config.quantizer.family != "hqq" or group is None:
        return None
    for layer, (inputs, outputs) in facts.matrices().items():
        if (inputs * outputs) % group:
            return f"groups of {group} do not divide the {inputs} x {outputs} weights of {layer}"
    return None


@rule(
    "torchao 0.18.0: PrototypeInt4WeightOnlyConfig packs for aten::_weight_int4pack_mm_for_cpu only; groups other "
    "than 32, 64, 128 are refused; on a float32 model its prefill is a reference loop (285 CPU s for 2048 tokens)"
)
def int4_cpu_form(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.method != "int4_wo":
        return None
    if machine.device != "cpu":
        return "int4_wo is the CPU form of TorchAO's int4; set engine.device=cpu"
    if config.model.dtype != "bfloat16":
        return f"int4_wo on a CPU has a kernel for bfloat16 only; model.dtype is {config.model.dtype}"
    if config.quantizer.group_size not in (32, 64, 128):
        return f"int4_wo has groups of 32, 64 or 128, not {config.quantizer.group_size}"
    if config.quantizer.qparams not in ("tinygemm", "hqq"):
        return f"int4_wo finds its scales by tinygemm or hqq, not {config.quantizer.qparams}"
    return None


@rule(
    "transformers 5.23.0: DynamicCache.is_compileable is False, and with fixed shapes each step, one token longer "
    "than the last, would be compiled anew"
)
def static_shapes_need_static_cache(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    compiler = config.compiler
    if compiler.backend == "inductor" and config.cache.kind == "dynamic" and compiler.dynamic is not True:
        return f"{compiler.name} compiles fixed shapes, and a dynamic cache grows at every step: use cache=static"
    return None


@rule("torch 2.13.0: cudagraphs are skipped without a CUDA device, so the mode equals mode=default")
def cuda_graphs_need_cuda(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.compiler.mode == "reduce-overhead" and machine.device != "cuda":
        return "mode reduce-overhead adds CUDA graphs and nothing else; on a CPU it is compiler=inductor"
    return None


@rule("torch 2.13.0 _inductor/decomposition.py: the M=1 rewrite is for `device.type not in ['cpu', 'mps']`")
def coordinate_descent_needs_gpu(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.compiler.coordinate_descent and machine.device == "cpu":
        return "coordinate descent tunes Triton kernels; on a CPU inductor makes none: use compiler=inductor"
    return None


@rule("inductor's CPU backend writes C++ and calls the compiler at run time")
def inductor_on_cpu_needs_compiler(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.compiler.backend == "inductor" and machine.device == "cpu" and not machine.has_compiler:
        return "inductor on a CPU needs a C++ compiler (g++ or clang++) on the PATH"
    return None


@rule("positions beyond the trained context are not defined for the model")
def fits_context(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    limit = (facts.arch or {}).get("max_position_embeddings")
    needed = (config.workload.prompt_tokens or 0) + config.workload.new_tokens
    if limit and needed > limit:
        return f"{needed} tokens do not fit the model's context of {limit}"
    if config.cache.max_len is not None and config.cache.max_len < needed:
        return f"cache.max_len={config.cache.max_len} is too short for the {needed} tokens of the workload"
    if limit and config.quality.enabled and config.quality.window > limit:
        return f"quality.window={config.quality.window} does not fit the model's context of {limit}"
    return None
