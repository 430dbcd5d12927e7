"""Has an autotuner of Triton compile its candidates on all cores before it times them.

It would compile each when its turn comes to be timed: on one core, with the GPU idle meanwhile. GemLite tunes a
kernel for every shape and number of rows, four and two in a Llama, of up to 22 candidates; on an H200's slow host that
were 77 to 193 of the 135 to 285 s of a cell. What is timed, and how, stays as it is.
Written against Triton 3.6 and 3.9: the method that this stands in for is no interface of Triton's.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

MOST_THREADS = 16
"""Compiling takes a few hundred MB a thread, and Triton's own part of it is Python's, one thread at a time."""


def compile_candidates_ahead() -> None:
    """From here on, for the whole process, and once: the second call changes nothing."""
    from triton.runtime.autotuner import Autotuner

    if not hasattr(Autotuner.prune_configs, "timed_next"):
        Autotuner.prune_configs = _compiling(Autotuner.prune_configs)


def _compiling(prune: Any) -> Any:
    """`Autotuner.prune_configs`, which says what is timed next, and is asked for nothing else but by `warmup`."""

    def pruned(tuner: Any, named: dict[str, Any]) -> Any:
        found = prune(tuner, named)
        _compile(tuner, named, found)
        return found

    pruned.timed_next = prune  # type: ignore[attr-defined]
    return pruned


def _compile(tuner: Any, named: dict[str, Any], candidates: list[Any]) -> None:
    """Compile all of them, as their launches would; what one fails with is said when it is timed."""
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)), len(candidates))
    if threads < 2 or active_mode.get() is not None:
        return
    given = {name: value for name, value in named.items() if name != "warmup"}
    with ThreadPoolExecutor(threads, "candidate") as pool, AsyncCompileMode(pool, ignore_errors=True):
        for candidate in candidates:
            # The timing meets it again, and knows which errors rule a candidate out.
            with suppress(Exception):
                tuner.fn.warmup(*tuner.nargs.values(), **given | candidate.all_kwargs())
