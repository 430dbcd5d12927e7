"""engine=loop: a decode loop of our own over any causal LM of transformers.

generate() goes back to the host after each token: it asks whether all sequences are finished,
and prepares the next step's inputs in Python. Here a step is one function over tensors that
never move: forward pass, keys and values appended, choice of the token, and the token fed
back. So a whole step, or several, is one CUDA graph or one compiled graph, and from the first
token to the last the host waits for nothing.

Attention gets the mask that transformers makes for a static cache: on the device, from the
cache's own counter, once a step for all layers of a kind. No mask of padding is handed in, of which
the host would have to ask whether it hides anything.

EOS is not looked at: workloads ignore it (`Engine.generate`), and a look every n steps would
be a wait whose use no number of lbi could show.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedCall, require_device_counters
from lbi.engines import low_bit, sliding
from lbi.engines.cache import LoopCache, describe_cache
from lbi.engines.launching import LaunchingEngine, Steps
from lbi.engines.sampling import Choose, asks_what_was_seen, chooser, note_seen
from lbi.errors import InputError


@dataclass(frozen=True, slots=True)
class Buffers:
    """All that one step hands to the next. No tensor is ever replaced, for graphs hold their addresses.

    `token` (sequences, 1) is fed next, at `position` (1,), counted from 0. `tokens` (sequences, slots + 1) has every
    token at its position; the last one is never fed, so it may lie beyond the last slot. `text` (slots + 1,) is the
    first sequence's part of it, and all there is where drafts are verified. `noise`
    (1, vocabulary), float32, is drawn anew for each token; None where nothing is sampled. `seen`, bool of
    the same shape, marks the tokens so far; None where nothing depends on them.
    """

    cache: LoopCache
    token: torch.Tensor
    position: torch.Tensor
    tokens: torch.Tensor
    text: torch.Tensor
    noise: torch.Tensor | None
    seen: torch.Tensor | None

    def reset(self) -> None:
        """Back to before the first token."""
        self.cache.reset()
        self.position.zero_()
        if self.seen is not None:
            self.seen.zero_()

    def draw(self) -> None:
        """New noise for the next token."""
        if self.noise is not None:
            self.noise.exponential_()


class LoopEngine(LaunchingEngine):
    """engine=loop. `model` is already quantized; `slots` is the length of the cache, in tokens."""

    def __init__(self, model: Any, config: LbiConfig, slots: int) -> None:
        if config.cache.kind not in ("static", "sliding"):
            raise InputError("cache", config.cache.name, "moves its keys and values", "engine=loop needs cache=static")
        super().__init__(config, slots)
        self.model = model
        if config.cache.format:
            low_bit.use(model, config.cache.format, config.cache.group_size)
        if config.cache.window:
            sliding.use(model, config.cache.window, config.cache.sinks or 0)
        self._choose, self._names = chooser(config.decoding), takes(model)
        self._step = decode_step(model, self._choose, self._names)
        self._forward: Callable[..., Any] = model
        self._own: Buffers | None = None

    def compile(self) -> None:
        """See `Engine.compile`. CUDA graphs are captured by the first call that needs them, before its timed region."""
        from lbi.compilers import compile_function, compile_linears

        compiler = self.config.compiler
        if compiler.backend == "cudagraph":
            if compiler.linears:
                compile_linears(self.model, compiler)
            self._graphed = {}
            return
        self._step = compile_function(self._step, compiler)
        if compiler.prefill:
            self._forward = compile_function(self.model.forward, compiler)

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """See `Engine.forward`."""
        with torch.no_grad():
            output = self._forward(input_ids=torch.tensor([tokens], device=self.device), use_cache=False)
        return output.logits[0]  # type: ignore[no-any-return]

    def _ready(self, counts: set[int]) -> dict[int, Steps]:
        buffers = self._buffers()
        steps: dict[int, Steps] = {count: partial(self._run, count, buffers) for count in counts}
        if self._graphed is not None:
            require_device_counters(buffers.cache)
            for count in sorted(counts - self._graphed.keys()):
                buffers.reset()
                self._graphed[count] = GraphedCall(steps[count], buffers.reset)
            steps |= {count: self._graphed[count] for count in counts}
        buffers.reset()
        return steps

    def _reset(self) -> None:
        self._buffers().reset()

    def _buffers(self) -> Buffers:
        """The buffers, allocated when they are first asked for."""
        if self._own is None:
            self._own = self._allocate()
        return self._own

    def _text(self) -> torch.Tensor:
        return self._buffers().tokens

    def _describe_cache(self) -> dict[str, Any]:
        return describe_cache(self._buffers().cache)

    def _allocate(self) -> Buffers:
        cache = self._new_cache()
        count = self.config.workload.batch
        token = torch.zeros((count, 1), dtype=torch.long, device=self.device)
        position = torch.zeros(1, dtype=torch.long, device=self.device)
        tokens = torch.zeros((count, self.slots + 1), dtype=torch.long, device=self.device)
        text = tokens[0]
        # One token through the model allocates every layer's slots, which a compiled prefill must not do.
        logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].float()
        noise = torch.empty_like(logits) if self.config.decoding.kind == "sampling" else None
        seen = torch.zeros_like(logits, dtype=torch.bool) if asks_what_was_seen(self.config.decoding) else None
        for tensor in (token, position, tokens, text, noise, seen):
            if tensor is not None:
                # Without this inductor's own CUDA graphs (mode=reduce-overhead) refuse inputs that are written to.
                torch._dynamo.mark_static_address(tensor)
        return Buffers(cache, token, position, tokens, text, noise, seen)

    def _new_cache(self) -> LoopCache:
        kind, config = self.config.cache, self.model.config
        if kind.format:
            return low_bit.LowBitCache(config, self.slots, kind.format, kind.group_size)
        if kind.window:
            return sliding.SlidingCache(config, min(kind.window, self.slots), kind.sinks or 0)
        return LoopCache(config=config, max_cache_len=self.slots)

    def _prefill(self, ids: torch.Tensor) -> torch.Tensor:
        buffers, length = self._buffers(), ids.shape[0]
        buffers.cache.empty = True
        positions = torch.arange(length, device=self.device)[None]
        every = ids[None].repeat(buffers.token.shape[0], 1)
        logits = last_logits(self._forward, every, positions, buffers.cache, self._names)
        buffers.cache.empty = False
        buffers.position.fill_(length - 1)
        buffers.draw()
        note_seen(buffers.seen, ids)
        chosen = self._choose(logits, buffers.noise, buffers.seen)
        keep(chosen, buffers.token, buffers.position, buffers.tokens)
        note_seen(buffers.seen, chosen)
        return logits

    def _run(self, count: int, buffers: Buffers) -> list[torch.Tensor]:
        """`count` decode steps; see `Steps`."""
        logits = []
        for _ in range(count):
            buffers.draw()
            own = (buffers.token, buffers.position, buffers.tokens, buffers.noise, buffers.seen, buffers.cache)
            logits.append(self._step(*own))
        return logits


def decode_step(model: Any, choose: Choose, names: frozenset[str]) -> Callable[..., torch.Tensor]:
    """The decode step. All that it reads and writes are its arguments, so that a compiler sees them.

    `names` is what `takes` says of the model.
    """

    def step(
        token: torch.Tensor,
        position: torch.Tensor,
        tokens: torch.Tensor,
        noise: torch.Tensor | None,
        seen: torch.Tensor | None,
        cache: LoopCache,
    ) -> torch.Tensor:
        logits = last_logits(model, token, position[None], cache, names)
        chosen = choose(logits, noise, seen)
        keep(chosen, token, position, tokens)
        note_seen(seen, chosen)
        return logits

    return step


def last_logits(
    forward: Callable[..., Any], ids: torch.Tensor, positions: torch.Tensor, cache: LoopCache, names: frozenset[str]
) -> torch.Tensor:
    """Feed `ids` (sequences, n) at `positions` (1, n); the last ones' logits, (sequences, vocabulary), float32."""
    known: dict[str, Any] = {"position_ids": positions.expand(ids.shape[0], -1), "logits_to_keep": 1}
    given = {name: value for name, value in known.items() if name in names}
    logits: torch.Tensor = forward(input_ids=ids, past_key_values=cache, use_cache=True, **given).logits
    return logits[:, -1].float()


def keep(chosen: torch.Tensor, token: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> None:
    """Feed the tokens `chosen` (sequences,) next, and note them at their position."""
    token.copy_(chosen[:, None])
    position.add_(1)
    tokens.index_copy_(1, position, chosen[:, None])


def takes(model: Any) -> frozenset[str]:
    """Arguments of the model's forward. Without `position_ids` it asks the cache's counter."""
    return frozenset(signatures.signature(type(model).forward).parameters)
