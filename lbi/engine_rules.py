"""What engines, caches and compilers need of each other, the machine and the model; see rules.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbi.config import LbiConfig
from lbi.engines import batch_problem
from lbi.model_files import ModelFacts
from lbi.quantizers.options import parts, parts_of_draft
from lbi.rule_table import Machine, rule


@rule("a GPU is found by nvidia-smi or not at all")
def gpu_is_there(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if machine.device == "cuda" and not machine.has_gpu:
        return "engine.device=cuda, and this machine shows no NVIDIA GPU"
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
    own = {part.family for part in (config.quantizer, *parts(config.quantizer))}
    drafts = {part.family for part in parts_of_draft(config.decoding)}
    for families, whose in ((own, ""), (drafts, ", the draft's")):
        others = families - {"none", "native", "mix"}
        if others:
            return (
                f"engine=fused multiplies by its own kernels, which cannot read layers of {min(others)}{whose}; "
                f"{way_out}"
            )
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


@rule(
    "lbi/engines: generate()'s clock and cache are looked at for one sequence, the fused kernels take one token, and "
    "what is drafted or masked stands or falls for each sequence by itself"
)
def batch_has_room(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return batch_problem(config)


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
