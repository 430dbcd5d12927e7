"""engine=fused: the loop around a Llama of our own (fused_llama.py), which decides what is captured and timed.

Like engine=loop it keeps every token on the device and waits for nothing between the first and the
last. Its kernels are its own, so there is nothing to compile: `compiler=eager` launches them one by
one, `cudagraph` replays a step, or `engine.tokens_per_graph` of them, as one CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.engines import Graphs
from lbi.engines.fused_llama import Llama
from lbi.engines.launching import LaunchingEngine, Steps
from lbi.engines.sampling import asks_what_was_seen, chooser, note_seen
from lbi.errors import InputError
from lbi.kernels.cache_formats import Rows

BUCKETS = (16, 32, 64, 128, 256)
"""Lengths that a short prompt is filled up to, so that its prefill is one CUDA graph: 6 tokens of an 8B model took
22 ms without, all of it launches. What stands behind a prompt is not seen by it, and what follows overwrites it."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The prefill of prompts up to one length: what it reads, and the graph, which gives the last one's logits."""

    ids: torch.Tensor
    last: torch.Tensor
    logits: GraphedCall


class FusedEngine(LaunchingEngine):
    """engine=fused. `model` is already quantized; `slots` is the length of the cache, in tokens.

    Raises `Unsupported` where the model or a layer of it cannot be read.
    """

    def __init__(self, model: Any, config: LbiConfig, slots: int) -> None:
        if config.cache.kind != "static":
            raise InputError("cache", config.cache.name, "moves its keys and values", "engine=fused needs cache=static")
        super().__init__(config, slots)
        self.llama = Llama(model, slots, config.cache)
        self._choose = chooser(config.decoding)
        sampled, penalized = config.decoding.kind == "sampling", asks_what_was_seen(config.decoding)
        vocabulary = (1, self.llama.head.rows)
        self._noise = torch.empty(vocabulary, device=self.llama.device) if sampled else None
        self._seen = torch.zeros(vocabulary, device=self.llama.device, dtype=torch.bool) if penalized else None
        self._buckets: dict[int, Bucket] = {}

    def compile(self) -> None:
        """See `Engine.compile`. Graphs are captured by the first call that needs them, before its timed region."""
        self._graphed = {}

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """See `Engine.forward`."""
        with torch.no_grad():
            return self.llama.logits(self.llama.prefill(torch.tensor(tokens, device=self.llama.device), keep=False))

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        found = super().graphs()
        return None if found is None else replace(found, prefills=len(self._buckets))

    def _expect(self, prompt_tokens: int) -> None:
        size = self._bucket_for(prompt_tokens)
        if self._graphed is None or size is None or size in self._buckets:
            return
        llama = self.llama
        ids, last = torch.zeros(size, dtype=torch.int64, device=llama.device), torch.zeros_like(llama.steps.tokens[:1])

        def logits() -> torch.Tensor:
            return llama.logits(llama.prefill(ids).index_select(0, last))

        self._buckets[size] = Bucket(ids, last, GraphedCall(logits, self._reset))

    def _bucket_for(self, prompt_tokens: int) -> int | None:
        """The smallest that the prompt and the cache have room for; None: the prefill is launched as it is."""
        return next((size for size in BUCKETS if prompt_tokens <= size <= self.slots), None)

    def _prompt_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, vocabulary) behind the prompt (tokens,), whose keys and values are in the cache then."""
        count = ids.shape[0]
        bucket = self._buckets.get(self._bucket_for(count) or 0)
        if bucket is None:
            return self.llama.logits(self.llama.prefill(ids)[-1:])
        bucket.ids[:count] = ids
        bucket.last.fill_(count - 1)
        found: torch.Tensor = bucket.logits()
        return found

    def _ready(self, counts: set[int]) -> dict[int, Steps]:
        steps: dict[int, Steps] = {count: partial(self._run, count) for count in counts}
        if self._graphed is None:
            return steps
        for count in sorted(counts - self._graphed.keys()):
            self._reset()
            self._graphed[count] = GraphedCall(steps[count], self._reset)
        return {count: self._graphed[count] for count in counts}

    def _reset(self) -> None:
        self.llama.steps.position.zero_()
        if self._seen is not None:
            self._seen.zero_()

    def _prefill(self, ids: torch.Tensor) -> torch.Tensor:
        llama, count = self.llama, ids.shape[0]
        logits = self._prompt_logits(ids)
        llama.steps.tokens[:count] = ids
        llama.steps.position.fill_(count - 1)
        if self._seen is not None:
            self._seen.zero_()
        note_seen(self._seen, ids)
        llama.steps.put(self._take(logits, None if self._noise is None else self._noise.exponential_()))
        return logits

    def _take(self, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        chosen = self._choose(logits, noise, self._seen)
        note_seen(self._seen, chosen)
        return chosen

    def _text(self) -> torch.Tensor:
        text: torch.Tensor = self.llama.steps.tokens
        return text[None]

    def _run(self, count: int) -> list[torch.Tensor]:
        """`count` decode steps; see `Steps`."""
        logits = []
        for turn in range(count):
            noise = None if self._noise is None else self._noise.exponential_()
            logits.append(self.llama.step(None if noise is None else self._take, noise, turn))
        return logits

    def _describe_cache(self) -> dict[str, Any]:
        return describe_slots(self.llama)


def describe_slots(llama: Llama) -> dict[str, Any]:
    """Class, slots, type and storage of the cache, and that a step reads it as far as the text has come."""
    slots = llama.shape.slots
    tensors = [part for layer in llama.layers for held in (layer.keys, layer.values) for part in parts_of(held)]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {
        "class": "FusedCache",
        "layer_class": "Layer",
        "dtype": str(tensors[0].dtype).removeprefix("torch.") if llama.cache is None else llama.cache.name,
        "slots": slots,
        "bytes": stored,
        "bytes_per_slot": stored // slots,
        "reads": "live",
    }


def parts_of(held: torch.Tensor | Rows) -> tuple[torch.Tensor, ...]:
    """The tensors of keys, or of values."""
    return held.tensors if isinstance(held, Rows) else (held,)
