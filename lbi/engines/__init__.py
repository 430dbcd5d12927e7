"""Engines: what turns a prompt into tokens.

Every engine has the methods of `Engine`; a run knows nothing else about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from lbi.metrics import Timing


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out of one call. `logits` is (new tokens, vocabulary), float32, if asked for."""

    tokens: list[int]
    timing: Timing
    logits: Any = None
    cache: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Generates with the cell's compiler, cache and decoding."""

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        """`new_tokens` tokens after `prompt`, EOS ignored.

        With `inspect`, logits and a description of the cache come back too; such a call
        is never timed.
        """

    def forward(self, tokens: list[int]) -> Any:
        """Logits (len(tokens), vocabulary) of one teacher-forced pass, as the engine's prefill computes them."""
