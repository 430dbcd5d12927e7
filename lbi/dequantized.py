"""Finds out whether a decode step writes out whole weights before it multiplies by them.

Weight-only quantization pays only where the kernel unpacks while it multiplies. Where it
does not, each token costs the packed weight, a full one written, and a full one read: slower
than no quantization. The audit cannot see it, the tensors are what was asked for; the trace of
the decode steps can. A prefill may well unpack, its cost is shared by many tokens: it is not looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lbi.decode_trace import Allocation, Step
from lbi.kernels_seen import shorten

LEAST_SHARE = 0.2
"""Of the weights looked at, that must be written. Keys and values of a long context can have the size of the
two small projections, which are below a tenth of a decoder's weights; one projection of the MLP is a quarter."""

PER_THREAD = 16
"""Most elements that one GPU thread of an elementwise kernel works on (PyTorch 2.13's vectorized ones, and
inductor's with 4096 elements for 256 threads)."""

WRITES = re.compile(r"elementwise|copy|triton_poi", re.IGNORECASE)
"""Kernels that write as many elements as they are launched for; not those that reduce or multiply."""

NO_WEIGHT = re.compile(r"aten::(cat|mm|addmm|bmm|baddbmm|linear|matmul|_int_mm|_scaled_mm)$|CatArray")
"""What takes memory that is no unpacked weight, whatever its size: a dynamic cache that is copied to a longer one,
and the workspace of a plain multiplication (cuBLASLt's is 32 MiB on Hopper, just a 4096 x 4096 weight in 16 bits)."""


@dataclass(frozen=True, slots=True)
class Written:
    """Unpacked weights that each decode step writes, each layer's counted once."""

    per_token_bytes: int
    layers: int
    evidence: str


def find(steps: Sequence[Step], sizes: Mapping[int, int], itemsize: int, device: str, *, compiled: bool) -> Written:
    """What every one of `steps` writes; nothing where that is less than a fifth of the weights.

    `sizes` is the number of quantized layers by their number of weights, `itemsize` the bytes of
    one unpacked weight, in the model's type (float32 is looked for too). In a compiled graph
    buffers are used again and a CUDA graph's replay allocates nothing, so kernels count as well there.
    """
    found = [_from_allocations(steps, sizes, itemsize, device, compiled)]
    if compiled and device == "cuda":
        found.append(_from_kernels(steps, sizes, itemsize))
    return max(found, key=lambda one: one.per_token_bytes)


def _from_allocations(
    steps: Sequence[Step], sizes: Mapping[int, int], itemsize: int, device: str, compiled: bool
) -> Written:
    """By the memory each step takes: a block as large as a layer's unpacked weight, for each layer of that size."""
    widths = dict.fromkeys((itemsize, 4))
    forms = [(numel, width) for width in widths for numel in sorted(sizes, reverse=True)]
    counted = [(Counter(_form(block, forms, device) for block in step.allocations), step.tokens) for step in steps]
    written: dict[tuple[int, int], int] = {}
    for numel, layers in sizes.items():
        # No more than there are layers: packed weights of a large shape can have a small one's float32 size.
        least = {width: min(layers, *(count[numel, width] // tokens for count, tokens in counted)) for width in widths}
        width = max(widths, key=least.__getitem__)
        # On a CPU a block has exactly its tensor's size, and all layers of one shape are compiled alike.
        alike = compiled and device == "cpu" and least[width] > 0
        written[numel, width] = layers if alike else least[width]
    makers = Counter(
        block.by for step in steps for block in step.allocations if written.get(_form(block, forms, device) or (0, 0))
    )
    by = ", ".join(shorten(name) for name, _ in makers.most_common(2))
    return _judged(written, sizes, f"each of {_count(steps)} allocates their size (in {by})")


def _form(block: Allocation, forms: Sequence[tuple[int, int]], device: str) -> tuple[int, int] | None:
    """The (weights, bytes of one) whose unpacked form fits a block: the model's own type first, then the largest."""
    if NO_WEIGHT.search(block.by):
        return None
    for numel, width in forms:
        wanted = numel * width
        if wanted <= block.bytes <= wanted + _rounding(wanted, device):
            return numel, width
    return None


def _rounding(wanted: int, device: str) -> int:
    """Bytes by which a block may be larger than what was asked for.

    CUDACachingAllocator.cpp: multiples of 512 bytes; from 1 MiB on, of 2 MiB, and a rest below that is not split off.
    """
    if device != "cuda":
        return 0
    return 511 if wanted < 1 << 20 else (2 << 20) - 1


def _from_kernels(steps: Sequence[Step], sizes: Mapping[int, int], itemsize: int) -> Written:
    """By launches: for the layers from the largest on, as many kernels that write at least so many elements."""
    reach = [
        (
            step.tokens,
            [
                PER_THREAD * kernel.threads
                for kernel in step.kernels
                if WRITES.search(kernel.name) and not NO_WEIGHT.search(kernel.name)
            ],
        )
        for step in steps
    ]
    written: dict[tuple[int, int], int] = {}
    for numel in sorted(sizes, reverse=True):
        needed = sizes[numel] + sum(written.values())
        if min(sum(elements >= numel for elements in widest) // tokens for tokens, widest in reach) < needed:
            break
        written[numel, itemsize] = sizes[numel]
    return _judged(written, sizes, f"each of {_count(steps)} launches elementwise kernels of their size")


def _count(steps: Sequence[Step]) -> str:
    return f"{sum(step.tokens for step in steps)} decode steps"


def _judged(written: Mapping[tuple[int, int], int], sizes: Mapping[int, int], evidence: str) -> Written:
    weights = sum(numel * layers for (numel, _), layers in written.items())
    if not weights or weights < LEAST_SHARE * sum(numel * layers for numel, layers in sizes.items()):
        return Written(0, 0, "no decode step writes blocks of its weights' unpacked size, or too few")
    total = sum(numel * width * layers for (numel, width), layers in written.items())
    layers = sum(written.values())
    return Written(total, layers, f"{layers} of {sum(sizes.values())} weights: {evidence}")
