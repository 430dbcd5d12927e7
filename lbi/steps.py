"""The steps of a run, each of which reads the config and adds to the record.

In order: quantize and audit, the plain path for comparison, warm up, measure (measuring.py, the
only timed region), place on the roofline, score (scoring.py), trace.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lbi import environment, identity, kept_choices, lossless, quantizing, roofline, rules, tracing
from lbi.compilers import HELD, CompilerState, counters, start_of
from lbi.config import CacheConfig, CompilerConfig, DecodingConfig, LbiConfig
from lbi.draft_models import Draft, drafts_from
from lbi.engines import Engine, Generation, make, plain_engine, steps_to_look_at
from lbi.engines.cache import in_pieces
from lbi.errors import BadNumerics, NotApplied, Unsupported
from lbi.metrics import (
    model_bandwidth_utilization,
    prefill_flop,
)
from lbi.models import known_facts
from lbi.process import Phases
from lbi.quantizers import assign, audit, custom, gemlite, one_row
from lbi.quantizers.int8_layers import quantize_embeddings
from lbi.quantizers.options import PLAIN, option, part_names, parts
from lbi.record import Record

PLAIN_COMPILER = CompilerConfig(name="eager", backend="eager")
PLAIN_DECODING = DecodingConfig(name="greedy", kind="greedy")
PLAIN_CACHE = CacheConfig(name="dynamic", kind="dynamic")


def check_request(config: LbiConfig, request: dict[str, Any]) -> None:
    """Refuse, before the weights are loaded, what the plan could not know. Raises `Unsupported`.

    It may not have known the GPU, nor the config.json of a hub id, and imports no quantizer of the
    user's; one that was edited since is not the setting that the result would be kept under.
    """
    quantizer = config.quantizer
    facts, machine = known_facts(config.model), rules.Machine.here(config.engine.device)
    for part in (quantizer, *parts(quantizer)):
        reasons = [check(replace(config, quantizer=part), facts, machine) for check in rules.AT_LOADING]
        for reason in filter(None, reasons if config.sweep.prune else []):
            raise Unsupported(reason)
    own = [part for part in (quantizer, *map(option, part_names(quantizer))) if part.family == "custom"]
    for part in own:
        custom.function(part)
    if own and request["run_id"] != identity.run_id_of(config, facts):
        raise Unsupported(f"{own[0].target} was edited after the plan was made; the same command runs it anew")


def check_context(config: LbiConfig, model: Any, prompt_tokens: int) -> None:
    """Refuse a prompt of its own length that the plan could not count. Raises `Unsupported`."""
    limit = getattr(model.config, "max_position_embeddings", None)
    needed = prompt_tokens + config.workload.new_tokens
    if config.sweep.prune and limit and needed > limit:
        raise Unsupported(
            f"the workload's {prompt_tokens} + {config.workload.new_tokens} tokens do not fit the model's context of "
            f"{limit}; workload.prompt_tokens cuts the prompt"
        )


def quantize(
    config: LbiConfig,
    model: Any,
    sample: list[int],
    tuning: Path,
    record: Record,
    phases: Phases,
    kept_in: Path | None = None,
) -> list[audit.Layer]:
    """Quantize and audit; the linear layers as found.

    `sample` is the text whose pass autoquant looks at, `tuning` the file of GemLite's earlier tuning,
    `kept_in` the folder of weights that earlier runs have quantized.

    Raises `NotApplied` where the layers are not as asked.
    """
    quantizer = config.quantizer
    before = CompilerState.take()
    assignment = assign.by_name(model, quantizer)
    if quantizer.family == "autoquant":
        chosen = kept_choices.choose(config, model, assignment, sample, kept_in, phases)
        assignment, record.effective["choices"] = chosen
    if any(part.family == "gemlite" or part.backend == "gemlite" for part in assignment.values()):
        record.effective["gemlite_tuning"] = "kept from earlier runs" if gemlite.load_tuning(tuning) else "own"

    def make() -> None:
        assign.apply(model, assignment)
        if quantizer.embeddings == "int8":
            quantize_embeddings(model)

    weights = quantizing.Weights(config.model, assignment, quantizer.embeddings)
    had = quantizing.have(config, model, weights, kept_in, phases, "quantize", make)
    record.effective["settings_undone"] = before.restore()
    with phases("audit"):
        layers = audit.read_layers(model, frozenset(assignment))
        audit.check(layers, assignment, quantizer.name)
        gc.collect()
        _note_quantized(model, layers, had, record)
    had.keep(model, weights, phases)
    return layers


def _note_quantized(model: Any, layers: list[audit.Layer], had: quantizing.Had, record: Record) -> None:
    """Record what the model is made of now, what that took, and what it runs on."""
    summary = audit.summarize(layers)
    record.metrics |= {
        "quantize_s": had.quantize_s,
        "weight_bytes": float(audit.weight_bytes(model)),
        "bits_per_weight": summary["bits_per_weight"],
        "quantized_fraction": summary["quantized_fraction"],
    }
    record.effective |= {
        "weights": summary,
        **had.effective(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "cores": environment.cores(),
        "torch": torch.__version__,
    }
    if had.load_s is None:
        record.missing["quantized_load_s"] = "no kept weights were read"
    else:
        record.metrics["quantized_load_s"] = had.load_s


def quantize_draft(
    config: LbiConfig, draft: Draft | None, record: Record, phases: Phases, kept_in: Path | None = None
) -> list[audit.Layer]:
    """Quantize and audit the model that drafts, if there is one; its linear layers as found.

    Raises `NotApplied` where they are not as asked.
    """
    if draft is None:
        return []
    chosen = config.decoding.draft_quantizer
    wanted = option(chosen) if chosen else PLAIN
    before = CompilerState.take()
    assignment = assign.by_name(draft.model, wanted)
    weights = quantizing.Weights(drafts_from(config), assignment)
    had = quantizing.have(
        config,
        draft.model,
        weights,
        kept_in,
        phases,
        "quantize the draft",
        lambda: assign.apply(draft.model, assignment),
    )
    before.restore()
    layers = audit.read_layers(draft.model, frozenset(assignment))
    audit.check(layers, assignment, wanted.name)
    gc.collect()
    had.keep(draft.model, weights, phases)
    blocks = draft.model.config.num_hidden_layers
    found = {"weights": audit.summarize(layers), "layers": blocks, "shares_cache": draft.shares_cache}
    found |= had.effective()
    record.effective["draft"] = found
    return layers


def read_again(config: LbiConfig, model: Any, layers: list[audit.Layer]) -> list[audit.Layer]:
    """The layers as the engine has left them: what was read before would keep weights that were moved."""
    if config.engine.kind != "fused":
        return layers
    found = audit.read_layers(model, frozenset(layer.name for layer in layers))
    gc.collect()
    return found


def check_one_row(
    config: LbiConfig, model: Any, layers: list[audit.Layer], rows: int, record: Record, phases: Phases
) -> None:
    """Hold the kernels of a decode step against those of a prefill of `rows` tokens. Raises `BadNumerics`."""
    with phases("check one row"):
        worst = one_row.worst_layer(model, layers, rows, getattr(torch, config.model.dtype))
    record.effective["one_row"] = worst
    record.metrics["one_row_error"] = worst["error"]


def keep_tuning(layers: list[audit.Layer], file: Path) -> None:
    """Keep what GemLite's kernels were tuned to in the warm-up, if there are any."""
    if any(layer.seen.kind.startswith("GemLite") for layer in layers):
        gemlite.save_tuning(file)


