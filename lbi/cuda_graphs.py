"""A decode step as one CUDA graph: the kernels that eager mode would launch, in one launch.

At batch 1 the launches of a decode step, some 400 for 32 layers, cost more than its kernels.
A graph keeps the kernels and drops the launches, without a compiler: it is captured in a
second where inductor takes a minute, and what it replays is what each library brought.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lbi.errors import Unsupported

WARM_UPS = 3
"""Calls before capturing: libraries allocate workspaces and tune their kernels in the first ones."""


@dataclass(slots=True)
class _Captured:
    graph: Any
    inputs: dict[str, torch.Tensor]
    output: Any


class GraphedForward:
    """A model's forward for one token and a static cache; captured per cache at its first call.

    `forward` is called with keyword arguments. Those that are tensors on the GPU are copied
    into the graph's own before each replay; all others, and the cache, must not change.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.replays = 0
        self._captured: dict[Any, _Captured] = {}

    @property
    def graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._captured)

    def __call__(self, **arguments: Any) -> Any:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        cache = arguments["past_key_values"]
        key = (cache.layers[0].keys.data_ptr(), *((name, *value.shape) for name, value in sorted(tensors.items())))
        if key not in self._captured:
            self._captured[key] = self._capture(arguments, tensors, cache)
        captured = self._captured[key]
        for name, value in tensors.items():
            captured.inputs[name].copy_(value)
        captured.graph.replay()
        self.replays += 1
        return captured.output

    def _capture(self, arguments: dict[str, Any], tensors: dict[str, torch.Tensor], cache: Any) -> _Captured:
        require_device_counters(cache)
        inputs = {name: value.clone() for name, value in tensors.items()}
        own = {**arguments, **inputs}
        # A step moves the cache's write position on; warming up and capturing must leave it where it is.
        positions = [layer.cumulative_length for layer in cache.layers]
        before = [position.clone() for position in positions]

        def restore() -> None:
            for position, value in zip(positions, before, strict=True):
                position.copy_(value)

        graph, output = record(lambda: self.forward(**own), restore)
        return _Captured(graph, inputs, output)


class GraphedCall:
    """A call without arguments that works on tensors which never move; captured at once.

    `restore` puts back what a call moves on. What the call returns lies in the graph's own
    memory, and each replay overwrites it.
    """

    def __init__(self, call: Callable[[], Any], restore: Callable[[], None]) -> None:
        self.replays = 0
        self._graph, self._output = record(call, restore)

    def __call__(self) -> Any:
        self._graph.replay()
        self.replays += 1
        return self._output


def record(call: Callable[[], Any], restore: Callable[[], None]) -> tuple[Any, Any]:
    """A CUDA graph of `call`, and what the call returned while it was recorded.

    Random numbers that are drawn inside come from the default generator, which torch
    registers with every graph: a replay draws new ones, from the generator's seed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
            restore()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    restore()
    return graph, output


def require_device_counters(cache: Any) -> None:
    """Raises `Unsupported` for a cache that counts its tokens on the host, where no replay can move them on."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length_int") or not hasattr(layer, "cumulative_length"):
            raise Unsupported(
                f"compiler=cudagraph: a {type(layer).__name__} of transformers counts its tokens on the host, where a "
                "replayed graph cannot move them on; compiler=eager runs this model"
            )
