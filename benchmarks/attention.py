"""Attention of one token over a long cache, by bits of keys and values: time beside the time of its bytes, and error.

    python benchmarks/attention.py [--depths 8192,32768] [--caches none,fp8,int8,int4,int4-128] [--try] [--json FILE]

What engine=fused launches for a layer of Llama-3.1-8B: the token's keys and values are turned, put
into the cache, and attended to with all before them; as many caches as the L2 does not hold, in one
CUDA graph. `--try` times the ways to cut it into programs that cache_gpu.py chooses from. The error
is relative to float64 over what the cache holds.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gemv_ahead import set_up

from lbi.kernels.cache_formats import CacheFormat, Rows
from lbi.kernels.cache_gpu import Cut, cut_for
from lbi.kernels.decode_torch import Shape, rotate

HEADS, KV, WIDTH = 32, 8, 128
LAYERS = 8
CUTS = (
    (64, 3, 2, 4),
    (64, 3, 3, 4),
    (64, 2, 4, 4),
    (128, 2, 2, 4),
    (128, 2, 3, 4),
    (128, 3, 2, 4),
    (128, 3, 1, 8),
    (256, 2, 1, 8),
)
"""Slots, stages, waves and warps, see `Cut`. For 16 bits those with three stages and four warps."""


def main() -> None:
    """Print a line for each cache and depth, or for each cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", default="8192,32768", help="tokens in the cache")
    parser.add_argument("--caches", default="none,fp8,int8,int4,int4-128", help="format, and a group's size behind -")
    parser.add_argument("--try", dest="tries", action="store_true", help="every cut, not only the one in use")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    from lbi.roofline import read_bandwidth

    bandwidth, found = float(read_bandwidth("cuda")), []
    caches, depths = given.caches.split(","), [int(depth) for depth in given.depths.split(",")]
    if given.tries:
        compile_ahead(caches)
    for name, depth in product(caches, depths):
        kind = cache_format(name)
        held = [layer(kind, depth + 8) for _ in range(LAYERS)]
        size = sum(tensor.nbytes for side in held[0] for tensor in getattr(side, "tensors", [side]))
        for cut in cuts(kind) if given.tries else [cut_for(kind, depth + 8)]:
            row = measure(held, kind, depth, cut) | {"cache": name, "depth": depth, "cut": str(cut)}
            row |= {"ideal_us": size * depth / (depth + 8) / bandwidth * 1e6}
            found.append(row)
            print(
                f"{name:<9} {depth:>6}  {row['us']:7.2f} us, its bytes {row['ideal_us']:6.2f}"
                f" ({row['ideal_us'] / row['us']:.0%})  off by {row['error']:.1e}  {cut}",
                flush=True,
            )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))


def cache_format(name: str) -> CacheFormat | None:
    """`int4` has lbi's default groups of 32; None is 16 bits."""
    bits, _, group = name.partition("-")
    return None if bits == "none" else CacheFormat(bits, WIDTH, int(group or (32 if bits == "int4" else WIDTH)))


def cuts(kind: CacheFormat | None) -> list[Cut]:
    """What is tried. 16 bits hold what comes next in registers and have no stages."""
    return [Cut(*values) for values in CUTS if kind or values[1::2] == (3, 4)]


def layer(kind: CacheFormat | None, slots: int) -> tuple[Any, Any]:
    """Keys and values of random numbers, as a layer's cache has them."""
    made = [torch.randn(KV, slots, WIDTH, device="cuda").bfloat16() for _ in range(2)]
    return tuple(kind.store(one) if kind else one for one in made)


def steps_for(kind: CacheFormat | None, slots: int, cut: Cut, device: str = "cuda") -> Any:
    from lbi.kernels.decode import TritonSteps

    shape = Shape(hidden=4096, heads=HEADS, kv_heads=KV, width=WIDTH, slots=slots, eps=1e-5)
    steps = TritonSteps(shape, torch.device(device), torch.bfloat16, kind)
    steps.cut(cut)
    return steps


def measure(held: list[tuple[Any, Any]], kind: CacheFormat | None, depth: int, cut: Cut) -> dict[str, float]:
    """Microseconds a layer, median of five times ten replays, and the relative error."""
    steps = steps_for(kind, depth + 8, cut)
    angles = torch.rand(depth + 9, WIDTH // 2, device="cuda") * 6.28
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn((HEADS + 2 * KV) * WIDTH, device="cuda")
    steps.position.fill_(depth)
    error = off(steps.attention(qkv, cos, sin, *held[0]), expected(qkv, (cos[depth], sin[depth]), held[0], kind, depth))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for keys, values in held:
            steps.attention(qkv, cos, sin, keys, values)
    samples = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 100 / len(held))
    return {"us": median(samples), "error": error}


def expected(
    qkv: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], held: tuple[Any, Any], kind: Any, depth: int
) -> torch.Tensor:
    """In float64, from what the cache holds after the token was put into it."""
    queries = rotate(qkv[: HEADS * WIDTH].view(HEADS, WIDTH).double(), *(angle.double() for angle in angles))
    keys, values = (
        (kind.read(Rows(*side.tensors)) if kind else side)[:, : depth + 1].double().repeat_interleave(HEADS // KV, 0)
        for side in held
    )
    scores = torch.einsum("hd,htd->ht", queries, keys) * WIDTH**-0.5
    return torch.einsum("ht,htd->hd", scores.softmax(-1), values).flatten()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def compile_ahead(caches: list[str]) -> None:
    """Every kernel that will be tried, in processes of their own: Triton takes a second or more for each."""
    major, minor = torch.cuda.get_device_capability()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    jobs = {(name, cut) for name in caches for cut in cuts(cache_format(name))}
    with ProcessPoolExecutor(16, get_context("spawn"), set_up, (10 * major + minor,)) as pool:
        for problem in pool.map(compile_one, *zip(*((name, cut, processors) for name, cut in jobs), strict=True)):
            if problem:
                print(f"  {problem}", flush=True)


def compile_one(name: str, cut: Cut, processors: int) -> str | None:
    """In a process of its own; what went wrong, or None."""
    kind = cache_format(name)
    try:
        steps = steps_for(kind, 32776, cut, "cpu")
        steps._pdl, steps._splits = True, max(1, cut.waves * processors // KV)
        held = [kind.allocate(KV, 32776, "cpu") if kind else torch.empty(KV, 32776, WIDTH).bfloat16() for _ in range(2)]
        angles = torch.zeros(16, WIDTH // 2)
        steps.attention(torch.zeros((HEADS + 2 * KV) * WIDTH), angles, angles, *held)
    except Exception as problem:
        return f"{name} {cut}: {type(problem).__name__}: {problem}"[-300:]
    return None


if __name__ == "__main__":
    main()
