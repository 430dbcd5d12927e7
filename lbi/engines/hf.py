"""transformers' generate(), as a user would call it.

Compilation is ours, not generate's: its automatic compilation starts by itself for
a static cache on CUDA and is skipped without an error on a CPU, so it is switched
off and the decode step is compiled here, from the compiler group alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from lbi.config import LbiConfig
from lbi.cuda_graphs import GraphedForward
from lbi.engines import Generation, Graphs, Mark
from lbi.engines.cache import CHUNK, describe_cache, quantized_cache
from lbi.engines.clock import Clock
from lbi.metrics import Timing


class TokenClock(LogitsProcessor):  # type: ignore[misc]
    """Notes when the logits of each new token are there."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.clock.mark()
        return scores


class LogitsKeeper(LogitsProcessor):  # type: ignore[misc]
    """Keeps each step's logits before any sampling rule changes them."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.kept.append(scores[0].float().cpu())
        return scores


class HfEngine:
    """engine=hf. `model` is already quantized; `slots` is the length of a static cache, in tokens."""

    tokens_at_once = 1

    def __init__(self, model: Any, config: LbiConfig, slots: int) -> None:
        self.model, self.config, self.slots = model, config, slots
        self.device = config.engine.device
        self.graphed: GraphedForward | None = None
        self._own_cache: StaticCache | None = None
        # generate() fills what is unset in its config from the model's own: EOS must not come back that way.
        model.generation_config = GenerationConfig(pad_token_id=0)

    def compile(self) -> None:
        """Replace the model's forward by its compiled form for the decode step (and the prefill, if asked)."""
        from lbi.compilers import compile_function, compile_linears

        plain = self.model.forward
        if self.config.compiler.backend == "cudagraph":
            if self.config.compiler.linears:
                compile_linears(self.model, self.config.compiler)
            self.graphed = GraphedForward(plain)
            compiled: Any = self.graphed
        else:
            compiled = compile_function(plain, self.config.compiler)
        prefill = compiled if self.config.compiler.prefill else plain

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = kwargs.get("input_ids", args[0] if args else None)
            return (compiled if tokens is not None and tokens.shape[1] == 1 else prefill)(*args, **kwargs)

        self.model.forward = forward

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """See `Engine.generate`."""
        ids = torch.tensor([prompt], device=self.device)
        clock, keeper = Clock(self.device), LogitsKeeper()
        processors = LogitsProcessorList([keeper, TokenClock(clock)] if inspect else [TokenClock(clock)])
        settings = self._settings(new_tokens, inspect)
        given = self._given_cache()
        torch.manual_seed(seed)
        with torch.no_grad():
            if self.device == "cuda":
                torch.cuda.synchronize()
            clock.mark()
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=processors,
                **given,
            )
            clock.mark()
        start, *tokens, end = clock.seconds()
        timing = Timing(start, tuple(tokens), end, len(prompt))
        if not inspect:
            return Generation(output[0, len(prompt) :].tolist(), timing)
        return Generation(
            output.sequences[0, len(prompt) :].tolist(),
            timing,
            torch.stack(keeper.kept),
            describe_cache(output.past_key_values),
        )

    def _given_cache(self) -> dict[str, Any]:
        """The cache that generate() is handed, where it does not make its own."""
        if self.config.cache.kind == "hf_quantized":
            return {"past_key_values": quantized_cache(self.config.cache, self.model.config)}
        return {} if self.graphed is None else {"past_key_values": self._same_cache()}

    def _same_cache(self) -> StaticCache:
        """One static cache for all calls: generate() makes a new one for each, and a graph knows one by its address."""
        if self._own_cache is None:
            self._own_cache = StaticCache(config=self.model.config, max_cache_len=self.slots)
        self._own_cache.reset()
        return self._own_cache

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """See `Engine.forward`."""
        ids = torch.tensor([tokens], device=self.device)
        with torch.no_grad():
            if self.config.cache.kind == "hf_quantized":
                return self._through_the_cache(ids)
            return self.model(ids, use_cache=False).logits[0]  # type: ignore[no-any-return]

    def _through_the_cache(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of a text that the low-bit cache gets piece by piece.

        A QuantizedCache gives its first tokens back as they came, quantizes them, and from then on whenever
        `residual` tokens have come. So a piece of that many sees what its tokens would see one at a time
        after a prompt that ends where the piece begins: everything before it as quantized, itself as it is.
        """
        cache = quantized_cache(self.config.cache, self.model.config)
        pieces = ids.split(self.config.cache.residual or CHUNK, dim=1)
        return torch.cat([self.model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces])

    def graphs(self) -> Graphs | None:
        """See `Engine.graphs`."""
        return None if self.graphed is None else Graphs(self.graphed.graphs, self.graphed.replays)

    @contextmanager
    def marking(self, mark: Mark) -> Iterator[None]:
        """See `Engine.marking`. Every forward pass but the first, which is the prefill, is a decode step."""
        plain, calls = self.model.forward, 0

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return plain(*args, **kwargs)
            with mark(1):
                return plain(*args, **kwargs)

        # Where compile() has put a compiled forward, it must be there again afterwards.
        own = self.model.__dict__.get("forward")
        self.model.forward = forward
        try:
            yield
        finally:
            del self.model.forward
            if own is not None:
                self.model.forward = own

    def _settings(self, new_tokens: int, inspect: bool) -> GenerationConfig:
        decoding, cache = self.config.decoding, self.config.cache
        sampling: dict[str, Any] = {"do_sample": False}
        if decoding.kind == "sampling":
            sampling = {
                "do_sample": True,
                "temperature": decoding.temperature,
                # 0 and 1.0 switch the two filters off; unset, generate() would apply its own.
                "top_k": decoding.top_k or 0,
                "top_p": decoding.top_p or 1.0,
                "min_p": decoding.min_p,
                "repetition_penalty": decoding.repetition_penalty or 1.0,
            }
        static: dict[str, Any] = {}
        if cache.kind in ("static", "offloaded_static") and self.graphed is None:
            static = {"cache_implementation": cache.kind, "max_cache_len": self.slots}
        elif cache.kind == "offloaded":
            static = {"cache_implementation": cache.kind}
        return GenerationConfig(
            max_new_tokens=new_tokens,
            pad_token_id=0,
            use_cache=True,
            disable_compile=True,
            return_dict_in_generate=inspect,
            **sampling,
            **static,
        )
