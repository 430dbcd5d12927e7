"""Times products as a decode step makes them: replayed from a CUDA graph, through more weights than a cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from gemv_cases import Case

from lbi.kernels.formats import Packed
from lbi.quantizers.layer_timing import PASS_BYTES


def copies(case: Case, device: str, dtype: torch.dtype) -> list[Packed]:
    """As many equal matrices as one pass goes through: at least two, and `PASS_BYTES` on a GPU."""
    first = case.matrix(device, dtype)
    count = max(2, min(256, -(-PASS_BYTES // stored_bytes(first)))) if device == "cuda" else 2
    return [first, *(_copy(first) for _ in range(count - 1))]


def _copy(matrix: Packed) -> Packed:
    scales, zeros = (None if given is None else given.clone() for given in (matrix.scales, matrix.zeros))
    return replace(matrix, data=matrix.data.clone(), scales=scales, zeros=zeros)


def stored_bytes(matrix: Packed) -> int:
    """Bytes that one product reads of the matrix."""
    return sum(tensor.nbytes for tensor in matrix.tensors())


def microseconds(calls: list[Callable[[], object]], device: str, rounds: int, window_ms: float) -> tuple[float, float]:
    """Median time of a call, and half the distance between its quartiles, over `rounds` of `window_ms` or more.

    The calls are made once before, so that what fails fails outside a capture.
    """
    for call in calls:
        call()
    if device != "cuda":
        return _on_cpu(calls, rounds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _elapsed(graph, 1)
    replays = max(1, min(200, int(window_ms / max(once, 1e-3))))
    samples = sorted(_elapsed(graph, replays) * 1e3 / replays / len(calls) for _ in range(rounds))
    return _summary(samples)


def _elapsed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Milliseconds of the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _on_cpu(calls: list[Callable[[], object]], rounds: int) -> tuple[float, float]:
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - start) * 1e6 / len(calls))
    return _summary(sorted(samples))


def _summary(ordered: list[float]) -> tuple[float, float]:
    quarter = len(ordered) // 4
    return median(ordered), (ordered[-1 - quarter] - ordered[quarter]) / 2


def relative_error(y: torch.Tensor, matrix: Packed, x: torch.Tensor) -> float:
    """||y - Wx|| / ||Wx|| with the product in float64 of the weights that are stored, some rows after the other."""
    found, expected = y.double(), []
    step = max(1, (1 << 26) // matrix.inputs)
    for start in range(0, matrix.rows, step):
        chosen = slice(start, start + step)
        scales, zeros = (None if given is None else given[chosen] for given in (matrix.scales, matrix.zeros))
        part = replace(matrix, data=matrix.data[chosen], scales=scales, zeros=zeros)
        expected.append(x.double() @ part.dequantize().double().T)
    product = torch.cat(expected, dim=-1)
    return float((found - product).norm() / product.norm())
