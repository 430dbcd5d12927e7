"""What engine=loop and engine=fused have in common: steps are launched one after the other, and nothing waits.

From the first token to the last the host only launches and notes moments of the device; what it
launches, and from which memory, is each engine's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall
from lbi.engines import Generation, Graphs, Mark
from lbi.engines.clock import Clock
from lbi.errors import InputError
from lbi.metrics import Timing

Steps = Callable[[], list[torch.Tensor]]
"""Runs some decode steps. Returns the logits of each, (sequences, vocabulary) float32, good until called again."""


class LaunchingEngine(ABC):
    """An `Engine` for all but `compile` and `forward`. `slots` is the length of the cache, in tokens."""

    _ahead = 0
    """Slots beyond the text's last one that a step may write to."""

    def __init__(self, config: LbiConfig, slots: int) -> None:
        self.config, self.slots, self.device = config, slots, config.engine.device
        self.tokens_at_once = config.engine.tokens_per_graph
        self._graphed: dict[int, GraphedCall] | None = None
        self._mark: Mark = lambda tokens: nullcontext()

    @abstractmethod
    def _ready(self, counts: set[int]) -> dict[int, Steps]:
        """What runs each number of steps, on empty buffers. Captures the graphs that are not there yet."""

    def _expect(self, prompt_tokens: int) -> None:  # noqa: B027 (an engine need not prepare for a prompt)
        """Called before the timed region with the length of the prompt that comes next."""

    @abstractmethod
    def _reset(self) -> None:
        """Back to before the first token."""

    @abstractmethod
    def _prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed the prompt (tokens,) and choose the first new token; its logits, (sequences, vocabulary)."""

    @abstractmethod
    def _text(self) -> torch.Tensor:
        """The tokens so far of each sequence, (sequences, positions), each at its position, prompt and all."""

    @abstractmethod
    def _describe_cache(self) -> dict[str, Any]:
        """See `Generation.cache`."""

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """See `Engine.generate`. A token's time is the end of the launch that made it."""
        self._check(prompt, new_tokens)
        whole, rest = divmod(new_tokens - 1, self.tokens_at_once)
        launches = [self.tokens_at_once] * whole + [rest] * (rest > 0)
        clock = Clock(self.device)
        with torch.no_grad():
            steps = self._ready(set(launches))
            self._expect(len(prompt))
            ids = torch.tensor(prompt, device=self.device)
            torch.manual_seed(seed)
            if self.device == "cuda":
                torch.cuda.synchronize()
            clock.mark()
            logits = [self._prefill(ids)[:1]]
            clock.mark()
            for count in launches:
                with self._mark(count):
                    found = steps[count]()
                clock.mark()
                if inspect:
                    logits += [one[:1].to("cpu", copy=True) for one in found]
            clock.mark()
        start, *marks, end = clock.seconds()
        times = tuple(at for at, count in zip(marks, [1, *launches], strict=True) for _ in range(count))
        texts = self._text()[:, len(prompt) : len(prompt) + new_tokens].tolist()
        timing, batch = Timing(start, times, end, len(prompt), len(texts)), tuple(texts) if len(texts) > 1 else ()
        if not inspect:
            return Generation(texts[0], timing, batch=batch)
        kept = torch.cat([one.cpu() for one in logits])
        return Generation(texts[0], timing, kept, self._describe_cache(), batch=batch)

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
