"""Knobs that nothing reads, and those without which something is not said; see rules.py."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from lbi import speculation_rules, structured
from lbi.config import CacheConfig, LbiConfig, QuantizerConfig
from lbi.model_files import ModelFacts
from lbi.quantizers import method
from lbi.rule_table import Machine, rule


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
