"""How long a linear layer takes, run the way the cell will run it: launched, compiled, or replayed.

Weights must come from memory as they do in a decode step, so a pass goes through several
layers of one shape, more than a cache holds. Competing layers are timed in turn, round by
round, so that a drifting clock or a busy neighbour hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from lbi.config import CompilerConfig

PASS_BYTES = 512 << 20
"""Unquantized weights that one pass goes through, if the model has as many of the shape."""

ROUNDS = 9


def layers_in_a_pass(count: int, weight_bytes: int) -> int:
    """How many of `count` layers of `weight_bytes` each one pass takes."""
    return max(1, min(count, -(-PASS_BYTES // weight_bytes)))


class LayerPass:
    """One pass over `layers` with the same `inputs`, ready to be timed."""

    def __init__(self, layers: Sequence[Any], inputs: torch.Tensor, compiler: CompilerConfig) -> None:
        self.count, self.cuda = len(layers), inputs.device.type == "cuda"
        # A CUDA graph holds addresses and no references: what it reads must outlive it here.
        self._kept = (list(layers), inputs)
        calls = [_compiled(layer, compiler) for layer in layers]

        def run() -> None:
            for call in calls:
                call(inputs)

        self._run: Callable[[], None] = run
        with torch.no_grad():
            for _ in range(3):
                run()
            graphs = compiler.backend == "cudagraph" or compiler.mode in ("reduce-overhead", "max-autotune")
            if self.cuda and graphs:
                self._run = _graphed(run)

    def seconds(self) -> float:
        """Seconds a layer, of one pass."""
        with torch.no_grad():
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            self._run()
            if self.cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / self.count


def _compiled(layer: Any, compiler: CompilerConfig) -> Callable[[torch.Tensor], Any]:
    if compiler.backend != "inductor" and not compiler.linears:
        return layer  # type: ignore[no-any-return]
    from lbi.compilers import compile_function

    # The graph is made around the pass: inductor's own would copy inputs at every layer.
    if compiler.mode == "reduce-overhead":
        compiler = replace(compiler, mode="default")
    elif compiler.mode == "max-autotune":
        compiler = replace(compiler, mode="max-autotune-no-cudagraphs")
    return compile_function(layer.forward, compiler)


def _graphed(run: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay  # type: ignore[no-any-return]


def in_turn(passes: dict[str, LayerPass], rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Median seconds a layer of each pass, and half the distance between its quartiles."""
    samples: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, one in passes.items():
            samples[name].append(one.seconds())
    found = {}
    for name, values in samples.items():
        ordered = sorted(values)
        quarter = len(ordered) // 4
        found[name] = (median(ordered), (ordered[-1 - quarter] - ordered[quarter]) / 2)
    return found
