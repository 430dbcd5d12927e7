"""Which cells share a compiled graph, and which may use one as it lies in the memory of their process.

The key groups and names: cells with one key follow each other in a unit, and a graph's files in the
store lie under its key. What inductor really reuses is decided by its own keys, over the code itself;
so two graphs under one key cost a compile, never a wrong number. Versions and the device are in the
env_id, which every use of the key stands beside.
"""

from __future__ import annotations

import json
from typing import Any

from lbi.config import LbiConfig
from lbi.identity import (
    canonical,
    canonical_cache,
    canonical_decoding,
    canonical_engine,
    canonical_quantizer,
    digest,
)
from lbi.typed import plain


def graph_key(config: LbiConfig) -> str | None:
    """12 hex digits that name the graph of a cell's decode step; None where inductor compiles nothing."""
    compiler = config.compiler
    if compiler.backend != "inductor" and not compiler.linears:
        return None
    key: dict[str, Any] = {
        "model": _architecture(config),
        "quantizer": canonical_quantizer(config.quantizer),
        "compiler": canonical(plain(compiler)),
        "engine": canonical_engine(config.engine),
    }
    if compiler.linears:
        # A linear layer for one token knows neither the cache nor what becomes of its output.
        return digest("graph", key)
    key["cache"] = canonical_cache(config.cache)
    key["slots"] = _slots(config)
    key["batch"] = config.workload.batch
    decoding = config.decoding
    if config.engine.kind != "hf" or decoding.speculative or decoding.grammar:
        # generate() chooses the token outside of the model's forward pass; the loop's step has it in the graph.
        key["decoding"] = canonical_decoding(decoding)
    return digest("graph", key)


def held_key(config: LbiConfig) -> str | None:
    """12 hex digits that runs of one process have in common of which the second needs not compile; None for others.

    They differ in how generate() chooses tokens, and in nothing that the graph sees: other shapes would be compiled
    to a graph for any of them, which a run of its own would not have had. A prefill that is compiled has seen the
    quality's text, and CUDA graphs keep memory that would be another run's.
    """
    compiler = config.compiler
    graphed = compiler.mode in ("reduce-overhead", "max-autotune") or "cudagraph" in json.dumps(plain(compiler.options))
    if compiler.backend != "inductor" or compiler.prefill or graphed or config.engine.kind != "hf":
        return None
    if config.resources.compile_cache == "off":
        return None
    return digest("held", {"graph": graph_key(config), "workload": canonical(plain(config.workload))})


def _architecture(config: LbiConfig) -> str:
    """Shapes and type of the weights, where they are known; else the weights' own name."""
    model = config.model
    known = model.arch or {"source": model.source, "path": model.path, "revision": model.revision}
    return json.dumps({"dtype": model.dtype, "arch": known}, sort_keys=True)


def _slots(config: LbiConfig) -> Any:
    """What decides the cache's length, which is a shape of the graph; nothing for one that grows."""
    if config.cache.kind in ("dynamic", "offloaded", "hf_quantized"):
        return None
    if config.cache.max_len is not None:
        return config.cache.max_len
    workload = config.workload
    prompt = workload.prompt_tokens or workload.prompt
    return [prompt, workload.new_tokens, config.decoding.draft_tokens or 0]