def plain_path(
    config: LbiConfig, model: Any, prompt: list[int], phases: Phases
) -> Callable[[list[int]], dict[str, Any]] | None:
    """A check of the cell's greedy tokens against generate(), eager and with a dynamic cache, on the same weights.

    None where there is nothing to check: the cell is that path, it samples, follows a grammar, or its cache is
    not lossless.
    """
    eager, dynamic = config.compiler.backend == "eager", config.cache.kind == "dynamic"
    is_plain = config.engine.kind == "hf" and eager and dynamic
    free = config.decoding.kind == "greedy" and config.decoding.grammar is None
    if is_plain or not free or not config.cache.lossless:
        return None
    with phases("plain path"):
        plain = replace(config, engine=plain_engine(config.engine), compiler=PLAIN_COMPILER, cache=PLAIN_CACHE)
        plain = replace(plain, decoding=PLAIN_DECODING, workload=replace(config.workload, batch=1))
        engine = make(plain, model, slots=0)
        expected = engine.generate(prompt, config.workload.new_tokens, seed=0, inspect=True)
        # GemLite would tune its kernels for as many rows as the text has, for a minute, and nobody else uses them.
        rows = len(prompt) if gemlite.takes_part(config.quantizer) else None
        return _check_against(config, model, engine, prompt, expected, "generate()", rows)


