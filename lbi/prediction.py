"""What the memory allows each option before anything runs: bytes per token, and the speed that they bound.

Bytes are read from real tensors: a few rows of each of the model's shapes are stored as the option says, and a row's
bytes are those of every other row. The speed is bandwidth over bytes, which no cell without drafts exceeds, all
sequences of a batch together; how near one comes is its MBU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lbi.config import LbiConfig, QuantizerConfig
from lbi.errors import RunFailure
from lbi.model_files import ModelFacts
from lbi.quantizers.options import PLAIN, layer_config

ROWS = 256
"""Rows that are stored to learn a row's bytes: a multiple of what any layout packs together."""

DECIDED_LATER = {
    "autoquant": "chooses while it runs",
    "custom": "is a function of yours",
    "checkpoint": "is what the checkpoint holds",
    "ternary": "needs an index that depends on the weights",
}
"""Families whose bytes are not known from the config."""

BLOCKS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bound:
    """An option's bytes per token, or None and why they are not known."""

    option: str
    bytes_per_token: float | None
    why: str = ""


def bound(option: str, config: LbiConfig, facts: ModelFacts, refused: str | None) -> Bound:
    """The bytes that a decode step of the config reads, with a cache that is read as far as the text has come."""
    if refused is not None:
        return Bound(option, None, refused)
    later = next((why for family, why in DECIDED_LATER.items() if config.quantizer.family == family), None)
    if later:
        return Bound(option, None, later)
    if not facts.matrices():
        return Bound(option, None, "the model's shapes are not known before it is loaded")
    if config.workload.prompt_tokens is None:
        return Bound(option, None, "the prompt's length is not known: set workload.prompt_tokens")
    try:
        return Bound(option, _weights(config, facts) + _cache(config, facts))
    except (RunFailure, RuntimeError, NotImplementedError, AssertionError) as error:
        return Bound(option, None, (str(error).strip().splitlines() or [type(error).__name__])[0])


def _weights(config: LbiConfig, facts: ModelFacts) -> float:
    arch = dict(facts.arch or {})
    hidden, vocabulary, layers = (int(arch[name]) for name in ("hidden_size", "vocab_size", "num_hidden_layers"))
    item = 4 if config.model.dtype == "float32" else 2
    total, row = 0.0, 0.0
    for name, (inputs, outputs) in facts.matrices().items():
        for index in range(layers):
            part = layer_config(f"model.layers.{index}.{BLOCKS[name]}.{name}", config.quantizer)
            total += outputs * _row_bytes(part, inputs, config.model.dtype, config.engine.device)
    head = layer_config("lm_head", config.quantizer)
    total += vocabulary * _row_bytes(head, hidden, config.model.dtype, config.engine.device)
    if not arch.get("tie_word_embeddings") or head != PLAIN:
        # One row of the table of embeddings, which the head is not.
        row = hidden * (1 if config.quantizer.embeddings == "int8" else item)
    norms = (2 * layers + 1) * hidden * item
    # A batch reads the weights once for all of its sequences, and a row of the table for each.
    return (total + norms) / config.workload.batch + row


def _cache(config: LbiConfig, facts: ModelFacts) -> float:
    """Keys and values at half of the new tokens, in the model's type."""
    arch = dict(facts.arch or {})
    keys = facts.matrices()["k_proj"][1]
    item = 4 if config.model.dtype == "float32" else 2
    depth = (config.workload.prompt_tokens or 0) + config.workload.new_tokens / 2
    return 2.0 * int(arch["num_hidden_layers"]) * keys * item * depth


_KNOWN: dict[tuple[str, int, str, str], float] = {}
"""Bytes of a row by option, inputs, type and device: all layers of one shape are alike."""


def _row_bytes(config: QuantizerConfig, inputs: int, dtype: str, device: str) -> float:
    """Bytes of one row of `inputs` weights, from `ROWS` rows stored as the config says."""
    key = (repr(config), inputs, dtype, device)
    if key not in _KNOWN:
        _KNOWN[key] = _stored(config, inputs, dtype, device) / ROWS
    return _KNOWN[key]


def _stored(config: QuantizerConfig, inputs: int, dtype: str, device: str) -> int:
    import torch

    from lbi.quantizers import assign, audit

    holder: Any = torch.nn.ModuleDict()
    holder["layer"] = torch.nn.Linear(inputs, ROWS, bias=False, dtype=getattr(torch, dtype), device=device)
    holder.requires_grad_(False)
    assign.apply(holder, {"layer": config})
    (found,) = audit.read_layers(holder, frozenset({"layer"}))
    return found.stored_bytes


def table(bounds: list[Bound], bandwidths: dict[str, float]) -> Iterator[str]:
    """A line an option, fewest bytes first, with the speed that each bandwidth (bytes a second, by name) allows."""
    known = sorted((one for one in bounds if one.bytes_per_token), key=lambda one: one.bytes_per_token or 0.0)
    width = max(len(one.option) for one in bounds) + 2
    heads = "".join(f"{name:>22}" for name in bandwidths)
    yield f"{'quantizer':<{width}}{'MB / token':>12}{heads}"
    for one in known:
        read = one.bytes_per_token or 1.0
        speeds = "".join(f"{rate / read:>14,.0f} tok/s  " for rate in bandwidths.values())
        yield f"{one.option:<{width}}{read / 1e6:>12,.2f}{speeds}".rstrip()
    rest = [one for one in bounds if not one.bytes_per_token]
    if rest:
        yield ""
        yield "Not predicted:"
    for one in rest:
        yield f"{one.option:<{width}}{one.why}"
