"""Every knob of lbi, with its type, its unit and its bounds.

A YAML file under `conf/<group>/` gives each knob of its group a value, and this
file says what the value may be. Hydra composes the YAML; `typed.build` turns the
composed mapping into these frozen dataclasses and refuses what does not fit,
naming the field, the value and the way out.

Torch is not imported here: the plan is made of these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lbi.resources import ResourcesConfig as ResourcesConfig
from lbi.typed import knob


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which weights are run."""

    name: str = knob("name shown in tables")
    source: Literal["hf", "gguf", "random"] = knob(
        "hf: a folder or hub id; gguf: one file, converted once; random: seeded weights from `arch`"
    )
    path: str | None = knob(
        "folder, hub id or GGUF file; `package:NAME/FILE` is a file inside an installed package",
        default=None,
    )
    revision: str | None = knob("branch, tag or commit of a hub id", default=None)
    dtype: Literal["bfloat16", "float16", "float32"] = knob("type of the unquantized weights")
    seed: int = knob("seed of random weights", default=0, low=0)
    arch: dict[str, Any] | None = knob(
        "fields of the model's config.json: what random weights are made from; for "
        "other sources the shapes that the plan checks group sizes against",
        default=None,
    )
    note: str | None = knob("what a reader of this model's results must know", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What turns a prompt into tokens."""

    name: str = knob("name shown in tables")
    kind: Literal["hf", "loop", "fused"] = knob(
        "hf: transformers' generate(); loop: our own decode loop, all on the device; fused: our own Llama in it"
    )
    device: Literal["auto", "cpu", "cuda"] = knob("auto takes the GPU if there is one")
    threads: int | None = knob("CPU threads of one run; null takes every core the process may use", default=None, low=1)
    attention: Literal["sdpa", "eager"] = knob("attention implementation asked of transformers")
    tokens_per_graph: int = knob(
        "loop and fused with cudagraph: tokens that one replay makes; all of them are known, and timed, at its end",
        default=1,
        low=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig:
    """How the weights of the linear layers are stored.

    A YAML under conf/quantizer lists the knobs its family reads and leaves the
    rest out: setting one that is not listed is refused, never ignored.
    """

    name: str = knob("name shown in tables")
    family: str = knob("module of lbi.quantizers that applies it")
    method: str = knob("function of that module's table")
    bits: int | None = knob("bits of one weight, without scales", default=None, low=1, high=16)
    group_size: int | None = knob("weights of one row that share a scale; null: the whole row", default=None, low=1)
    symmetric: bool | None = knob("no zero point", default=None)
    axis: Literal[0, 1] | None = knob("hqq: the axis along which a group lies; 1: along the inputs", default=None)
    qparams: str | None = knob("how scales and zeros are found", default=None)
    granularity: Literal["tensor", "row"] | None = knob(
        "what shares a scale, of weights and of activations quantized on the fly", default=None
    )
    backend: Literal["pytorch", "torchao_int4", "gemlite"] | None = knob("hqq: what multiplies", default=None)
    packing: Literal["auto", "tile_packed_to_4d", "plain", "preshuffled"] | None = knob(
        "torchao int4: the layout; auto takes the device's own, plain and preshuffled need the package mslk",
        default=None,
    )
    accumulate: Literal["float32", "native"] | None = knob(
        "gemlite: type of the sums that blocks add up in memory; native is the output's, as always at 8 bits",
        default=None,
    )
    tuning: Literal["fast", "max"] | None = knob(
        "gemlite: how many forms of each kernel are tried at its first call", default=None
    )
    lm_head: Literal["keep", "int8", "same"] = knob(
        "the output projection: as it is, int8 with a scale a row, or like the other layers", default="keep"
    )
    embeddings: Literal["keep", "int8"] = knob(
        "the table of input embeddings: as it is, or int8 with a scale a row", default="keep"
    )
    skip: tuple[str, ...] = knob("linear layers left unquantized on purpose: endings of their names", default=())
    mix: dict[str, Any] | None = knob(
        "mix: option by ending of the layer's name, `default` for the rest: {down_proj: int8_wo, default: int4_wo}",
        default=None,
    )
    candidates: tuple[str, ...] = knob(
        "autoquant: options to choose from, each with knobs if wanted: [int8_wo, 'int4_wo group_size=64']", default=()
    )
    max_error: float | None = knob(
        "autoquant: largest relative error of a layer's output, ||y - y'|| / ||y||; 0.1 is an SQNR of 20 dB",
        default=None,
        above=0.0,
    )
    tokens: int | None = knob(
        "autoquant: rows of the input that kernels are timed at; 1 is a decode step at batch 1", default=None, low=1
    )
    target: str | None = knob("custom: `module:function` that quantizes", default=None)
    options: dict[str, Any] | None = knob("custom: what the function is called with, {rank: 4}", default=None)
    base: str | None = knob(
        "checkpoint: folder or hub id of the unquantized model, which quality is compared with; null: no quality",
        default=None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompilerConfig:
    """What compiles the forward pass."""

    name: str = knob("name shown in tables")
    backend: Literal["eager", "inductor", "cudagraph"] = knob(
        "eager runs op by op; cudagraph records the same kernels once and replays them in one launch"
    )
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = knob(
        "torch.compile's mode", default="default"
    )
    fullgraph: bool = knob("a graph break is an error", default=True)
    dynamic: bool | None = knob("shapes: false static, true dynamic, null decided by torch", default=False)
    prefill: bool = knob("compile the prefill too, not only the decode step", default=False)
    linears: bool = knob(
        "cudagraph: compile each linear layer by inductor before recording, so that it widens its weights as it reads "
        "them; a kernel a shape, seconds instead of minutes",
        default=False,
    )
    coordinate_descent: bool = knob(
        "inductor's coordinate descent tuning: rewrites M=1 matmuls into fused reductions",
        default=False,
    )
    options: dict[str, Any] = knob("any other inductor option, by its name", default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingConfig:
    """How the next token is chosen."""

    name: str = knob("name shown in tables")
    kind: Literal["greedy", "sampling"] = knob("greedy takes the most likely token")
    temperature: float | None = knob("sampling: divides the logits", default=None, above=0.0)
    top_k: int | None = knob("sampling: keep the k likeliest tokens; null: all", default=None, low=1)
    top_p: float | None = knob(
        "sampling: keep the likeliest tokens up to this probability", default=None, above=0.0, high=1.0
    )
    min_p: float | None = knob(
        "sampling: drop tokens less likely than this share of the likeliest", default=None, low=0.0, high=1.0
    )
    repetition_penalty: float | None = knob(
        "sampling: divides the positive logits of tokens that prompt or text have already, multiplies the negative",
        default=None,
        above=0.0,
    )
    seed: int | None = knob("sampling: seed of each repetition", default=None, low=0)
    speculative: Literal["lookup", "draft", "self"] | None = knob(
        "what drafts tokens that the model then verifies at once; lookup: what followed the same words before; "
        "draft: another model; self: the same weights at fewer bits, with the keys and values of the model itself",
        default=None,
    )
    draft_tokens: int | None = knob(
        "speculative: tokens drafted at once, at most; engine=fused has kernels for 15 and fewer",
        default=None,
        low=1,
        high=32,
    )
    adaptive: bool = knob(
        "speculative: twice as many drafts after all stood, half as many after less than half did", default=False
    )
    draft: str | None = knob("draft: a model that drafts, an option's name, a folder or hub id", default=None)
    draft_quantizer: str | None = knob(
        "draft and self: how the draft's weights are stored, an option with knobs if wanted: native_w4 group_size=64; "
        "null: as they are loaded",
        default=None,
    )
    draft_layers: int | None = knob("self: blocks that the draft has, the first ones; null: all", default=None, low=1)
    grammar: str | None = knob("structured: the grammar that the text must follow, or a file with it", default=None)
    grammar_kind: Literal["json_schema", "regex", "lark"] | None = knob(
        "structured: what the grammar is written in", default=None
    )
    fast_forward: bool = knob(
        "structured: feed tokens that the grammar leaves no choice for at once, draft_tokens at most", default=False
    )
    ngram: int | None = knob("lookup: longest ending of the text that is looked up, in tokens", default=None, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where keys and values of past tokens are kept."""

    name: str = knob("name shown in tables")
    kind: Literal["dynamic", "static", "sliding", "hf_quantized", "offloaded", "offloaded_static"] = knob(
        "dynamic grows by a token a step; static is allocated once; sliding keeps the first and the latest tokens; "
        "transformers' own for generate(): hf_quantized, offloaded (dynamic, in the host's memory), offloaded_static"
    )
    max_len: int | None = knob("static: slots, in tokens; null: exactly what the workload needs", default=None, low=1)
    format: Literal["int8", "fp8", "int4"] | None = knob(
        "static: how keys and values are stored, with scales; null: in the model's own type", default=None
    )
    group_size: int | None = knob(
        "low-bit: values of one head and token that share a scale; null: the whole head; hf_quantized: of the whole "
        "tensor as its axis has them",
        default=None,
        low=1,
    )
    window: int | None = knob("sliding: tokens that are kept, the first ones among them", default=None, low=2)
    sinks: int | None = knob("sliding: first tokens that stay for good", default=None, low=0)
    backend: Literal["hqq", "quanto", "fp8"] | None = knob("hf_quantized: what quantizes", default=None)
    bits: Literal[1, 2, 3, 4, 8] | None = knob("hf_quantized by hqq and quanto: bits of one value", default=None)
    axis: Literal[0, 1] | None = knob("hf_quantized by hqq: the axis along which it groups", default=None)
    residual: int | None = knob(
        "hf_quantized by hqq and quanto: latest tokens kept as they are, until there are so many", default=None, low=1
    )

    @property
    def lossless(self) -> bool:
        """Whether exact arithmetic would give the tokens of a dynamic cache."""
        return self.format is None and self.kind not in ("sliding", "hf_quantized")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadConfig:
    """What is generated from what."""

    name: str = knob("name shown in tables")
    prompt: str = knob(
        "the prompt itself, `text:NAME` for a text of lbi/texts, or `rounds:NAME` for a long one made of it"
    )
    prompt_tokens: int | None = knob(
        "cut or repeat the prompt to this many tokens; null: as it is", default=None, low=1
    )
    new_tokens: int = knob("tokens generated, EOS ignored", low=2)
    batch: int = knob(
        "sequences decoded at once, each from this same prompt, so that all are of one length and none is padded",
        default=1,
        low=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """How far the cell is from the unquantized model."""

    name: str = knob("name shown in tables")
    enabled: bool = knob("score at all")
    text: str = knob("a file, or `text:NAME` for a text of lbi/texts", default="text:quality")
    tokens: int = knob("tokens of the text that are used, at most", default=2048, low=2)
    window: int = knob("tokens of one forward pass; the context starts anew at each", default=512, low=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """How often, and when a sample counts."""

    name: str = knob("name shown in tables")
    repetitions: int = knob("samples wanted; with a ci_target the fewest", low=1)
    warmup: int = knob("generations before the first sample", low=1)
    void_budget: int = knob("samples that may be void and repeated before the run fails", default=5, low=0)
    cooldown_s: float = knob("pause before each sample, in seconds", default=0.0, low=0.0)
    ci_target: float | None = knob(
        "go on until half the interval of decode_tok_s is at most this share of the median (0.01: 1%); null: no target",
        default=None,
        above=0.0,
    )
    max_repetitions: int | None = knob(
        "ci_target: the most samples; null: ten times `repetitions`", default=None, low=2
    )
    race: bool = knob(
        "stop after three samples if results of the sweep beat the cell beyond noise in speed, KLD and memory alike",
        default=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """What is recorded besides the result: after the measurement, and never inside it."""

    name: str = knob("name shown in tables")
    kind: Literal["off", "kernels", "memory", "compile", "all", "profiler"] = knob(
        "kernels: torch.profiler over a few decode steps; memory: the CUDA allocator's history, also of a run without "
        "enough; compile: what torch.compile made; all: these three; profiler: what kernels was called at first"
    )
    tokens: int = knob("kernels: decode steps that are traced", default=4, low=1)
    blocking: bool = knob(
        "kernels: the host waits for each launch (CUDA_LAUNCH_BLOCKING=1), in a process of its own: no two overlap",
        default=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerConfig:
    """Where results are shown, besides the store."""

    name: str = knob("name shown in tables")
    kind: Literal["none", "wandb"] = knob("wandb: one W&B run per result")
    mode: Literal["auto", "online", "offline"] = knob(
        "auto: online with a key and a server that answers, else offline", default="auto"
    )
    project: str = knob("W&B project", default="lbi")
    entity: str | None = knob("W&B team or user; null: the key's own", default=None)
    timeout_s: float = knob(
        "bound on everything the tracker does after a sweep, or for one `lbi sync`, in seconds",
        default=120.0,
        above=0.0,
    )
    inline_s: float | None = knob(
        "new results go online every so many seconds while the sweep runs, unless it measures on this CPU; "
        "null: at its end",
        default=60.0,
        above=0.0,
    )
    files: Literal["none", "results", "all"] = knob(
        "what is attached: results: each result's files; all: what its trace folder holds too", default="all"
    )
    max_file_mb: float = knob(
        "a larger file is not attached; the run's summary names it, in MB", default=200.0, above=0.0
    )
    runs_per_minute: float = knob(
        "pace once as many runs have been written; W&B limits requests", default=60.0, above=0.0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Where results are kept."""

    name: str = knob("name shown in tables")
    path: str = knob("folder of the store, relative to the current folder")
    quantized_gb: float = knob(
        "quantized weights kept for other cells, in GB; the least recently used go; 0: none kept, none used",
        default=20.0,
        low=0.0,
    )
    quantized_s: float = knob(
        "they are kept if quantizing took at least this long, in seconds, and twice as long as reading takes; 0: all",
        default=2.0,
        low=0.0,
    )
    graphs_gb: float = knob(
        "the most that compiled graphs kept in the store may take, in GB; the least recently used go first",
        default=2.0,
        low=0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What to do with the plan."""

    name: str | None = knob("folder of this sweep in the store; null: made from the command line", default=None)
    dry_run: bool = knob("print the plan and stop", default=False)
    mode: Literal["cached", "retry", "force", "read_only"] = knob(
        "cached: run what has no result; retry: failed cells too; force: all; read_only: nothing",
        default="cached",
    )
    reuse: Literal["exact", "same_versions", "same_gpu", "any"] = knob(
        "what a stored result must share with this machine: git state too, package versions, only the device, nothing",
        default="same_versions",
    )
    prune: bool = knob("leave out what rules.py refuses; false runs it, to test a rule", default=True)
    wait: bool = knob("cluster: follow the jobs until they end; false returns after submitting", default=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the report says."""

    baseline: str | None = knob(
        "cell that ratios refer to, by a part of its name or its run id; null: the plainest one",
        default=None,
    )
    max_kld: float = knob("a cell within this mean KLD may be called the answer, in nats", default=0.05, low=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LbiConfig:
    """One cell of the grid, resolved. Field names are the config groups."""

    model: ModelConfig
    engine: EngineConfig
    quantizer: QuantizerConfig
    compiler: CompilerConfig
    decoding: DecodingConfig
    cache: CacheConfig
    workload: WorkloadConfig
    quality: QualityConfig
    measure: MeasureConfig
    trace: TraceConfig
    tracker: TrackerConfig
    resources: ResourcesConfig
    store: StoreConfig
    sweep: SweepConfig = field(default_factory=SweepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


AXES = ("model", "engine", "quantizer", "compiler", "decoding", "cache", "workload")
"""Groups that name a cell in tables, in the order of their columns."""

IDENTITY = (*AXES, "quality", "measure")
"""Groups that can change a result: together they make the run_id."""
