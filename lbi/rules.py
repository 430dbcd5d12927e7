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

from lbi import environment, speculation_rules, structured
from lbi.config import CacheConfig, LbiConfig, QuantizerConfig
from lbi.kernels import rsr_index
from lbi.model_files import ModelFacts
from lbi.quantizers import loaders, method, native, target
from lbi.quantizers.options import parts, parts_of_draft


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
    named = [*parts(config.quantizer), *parts_of_draft(config.decoding)]
    for part in (config, *(replace(config, quantizer=part) for part in named)):
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


CACHE_KNOBS: dict[str, tuple[str, ...]] = {
    "dynamic": (),
    "static": ("max_len", "format"),
    "sliding": ("window", "sinks"),
    "hf_quantized": ("backend",),
    "offloaded": (),
    "offloaded_static": ("max_len",),
}
"""What a cache of each kind reads, besides what belongs to its format or its backend."""

CACHE_BACKENDS = {
    "hqq": {"bits", "group_size", "axis", "residual"},
    "quanto": {"bits", "group_size", "residual"},
}
"""Knobs of hf_quantized's backends; fp8 has none."""


def _idle(spec: Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


@rule("a knob that nothing reads would give two names to one measurement")
def unused_knob(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    compiler, decoding = config.compiler, config.decoding
    if compiler.linears and compiler.backend != "cudagraph":
        return f"compiler.linears is for cudagraph; {compiler.name} is {compiler.backend}"
    if compiler.backend != "inductor":
        for name, idle in (("mode", "default"), ("prefill", False), ("coordinate_descent", False), ("options", {})):
            if compiler.linears and name in ("coordinate_descent", "options"):
                continue
            if getattr(compiler, name) != idle:
                return f"compiler.{name} is for inductor; {compiler.name} compiles nothing"
    if decoding.kind == "greedy":
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
            if getattr(decoding, name) is not None:
                return f"decoding.{name} is for sampling; {decoding.name} is greedy"
    unread = speculation_rules.unread(decoding)
    if unread is not None:
        return unread
    return _unused_cache_knob(config) or _unused_engine_knob(config)


def _unused_cache_knob(config: LbiConfig) -> str | None:
    cache = config.cache
    read = set(CACHE_KNOBS[cache.kind])
    if cache.kind == "static" and cache.format is not None:
        read |= {"group_size"}
    if cache.kind == "hf_quantized":
        read |= CACHE_BACKENDS.get(cache.backend or "", set())
    for spec in fields(CacheConfig):
        if spec.name not in read | {"name", "kind"} and getattr(cache, spec.name) is not None:
            return f"cache={cache.name}, which is {cache.kind}, does not read cache.{spec.name}"
    return None


def _unused_engine_knob(config: LbiConfig) -> str | None:
    engine, compiler = config.engine, config.compiler
    if engine.tokens_per_graph == 1:
        return None
    if engine.kind == "hf":
        return f"engine.tokens_per_graph is for engine=loop and fused; {engine.name} launches one token at a time"
    if compiler.backend != "cudagraph":
        return f"engine.tokens_per_graph is for compiler=cudagraph; {compiler.name} launches one token at a time"
    return None


@rule("a draft of no tokens or from no text would be greedy decoding by another name")
def speculation_is_complete(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return speculation_rules.incomplete(config.decoding, facts)


@rule(
    "transformers 5.23.0: 'assisted generate is not supported with Static cache classes', and what it drafts is never "
    "compiled; engine=loop rolls a static cache back by its counter"
)
def speculation_needs_own_loop(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return speculation_rules.impossible(config, facts)


@rule("llguidance 1.9.1, LLMatcher.validate_grammar: it needs no tokenizer, so no model is loaded in vain")
def grammar_can_be_followed(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.decoding.grammar is None:
        return None
    return structured.why_not(config.decoding)


@rule("sampling without a temperature or a seed could not be repeated")
def sampling_is_complete(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.decoding.kind != "sampling":
        return None
    missing = [name for name in ("temperature", "seed") if getattr(config.decoding, name) is None]
    return f"sampling needs decoding.{missing[0]}" if missing else None


@rule(
    "torchao 0.18.0, gemlite 0.6.0.post2: asserted there, or read from the instructions their kernels use; "
    "fp8 matrix multiply from sm_89, block-scaled formats (MX, NVFP4) from sm_100"
)
def hardware_fits(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    needs, name = method(config.quantizer).needs, config.quantizer.name
    wanted = f"sm_{round(10 * needs.capability)}"
    because = f" ({needs.because})" if needs.because else ""
    if machine.device not in needs.devices:
        newer = f" of {wanted} or newer" if needs.capability else ""
        return f"{name} needs {'a CPU' if machine.device == 'cuda' else f'a GPU{newer}'}{because}"
    known = machine.device == "cuda" and machine.capability is not None
    if known and float(machine.capability or 0) < needs.capability:
        have = f"sm_{round(10 * (machine.capability or 0))}"
        return f"{name} needs a GPU of {wanted} or newer{because}; this one is {have}"
    return None


@rule("importlib.metadata finds no such distribution")
def package_is_installed(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    for package in method(config.quantizer).needs.packages:
        device, _, name = package.rpartition(":")
        if device in ("", machine.device) and name not in machine.packages:
            return f"{config.quantizer.name} needs the package {name}: pip install {name}"
    return None


@rule("layers that no option is named for stay as they are, and with no name at all nothing would be quantized")
def mix_is_given(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.family == "mix" and not config.quantizer.mix:
        return "mix needs quantizer.mix, such as {down_proj:int8_pack,default:hqq4}"
    return None


@rule("without candidates there is no choice, without a bound the smallest weights would win")
def autoquant_is_complete(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.family != "autoquant":
        return None
    if not config.quantizer.candidates:
        return "autoquant needs quantizer.candidates, such as [int8_pack,int4_wo]"
    return "autoquant needs quantizer.max_error" if config.quantizer.max_error is None else None


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
    by_row = config.quantizer.family in ("torchao", "gemlite", "native") or config.quantizer.backend in (
        "torchao_int4",
        "gemlite",
    )
    if not by_row or group is None:
        return None
    widths: dict[int, list[str]] = {}
    for layer, (inputs, _) in facts.matrices().items():
        if inputs % group:
            widths.setdefault(inputs, []).append(layer)
    for width, layers in widths.items():
        return (
            f"groups of {group} do not divide the {width} inputs of {', '.join(layers)}: those layers would be "
            "left unquantized"
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
    "torchao 0.18.0: PrototypeInt4WeightOnlyConfig packs for aten::_weight_int4pack_mm_for_cpu and refuses groups of "
    "256; on a float32 model its prefill is a reference loop (285 CPU s for 2048 tokens). Int4WeightOnlyConfig: hqq's "
    "parameters with tile_packed_to_4d only; plain and preshuffled raise 'Requires mslk >= 1.0.0'"
)
def int4_forms(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    quantizer = config.quantizer
    if quantizer.method not in ("int4_wo", "fp8_int4") or quantizer.family != "torchao":
        return None
    if quantizer.method == "int4_wo" and quantizer.qparams not in ("tinygemm", "hqq"):
        return f"int4_wo finds its scales by tinygemm or hqq, not {quantizer.qparams}"
    if machine.device == "cpu":
        if quantizer.packing != "auto":
            return f"quantizer.packing={quantizer.packing} is a layout for GPUs"
        return "int4_wo on a CPU has groups of 32, 64 or 128, not 256" if quantizer.group_size == 256 else None
    if quantizer.packing in ("plain", "preshuffled"):
        if "mslk-cuda" not in machine.packages:
            return f"quantizer.packing={quantizer.packing} needs the package mslk: pip install mslk-cuda"
        if quantizer.qparams == "hqq":
            return "qparams=hqq is for quantizer.packing=tile_packed_to_4d"
    return None


@rule("lbi/kernels/formats.py: a group is whole fours of words; HQQ moves zeros, and constant ones do not move")
def native_forms(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return native.no_such_form(config.quantizer) if config.quantizer.family == "native" else None


@rule(
    "hqq 0.2.8.post1: HQQLinearTorchWeightOnlynt4 asserts axis=1, 4 bits, bfloat16, groups of 32 to 256; gemlite "
    "0.6.0.post2 asserts axis=1 and has 8, 4, 2 and 1 bits; prepare_for_inference(backend='gemlite') without gemlite "
    "leaves HQQLinear in place without a word"
)
def hqq_backend(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    quantizer, backend = config.quantizer, config.quantizer.backend
    if quantizer.family != "hqq" or backend in (None, "pytorch"):
        return None
    if machine.device != "cuda":
        return f"quantizer.backend={backend} is made of GPU kernels; on a CPU there is backend=pytorch"
    if quantizer.axis != 1:
        return f"quantizer.backend={backend} has groups along the inputs only: quantizer.axis=1"
    if backend == "gemlite" and "gemlite" not in machine.packages:
        return "quantizer.backend=gemlite needs the package gemlite: pip install gemlite"
    if backend == "gemlite" and quantizer.bits == 3:
        return "gemlite has no 3-bit kernels; quantizer.backend=pytorch has"
    if backend == "torchao_int4" and (quantizer.bits != 4 or config.model.dtype != "bfloat16"):
        return "quantizer.backend=torchao_int4 is for 4 bits and bfloat16"
    return None


@rule(
    "transformers 5.23.0: DynamicCache.is_compileable is False, and with fixed shapes each step, one token longer "
    "than the last, would be compiled anew"
)
def static_shapes_need_static_cache(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    compiler = config.compiler
    cache = config.cache
    if compiler.backend == "cudagraph" and cache.kind not in ("static", "sliding"):
        what = "a dynamic cache moves" if cache.kind == "dynamic" else f"cache={cache.name} moves"
        return f"a CUDA graph replays fixed addresses, and {what} at every step: use cache=static"
    if compiler.backend == "inductor" and cache.kind == "dynamic" and compiler.dynamic is not True:
        return f"{compiler.name} compiles fixed shapes, and a dynamic cache grows at every step: use cache=static"
    if compiler.backend == "inductor" and cache.kind not in ("static", "sliding", "dynamic"):
        return f"{compiler.name} compiles a step as one graph, and cache={cache.name} is moved by the host"
    return None


@rule("lbi/engines: a step is a function over tensors that never move, and a dynamic cache moves at every step")
def loop_needs_static_cache(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    kind = config.engine.kind
    cache = config.cache.kind
    if kind == "hf" or cache == "static" or (kind == "loop" and cache == "sliding"):
        return None
    way_out = {"dynamic": "cache=static", "sliding": "engine=loop"}.get(cache, "cache=static, or engine=hf")
    return f"engine={kind} works on keys and values that stay where they are: use {way_out}"


@rule(
    "transformers 5.23.0: a StaticLayer has the model's own type; its low-bit cache, QuantizedCache, grows, and writes "
    "out all of itself at every step"
)
def low_bit_needs_own_engine(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.cache.format is not None and config.engine.kind == "hf":
        return f"cache={config.cache.name} is read by attention of lbi's own: use engine=loop or engine=fused"
    return None


@rule("transformers 5.23.0: StaticCache and DynamicCache slide where the model's config.json has a window, only there")
def sliding_needs_loop(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    cache = config.cache
    if cache.kind != "sliding":
        return None
    if config.engine.kind != "loop":
        return f"cache={cache.name} is a ring that engine=loop writes and reads: use engine=loop"
    if cache.window is None or cache.sinks is None:
        return f"cache={cache.name} needs cache.window and cache.sinks"
    return f"cache.sinks={cache.sinks} fill the window of {cache.window}" if cache.sinks >= cache.window else None


@rule("lbi/kernels/cache_formats.py: a group is part of one head's values, which 4 bits store in two halves")
def cache_groups_fit(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.cache.format is None or not facts.arch:
        return None
    arch = facts.arch
    width = _head_width(arch)
    group = config.cache.group_size or width
    if width and (width % 2 or width % group):
        return f"groups of {group} do not divide the {width} values of a head, or those are an odd number"
    if width and machine.device == "cuda" and group != width and width // 2 % group:
        return f"on a GPU groups are of a whole head of {width} values or of its half, which {group} do not divide"
    return None


@rule(
    "transformers 5.23.0, cache_utils.py: QuantoQuantizedLayer wants optimum-quanto, with 2 or 4 bits (optimum-quanto "
    "0.2.7: groups along the tokens, axis=-1, must divide their number); Fp8QuantizedLayer is new in 5.23; "
    "QuantizedCache raises ValueError for layers without full attention; HQQ asserts that groups divide the values"
)
def hf_quantized_cache_can_be_had(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    cache, arch = config.cache, facts.arch or {}
    if cache.kind != "hf_quantized":
        return None
    if cache.backend == "quanto" and "optimum-quanto" not in machine.packages:
        return f"cache={cache.name} needs the package optimum-quanto: pip install optimum-quanto"
    if cache.backend == "quanto" and cache.bits not in (2, 4):
        return f"cache={cache.name} has 2 or 4 bits, not {cache.bits}"
    if cache.backend == "fp8" and _release(machine.packages.get("transformers", "")) < (5, 23):
        return f"cache={cache.name} came with transformers 5.23"
    if arch.get("sliding_window") and arch.get("use_sliding_window", True):
        return f"cache={cache.name} is for full attention alone, and the model has a sliding window"
    heads = arch.get("num_key_value_heads") or arch.get("num_attention_heads") or 0
    width = _head_width(arch)
    if cache.group_size and (heads * width) % cache.group_size:
        return f"groups of {cache.group_size} do not divide the {heads} x {width} keys of a token"
    return None


def _head_width(arch: Mapping[str, Any]) -> int:
    return int(arch.get("head_dim") or arch.get("hidden_size", 0) // max(1, arch.get("num_attention_heads", 1)))


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


@rule("transformers 5.23.0 on a CPU: cache_implementation=offloaded ends with 'Torch not compiled with CUDA enabled'")
def offloading_needs_gpu(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.cache.kind.startswith("offloaded") and machine.device != "cuda":
        return f"cache={config.cache.name} moves keys and values from a GPU to the host; on a CPU they are there"
    return None


@rule("lbi/engines/fused_weights.py: the layers, models and shapes whose weights it takes apart")
def fused_reads_it(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.engine.kind != "fused":
        return None
    way_out = "engine=loop runs it"
    others = {part.family for part in (config.quantizer, *parts(config.quantizer))} - {"none", "native", "mix"}
    if others:
        return f"engine=fused multiplies by its own kernels, which cannot read layers of {min(others)}; {way_out}"
    if config.compiler.backend == "inductor" or config.compiler.linears:
        return f"engine=fused has its own kernels, {config.compiler.name} has nothing to compile: eager or cudagraph"
    kind = (facts.arch or {}).get("model_type", "llama")
    if kind not in ("llama", "mistral"):
        return f"engine=fused is a Llama, and the model is a {kind}; {way_out}"
    return None


@rule(
    "transformers 5.23.0, modeling_rope_utils.py: dynamic_frequency_update branches on the host at every step; "
    "Phi-3's generate() computes the whole cache anew where longrope changes its factors, a loop over steps does not"
)
def loop_needs_fixed_rope(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.engine.kind != "loop":
        return None
    arch = facts.arch or {}
    rope = arch.get("rope_parameters") or arch.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    short = rope.get("original_max_position_embeddings") or arch.get("original_max_position_embeddings")
    needed = (config.workload.prompt_tokens or 0) + config.workload.new_tokens
    if kind == "dynamic" or (kind == "longrope" and short and needed > short):
        return f"the model's rope type {kind} changes with the length of the text, engine=loop does not: use engine=hf"
    return None


@rule("torch 2.13.0: cudagraphs are skipped without a CUDA device, so the mode equals mode=default")
def cuda_graphs_need_cuda(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.compiler.backend == "cudagraph" and machine.device != "cuda":
        return "compiler=cudagraph replays CUDA graphs; on a CPU there is eager or inductor"
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


@rule("lbi/kernels/ternary_cpu.cpp is the only form of RSR, and its index has 16 bits for a column and for a length")
def rsr_can_be_built(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.method != "rsr":
        return None
    if not machine.has_compiler:
        return f"{config.quantizer.name} needs a C++ compiler (g++ or clang++) on the PATH"
    for layer, (inputs, _) in facts.matrices().items():
        if inputs > rsr_index.COLUMNS:
            return f"{config.quantizer.name} takes rows of up to {rsr_index.COLUMNS}; {layer} has {inputs} inputs"
    return None


@rule("positions beyond the trained context are not defined for the model")
def fits_context(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    limit = (facts.arch or {}).get("max_position_embeddings")
    needed = (config.workload.prompt_tokens or 0) + config.workload.new_tokens + (config.decoding.draft_tokens or 0)
    if limit and needed > limit:
        return f"{needed} tokens do not fit the model's context of {limit}"
    if config.cache.max_len is not None and config.cache.max_len < needed:
        return f"cache.max_len={config.cache.max_len} is too short for the {needed} tokens of the workload"
    if limit and config.quality.enabled and config.quality.window > limit:
        return f"quality.window={config.quality.window} does not fit the model's context of {limit}"
    return None


@rule("the function's file, found and parsed without importing it")
def custom_function_is_there(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return target.why_not(config.quantizer.target) if config.quantizer.family == "custom" else None


@rule("transformers 5.23.0, quantizers/quantizer_*.py: what each format's validate_environment asks for")
def stored_weights_fit(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    place = loaders.Place(machine.device, machine.packages, machine.capability)
    return loaders.why_not(config.quantizer, config.model, facts, place)


@rule(
    "torch 2.13.0, compressed-tensors 0.20.0: 'torch._dynamo.exc.Unsupported: Data pointer comparison', in the "
    "wrapper it puts around each layer's forward; with graph breaks it runs"
)
def wrapped_layers_have_graph_breaks(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    compiles_whole = config.compiler.backend == "inductor" and config.compiler.fullgraph
    if compiles_whole and loaders.stored_format(facts.arch) == "compressed-tensors":
        return "torch cannot compile the layers of compressed-tensors as one graph: set compiler.fullgraph=false"
    return None


AT_LOADING = (
    hardware_fits,
    custom_function_is_there,
    stored_weights_fit,
    wrapped_layers_have_graph_breaks,
    loop_needs_fixed_rope,
)
"""Rules that a run asks again before it loads: the plan may not have known the GPU, or a hub id's config.json."""
