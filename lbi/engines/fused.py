"""engine=fused: the loop around a Llama of our own (fused_llama.py), which decides what is captured and timed.

Like engine=loop it keeps every token on the device and waits for nothing between the first and the
last. Its kernels are its own, so there is nothing to compile: `compiler=eager` launches them one by
one, `cudagraph` replays a step, or `engine.tokens_per_graph` of them, as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.engines import Generation, Graphs, Mark
from lbi.engines.clock import Clock
from lbi.engines.fused_llama import Llama
from lbi.engines.sampling import asks_what_was_seen, chooser, note_seen
from lbi.errors import InputError
from lbi.kernels.cache_formats import Rows
from lbi.metrics import Timing

Steps = Callable[[], list[torch.Tensor]]
"""Runs some decode steps. Returns the logits of each, (1, vocabulary), float32, good until it is called again."""


class FusedEngine:
    """engine=fused. `model` is already quantized; `slots` is the length of the cache, in tokens.

    Raises `Unsupported` where the model or a layer of it cannot be read.
    """

    _ahead = 0
    """Slots beyond the text's last one that a step may write to."""

    def __init__(self, model: Any, config: LbiConfig, slots: int) -> None:
        if config.cache.kind != "static":
            raise InputError("cache", config.cache.name, "moves its keys and values", "engine=fused needs cache=static")
        self.config, self.slots, self.device = config, slots, config.engine.device
        self.llama = Llama(model, slots, config.cache)
        self.tokens_at_once = config.engine.tokens_per_graph
        self._choose = chooser(config.decoding)
        sampled, penalized = config.decoding.kind == "sampling", asks_what_was_seen(config.decoding)
        vocabulary = (1, self.llama.head.rows)
        self._noise = torch.empty(vocabulary, device=self.llama.device) if sampled else None
        self._seen = torch.zeros(vocabulary, device=self.llama.device, dtype=torch.bool) if penalized else None
        self._graphed: dict[int, GraphedCall] | None = None
        self._mark: Mark = lambda tokens: nullcontext()

    def compile(self) -> None:
        """See `Engine.compile`. Graphs are captured by the first call that needs them, before its timed region."""
        self._graphed = {}

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """See `Engine.generate`. A token's time is the end of the launch that made it."""
        self._check(prompt, new_tokens)
        whole, rest = divmod(new_tokens - 1, self.tokens_at_once)
        launches = [self.tokens_at_once] * whole + [rest] * (rest > 0)
        clock = Clock(self.device)
        with torch.no_grad():
            steps = self._ready(set(launches))
            ids = torch.tensor(prompt, device=self.llama.device)
            torch.manual_seed(seed)
            if self.device == "cuda":
                torch.cuda.synchronize()
            clock.mark()
            logits = [self._prefill(ids)]
            clock.mark()
            for count in launches:
                with self._mark(count):
                    found = steps[count]()
                clock.mark()
                if inspect:
                    logits += [one.to("cpu", copy=True) for one in found]
            clock.mark()
        start, *marks, end = clock.seconds()
        times = tuple(at for at, count in zip(marks, [1, *launches], strict=True) for _ in range(count))
        timing = Timing(start, times, end, len(prompt))
        tokens = self.llama.steps.tokens[len(prompt) : len(prompt) + new_tokens].tolist()
        if not inspect:
            return Generation(tokens, timing)
        return Generation(tokens, timing, torch.cat([one.cpu() for one in logits]), self._describe_cache())

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """See `Engine.forward`."""
        with torch.no_grad():
            return self.llama.logits(self.llama.prefill(torch.tensor(tokens, device=self.llama.device), keep=False))

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        if self._graphed is None:
            return None
        return Graphs(len(self._graphed), sum(graph.replays for graph in self._graphed.values()))

    @contextmanager
    def marking(self, mark: Mark) -> Iterator[None]:
        """See `Engine.marking`."""
        before, self._mark = self._mark, mark
        try:
            yield
        finally:
            self._mark = before

    def _check(self, prompt: list[int], new_tokens: int) -> None:
        """Refuse what would write beyond a tensor's end: on a GPU that ends the process, not the call."""
        if not prompt:
            raise InputError("workload.prompt", None, "has no tokens", "Give a text of at least one token")
        if new_tokens < 1:
            raise InputError("workload.new_tokens", new_tokens, "must be at least 1")
        needed = len(prompt) + new_tokens - 1 + self._ahead
        if self.slots < needed:
            raise InputError(
                "cache.max_len",
                self.slots,
                f"is too short for a prompt of {len(prompt)} and {new_tokens} new tokens",
                f"Set it to {needed} or more, or to null for what the workload needs",
            )

    def _ready(self, counts: set[int]) -> dict[int, Steps]:
        """What runs each number of steps. Captures the graphs that are not there yet."""
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
        """Feed the prompt (tokens,) and choose the first new token; its logits, (1, vocabulary)."""
        llama, count = self.llama, ids.shape[0]
        logits = llama.logits(llama.prefill(ids)[-1:])
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

    def _run(self, count: int) -> list[torch.Tensor]:
        """`count` decode steps; see `Steps`."""
        logits = []
        for turn in range(count):
            noise = None if self._noise is None else self._noise.exponential_()
            logits.append(self.llama.step(None if noise is None else self._take, noise, turn))
        return logits

    def _describe_cache(self) -> dict[str, Any]:
        """Class, slots, type and storage of the cache, and that a step reads it as far as the text has come."""
        layers, slots = self.llama.layers, self.llama.shape.slots
        tensors = [part for layer in layers for held in (layer.keys, layer.values) for part in parts_of(held)]
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return {
            "class": "FusedCache",
            "layer_class": "Layer",
            "dtype": self.config.cache.format or str(tensors[0].dtype).removeprefix("torch."),
            "slots": slots,
            "bytes": stored,
            "bytes_per_slot": stored // slots,
            "reads": "live",
        }


def parts_of(held: torch.Tensor | Rows) -> tuple[torch.Tensor, ...]:
    """The tensors of keys, or of values."""
    return held.tensors if isinstance(held, Rows) else (held,)