def cache_path(
    config: LbiConfig, model: Any, engine: Any, prompt: list[int], phases: Phases
) -> Callable[[list[int]], dict[str, Any]] | None:
    """A check of drafted greedy tokens over a lossy cache against greedy decoding by the same engine over that cache.

    To be had before the engine compiles. None where nothing is drafted, or `plain_path` has the check.
    """
    free = config.decoding.kind == "greedy" and config.decoding.grammar is None
    if config.decoding.speculative is None or not free or config.cache.lossless:
        return None
    with phases("plain path"):
        expected = engine.without_drafts(prompt, config.workload.new_tokens)
        return _check_against(config, model, engine, prompt, expected, "greedy over the same cache")


def _check_against(
    config: LbiConfig, model: Any, engine: Engine, prompt: list[int], expected: Generation, what: str,
    rows: int | None = None,
) -> Callable[[list[int]], dict[str, Any]]:  # fmt: skip
    """A comparison with what `engine` generated. Raises `BadNumerics` for logits that are not finite.

    The second way to the same logits, by which it is known how far two correct ways are apart, has the whole text
    at once, or `rows` tokens.
    """
    text = prompt + expected.tokens[:-1]
    logits = engine.forward(text) if rows is None else in_pieces(model, text, rows)
    at_once = logits[len(prompt) - 1 :].float().cpu()
    if not bool(torch.isfinite(at_once).all()):
        raise BadNumerics("the logits hold NaN or infinity")
    plain = config.quantizer.family in ("none", "native") and config.cache.format is None
    arithmetic = lossless.Arithmetic(model.dtype, model.config.num_hidden_layers, plain)
    return lambda tokens: {
        "against": what,
        **lossless.compare(tokens, expected.tokens, expected.logits, at_once, arithmetic),
    }


def warm_up(config: LbiConfig, engine: Engine, prompt: list[int], record: Record, phases: Phases) -> None:
    """Compile, generate until warm, and read back what was compiled and which cache is used."""
    compiled = config.compiler.backend != "eager"
    durations, cache = [], {}
    with phases("compile" if compiled else "warm up"):
        if compiled:
            engine.compile()
        for number in range(config.measure.warmup):
            start = time.perf_counter()
            # The last warm-up also looks inside; its copies of the logits are small beside a decode step.
            last = number == config.measure.warmup - 1
            cache = engine.generate(prompt, config.workload.new_tokens, seed=0, inspect=last).cache
            durations.append(time.perf_counter() - start)
    record.effective["cache"] = cache
    record.metrics["kv_bytes"] = float(cache["bytes"])
    _check_cache(config, cache)
    record.first_call_s = durations[0]
    record.last_warm_up_s = durations[-1] if len(durations) > 1 else 0.0
    if compiled:
        _note_compiled(config, engine, record)


def _note_compiled(config: LbiConfig, engine: Engine, record: Record) -> None:
    """Record what was compiled or captured. Raises `NotApplied` where that is not what was asked for."""
    graphs = engine.graphs()
    if graphs is not None:
        found = {"cuda_graphs": graphs.captured, "replays": graphs.replays, "tokens_per_graph": engine.tokens_at_once}
        found |= {"prefill_graphs": graphs.prefills} if graphs.prefills else {}
        seen = counters() if config.compiler.linears else {}
        record.effective["compiler"] = {**seen, **found}
        if seen:
            record.effective["compiler"]["compile_cache"] = record.cost["compile"] = start_of(seen)
        if not graphs.replays:
            raise NotApplied(f"{config.compiler.name} was asked for and no step was replayed")
        return
    seen = counters()
    # A compile that found its graphs in inductor's cache, or in memory, must not pass for a cold one.
    isolation = record.effective.get("isolation", {})
    start = start_of(seen, "graph_of" in isolation)
    if start != HELD:
        # The process has an earlier run's graph, and it did not fit.
        isolation.pop("graph_of", None)
    record.effective["compiler"] = {**seen, "compile_cache": start}
    record.cost["compile"] = start
    if seen["graphs"] == 0 and start != HELD:
        raise NotApplied(f"{config.compiler.name} was asked for and nothing was compiled")
    if config.compiler.fullgraph and seen["graph_breaks"]:
        raise NotApplied(f"fullgraph was asked for and there are {seen['graph_breaks']} graph breaks")


CACHE_CLASSES = {
    "dynamic": ("DynamicCache",),
    "static": ("StaticCache", "FusedCache"),
    "sliding": ("StaticCache",),
    "hf_quantized": ("QuantizedCache",),
    "offloaded": ("DynamicCache",),
    "offloaded_static": ("StaticCache",),
}
"""What a cache of each kind is, by transformers' name."""


