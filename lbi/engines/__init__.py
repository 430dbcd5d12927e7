"""Engines: what turns a prompt into tokens.

Every engine has the methods of `Engine`; a run knows nothing else about it, and gets its
own from `make`. Nothing heavy is imported here: `make` imports the engine it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lbi.config import EngineConfig, LbiConfig
from lbi.errors import Unsupported
from lbi.metrics import Speculation, Timing

Mark = Callable[[int], AbstractContextManager[Any]]
"""Makes what surrounds a launch of decode steps; it is told the number of tokens that the launch makes."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out of one call. `logits` is (new tokens, vocabulary), float32, if asked for."""

    tokens: list[int]
    timing: Timing
    logits: Any = None
    cache: dict[str, Any] = field(default_factory=dict)
    speculation: Speculation | None = None
    finished: bool = False
    """The text came to its own end before `new_tokens`."""
    batch: tuple[list[int], ...] = ()
    """The tokens of each sequence of a batch, of which `tokens` and `logits` are the first's; empty without one."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """CUDA graphs of an engine: those captured for decoding, replays of all of them, and those captured for prompts."""

    captured: int
    replays: int
    prefills: int = 0


class Engine(Protocol):
    """Generates with the cell's compiler, cache and decoding."""

    tokens_at_once: int
    """Tokens that one launch makes; the times of all of them are the launch's end."""

    def compile(self) -> None:
        """Have the decode step (and the prefill, if asked) compiled or captured as the compiler group says."""

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """`new_tokens` tokens after `prompt`, EOS ignored.

        With `inspect`, logits and a description of the cache come back too; such a call
        is never timed.
        """

    def forward(self, tokens: list[int]) -> Any:
        """Logits (len(tokens), vocabulary) of one teacher-forced pass, as the engine's prefill computes them."""

    def graphs(self) -> Graphs | None:
        """CUDA graphs so far; None where the compiler is not asked for any."""

    def marking(self, mark: Mark) -> AbstractContextManager[None]:
        """While it is open, each launch of decode steps happens inside a `mark(tokens)`; the prefill does not."""


def make(config: LbiConfig, model: Any, slots: int, draft: Any = None, tokenizer: Any = None) -> Engine:
    """The engine of a cell. `model` is already quantized; `slots` is the length of a static cache, in tokens.

    `draft` is the `Draft` of speculative decoding by a model, `tokenizer` what structured decoding needs. Raises
    `Unsupported` for a batch that the cell's engine, decoding or cache has no room for.
    """
    why = batch_problem(config)
    if why is not None:
        raise Unsupported(why)
    if config.engine.kind == "loop" and config.decoding.grammar is not None:
        from lbi.engines.loop_structured import StructuredLoop

        return StructuredLoop(model, config, slots, tokenizer)
    if config.engine.kind == "loop" and config.decoding.speculative is not None:
        from lbi.engines.loop_speculative import SpeculativeLoop

        return SpeculativeLoop(model, config, slots, draft)
    if config.engine.kind == "loop":
        from lbi.engines.loop import LoopEngine

        return LoopEngine(model, config, slots)
    if config.engine.kind == "fused" and config.decoding.grammar is not None:
        from lbi.engines.fused_structured import StructuredFused

        return StructuredFused(model, config, slots, tokenizer)
    if config.engine.kind == "fused" and config.decoding.speculative is not None:
        from lbi.engines.fused_speculative import SpeculativeFused

        return SpeculativeFused(model, config, slots, draft)
    if config.engine.kind == "fused":
        from lbi.engines.fused import FusedEngine

        return FusedEngine(model, config, slots)
    from lbi.engines.hf import HfEngine

    return HfEngine(model, config, slots)


def batch_problem(config: LbiConfig) -> str | None:
    """Why a cell cannot decode several sequences at once; None if it can, or has only one."""
    if config.workload.batch == 1:
        return None
    if config.engine.kind != "loop":
        return f"engine={config.engine.kind} decodes one sequence: use engine=loop, or workload.batch=1"
    decoding, cache = config.decoding, config.cache
    if decoding.kind != "greedy" or decoding.speculative is not None or decoding.grammar is not None:
        return f"{decoding.name} is for one sequence: use decoding=greedy, or workload.batch=1"
    if cache.kind != "static" or cache.format is not None:
        return f"cache={cache.name} holds one sequence: use cache=static, or workload.batch=1"
    return None


def plain_engine(engine: EngineConfig) -> EngineConfig:
    """transformers' generate() on the same device: what the others are compared with."""
    return replace(engine, name="hf", kind="hf", tokens_per_graph=1)


def steps_to_look_at(engine: Engine, launches: int, new_tokens: int) -> int:
    """Decode steps of `launches` launches, at most those of `new_tokens` tokens.

    Whole launches, or all of the workload's: an engine has captured graphs for no other number of steps.
    """
    return min(launches * engine.tokens_at_once, new_tokens - 1)
