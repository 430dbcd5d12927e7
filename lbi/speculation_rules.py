"""Which knobs each kind of speculative decoding reads, and what it cannot be combined with; without torch."""

from __future__ import annotations

from collections.abc import Mapping

from lbi.config import DecodingConfig, LbiConfig
from lbi.model_files import ModelFacts

GRAMMAR_KNOBS = frozenset({"grammar", "grammar_kind", "fast_forward", "draft_tokens"})
"""Knobs of decoding that structured decoding reads besides."""

DRAFT_KNOBS = (
    *("draft_tokens", "adaptive", "ngram", "draft", "draft_quantizer", "draft_layers"),
    *("grammar", "grammar_kind", "fast_forward"),
)
READ_BY: Mapping[str | None, frozenset[str]] = {
    None: frozenset(),
    "lookup": frozenset({"draft_tokens", "adaptive", "ngram"}),
    "draft": frozenset({"draft_tokens", "adaptive", "draft", "draft_quantizer"}),
    "self": frozenset({"draft_tokens", "adaptive", "draft_quantizer", "draft_layers"}),
}
"""Knobs of decoding that each kind of speculation reads."""


def knobs_read(decoding: DecodingConfig) -> frozenset[str]:
    """Knobs that these kinds of speculation and structure read."""
    is_structured = decoding.grammar_kind is not None
    return READ_BY[decoding.speculative] | (GRAMMAR_KNOBS if is_structured else frozenset())


def unread(decoding: DecodingConfig) -> str | None:
    """Why a knob that is set would change nothing."""
    for name in DRAFT_KNOBS:
        if name not in knobs_read(decoding) and getattr(decoding, name) not in (None, False):
            return f"decoding.{name} is not read by {decoding.name}"
    return None


def incomplete(decoding: DecodingConfig, facts: ModelFacts) -> str | None:
    """What is missing for drafts to be made."""
    needed = knobs_read(decoding) & {"draft_tokens", "ngram", "draft", "grammar"}
    missing = [name for name in DRAFT_KNOBS if name in needed and getattr(decoding, name) is None]
    if missing:
        return f"{decoding.name} needs decoding.{missing[0]}"
    if decoding.speculative == "self" and decoding.draft_quantizer is None and decoding.draft_layers is None:
        return f"{decoding.name} would draft with the model itself: set decoding.draft_quantizer or draft_layers"
    layers = (facts.arch or {}).get("num_hidden_layers")
    if layers and decoding.draft_layers and decoding.draft_layers >= layers:
        return f"decoding.draft_layers={decoding.draft_layers} is not fewer than the model's {layers}"
    return None


def impossible(config: LbiConfig, facts: ModelFacts) -> str | None:
    """Why this engine or this model cannot verify drafts, or follow a grammar."""
    if config.decoding.speculative is None and config.decoding.grammar_kind is None:
        return None
    if config.decoding.grammar_kind is not None:
        if config.engine.kind == "hf":
            return f"{config.decoding.name} masks what lbi's own loops choose from: use engine=loop with cache=static"
        if config.decoding.speculative not in (None, "lookup"):
            return f"a grammar goes together with speculative=lookup, not with {config.decoding.speculative}"
        if config.model.source == "random":
            return "random weights have no tokenizer, and a grammar is about text"
    if config.engine.kind == "hf":
        return f"{config.decoding.name} is verified by the loop of lbi's own: use engine=loop with cache=static"
    if config.cache.kind == "sliding":
        return "a ring of slots has written over older tokens when drafts are dropped from it: use cache=static"
    if config.cache.format is not None and config.compiler.backend == "cudagraph":
        return (
            "attention of several tokens over a low-bit cache waits for the device: use compiler=eager or cache=static"
        )
    if config.engine.tokens_per_graph > 1:
        return "engine.tokens_per_graph is for one token after the other; a verification is a graph of its own"
    arch = facts.arch or {}
    if arch.get("sliding_window") and arch.get("use_sliding_window", True):
        return "a sliding window has written over older tokens when drafts are dropped from it: use decoding=greedy"
    return None