def _check_cache(config: LbiConfig, cache: dict[str, Any]) -> None:
    asked = config.cache
    if cache["class"] not in CACHE_CLASSES[asked.kind]:
        raise NotApplied(f"cache={asked.name} was asked for and transformers used a {cache['class']}")
    if asked.kind.startswith("offloaded") and not cache.get("offloading"):
        raise NotApplied(f"cache={asked.name} was asked for and nothing is offloaded")
    if asked.kind == "sliding" and cache["layer_class"] != "SlidingLayer":
        raise NotApplied(f"cache={asked.name} was asked for and its layers are {cache['layer_class']}")
    wanted = f"{asked.backend}{asked.bits or ''}" if asked.kind == "hf_quantized" else asked.format
    if wanted not in (None, cache["dtype"]):
        raise NotApplied(f"cache={asked.name} was asked for and its values are stored as {cache['dtype']}")


def place_on_roofline(
    config: LbiConfig,
    request: dict[str, Any],
    model: Any,
    layers: list[audit.Layer],
    draft: tuple[Any, list[audit.Layer]] | None,
    prompt_tokens: int,
    record: Record,
    phases: Phases,
) -> None:
    """Bytes a token, and how near decode and prefill are to what the device can do."""
    cache, metrics = record.effective["cache"], record.metrics
    # transformers reads a static cache to its end at every step; others are read as far as the text has come.
    depth = cache["slots"] if cache["reads"] == "slots" else prompt_tokens + config.workload.new_tokens / 2
    # A batch reads the weights once for all of its sequences; the cache's bytes are those of all.
    batch = config.workload.batch
    bytes_per_token = roofline.bytes_per_step(model, layers, cache["bytes_per_slot"] * depth, batch) / batch
    if draft is not None:
        own = cache.get("draft", cache)
        share = draft[0].config.num_hidden_layers / model.config.num_hidden_layers if own is cache else 1.0
        once = roofline.bytes_per_step(*draft, own["bytes_per_slot"] * depth * share)
        bytes_per_token += once * float(metrics.get("draft_length") or 0.0)
    # A verification reads what a decode step reads, and gives several tokens.
    bytes_per_token /= metrics.get("acceptance_length") or 1.0
    metrics["bytes_per_token"] = bytes_per_token
    with phases("roofline"):
        name = f"{request['env_id']}-{config.engine.threads or 'all'}-{config.model.dtype}"
        peaks = roofline.measured_peaks(Path(request["devices"]), name, config.engine.device, model.dtype)
    speed, prefill_s = float(metrics["decode_tok_s"] or 0.0) * batch, float(metrics["ttft_s"] or 0.0)
    metrics["mbu_measured"] = model_bandwidth_utilization(bytes_per_token, speed, peaks["read_bytes_per_s"])
    flop = prefill_flop(roofline.flop_shape(model, layers), prompt_tokens) * batch
    metrics["mfu_measured"] = flop / prefill_s / peaks["matmul_flop_per_s"]
    nominal = roofline.nominal_bandwidth(request["device_name"])
    if nominal is None:
        record.missing["mbu_nominal"] = f"no data sheet bandwidth is known for {request['device_name']}"
    else:
        metrics["mbu_nominal"] = model_bandwidth_utilization(bytes_per_token, speed, nominal)
    record.effective["peaks"] = peaks


def trace(config: LbiConfig, engine: Engine, prompt: list[int], record: Record, phases: Phases) -> None:
    """The traces that are asked for and that this process can take, and why the others cannot be had."""
    asked = tracing.wanted(config)
    if not asked:
        return
    found = tracing.in_the_run(config)
    if "kernels" in asked and not tracing.is_blocking(config):
        with phases("trace"):
            found["kernels"] = traced_steps(config, engine, prompt, record.folder / tracing.FOLDER)
        if config.trace.blocking:
            found["kernels"]["note"] = "a CPU runs one operator after the other: there is no launch to wait for"
    record.effective["traces"] = found


def traced_steps(config: LbiConfig, engine: Engine, prompt: list[int], folder: Path) -> dict[str, Any]:
    """The profiler's trace of `trace.tokens` decode steps, or of as many whole launches as have them."""
    launches = -(-config.trace.tokens // engine.tokens_at_once)
    tokens = steps_to_look_at(engine, launches, config.workload.new_tokens)
    return tracing.profile(engine, prompt, tokens, folder)
