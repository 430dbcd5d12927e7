"""Where the microseconds of a decode step of engine=fused go, and the tiles that make the step shortest.

    python benchmarks/fused_step.py [--forms 'w4 g128,w2 g64'] [--depth 100] [--layers 32] [--json FILE]
    python benchmarks/fused_step.py --tune [--seconds 300]      into lbi/kernels/tiles.json

A Llama-3.1-8B of random packed weights, one step as a CUDA graph. With programmatic dependent
launch kernels overlap, so no profile says what one of them costs: here a kind of kernel is left
out, and the step is timed without it. `--tune` tries tiles within the step for the same reason:
what is best alone, with a launch before it and nothing after, need not be best there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from copy import copy
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from gemv_ahead import set_up
from gemv_cases import Case, possible, possible_packed

from lbi.kernels import tiles
from lbi.kernels.cache_formats import CacheFormat
from lbi.kernels.decode_torch import Shape, TorchSteps
from lbi.kernels.formats import Packed
from lbi.kernels.tiles import Tile

SIZES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
HEAD = (128256, 4096)
KINDS = ("attention", *SIZES, "head", "embed", "next_token")
LARGEST_ERROR = 0.01
"""A tile whose product is further off is not taken, however fast: bfloat16's own rounding is 0.002."""

ORDER = ("out", "down", "gate_up", "qkv", "head")
"""Who writes the stream first: how many programs that takes is compiled into who reads it."""


def main() -> None:
    """Tune or measure each form, and print a line for each kind of kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", default="plain,fp8,w8,w4 g128,w2 g64,w158")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--depth", type=int, default=106, help="tokens in the cache")
    parser.add_argument("--slots", type=int, help="of the cache; the depth and a hundred if not given")
    parser.add_argument("--cache", choices=("int8", "fp8", "int4"), help="bits of keys and values; 16 if not given")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0, help="of --tune, for all forms together")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    begun, forms = time.monotonic(), given.forms.split(",")
    bandwidth = _bandwidth()
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), set_up, (_capability(),)) if given.tune else None
    for number, form in enumerate(forms):
        if pool is not None:
            left = begun + given.seconds - time.monotonic()
            tune(form, given, pool, time.monotonic() + left / (len(forms) - number))
        found.append(measure(form, given, bandwidth))
        if given.json:
            Path(given.json).write_text(json.dumps(found, indent=1))
        torch.cuda.empty_cache()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)


def model(form: str, given: argparse.Namespace, layers: int, device: str = "cuda") -> Any:
    """As much of a `Llama` as its `step` takes, of random weights."""
    from lbi.engines.fused_llama import Layer, Llama
    from lbi.kernels.decode import TritonSteps

    shape = Shape(hidden=4096, heads=32, kv_heads=8, width=128, slots=given.slots or given.depth + 100, eps=1e-5)
    kind = CacheFormat(given.cache, shape.width, shape.width) if given.cache else None
    gain = torch.ones(shape.hidden, device=device, dtype=torch.bfloat16)

    def layer() -> Layer:
        matrices = [Case(form, *size).matrix(device, torch.bfloat16) for size in SIZES.values()]
        if kind is None:
            keys, values = (torch.randn(8, shape.slots, 128, device=device).bfloat16() for _ in range(2))
            return Layer(*matrices, gain, gain, keys, values)
        # Zeros: what a low-bit cache holds does not change what reading it takes.
        return Layer(*matrices, gain, gain, *(kind.allocate(8, shape.slots, torch.device(device)) for _ in range(2)))

    made = object.__new__(Llama)
    vars(made).update(
        steps=TritonSteps(shape, torch.device(device), torch.bfloat16, kind),
        layers=[layer() for _ in range(layers)],
        table=SimpleNamespace(weight=torch.randn(HEAD, device=device).bfloat16()),
        head=Case(form, *HEAD).matrix(device, torch.bfloat16),
        gain=gain,
        cos=torch.randn(shape.slots + 1, 64, device=device),
        sin=torch.randn(shape.slots + 1, 64, device=device),
    )
    return made


class Without:
    """The operations of a step but for one kind: it leaves in its buffers what is there."""

    def __init__(self, steps: Any, kind: str) -> None:
        self._steps, self._kind = steps, kind

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._steps, name)
        places = {"norm_product": "product", "norm_product_swiglu": "act", "attention": "mixed", "head": "logits 0"}

        def maybe(*arguments: Any) -> Any:
            if self._kind != self._kind_of(name, *arguments):
                return operation(*arguments)
            return self._steps._scratch[places[name]] if name in places else None

        return maybe

    @staticmethod
    def _kind_of(name: str, *arguments: Any) -> str:
        if name == "product_add":
            return "out" if arguments[0].inputs == SIZES["out"][1] else "down"
        return {"norm_product": "qkv", "norm_product_swiglu": "gate_up"}.get(name, name)


def step_us(made: Any, depth: int, without: str | None = None, rounds: int = 5) -> float:
    """Median microseconds of a step at `depth`, of `rounds` of twenty replays."""
    made.steps.position.fill_(depth)
    made.step()
    step = made.step
    if without is not None:
        left_out = copy(made)
        left_out.steps = Without(made.steps, without)
        step = left_out.step
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    samples = []
    for _ in range(rounds):
        made.steps.position.fill_(depth)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 50)
    return median(samples)


def measure(form: str, given: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """A form's step, and what it takes without each kind of kernel."""
    made = model(form, given, given.layers)
    whole = step_us(made, given.depth)
    matrices = [matrix for layer in made.layers for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    sizes = dict.fromkeys(KINDS, 0) | {"attention": given.layers * given.depth * _slot_bytes(made.layers[0])}
    for matrix in [*matrices, made.head]:
        sizes[_name(matrix)] += sum(tensor.nbytes for tensor in matrix.tensors())
    ideal = sum(sizes.values()) / bandwidth * 1e6
    print(
        f"{form}: {whole:.0f} us a step, {1e6 / whole:.1f} tok/s; {sum(sizes.values()) / 1e9:.2f} GB "
        f"take {ideal:.0f} us: {ideal / whole:.0%}",
        flush=True,
    )
    row: dict[str, Any] = {name: getattr(given, name) for name in ("depth", "cache", "layers")}
    row |= {"form": form, "us": whole, "ideal_us": ideal, "kinds": {}}
    for kind in KINDS:
        cost = whole - step_us(made, given.depth, kind)
        count = 1 if kind in ("head", "embed", "next_token") else given.layers
        needed = sizes[kind] / bandwidth * 1e6
        row["kinds"][kind] = {"us": cost, "ideal_us": needed, "calls": count}
        matrix = {**_of_layer(made), "head": made.head}.get(kind)
        tile = tiles.step_tile_for(matrix) if matrix is not None else None
        print(
            f"  {kind:<10} {cost:7.0f} us, {cost / count:6.2f} each; its bytes alone {needed / count:6.2f}"
            + (f"  {tile.rows}x{tile.words} w{tile.warps} n{tile.stages}" if tile else ""),
            flush=True,
        )
    return row


def tune(form: str, given: argparse.Namespace, pool: ProcessPoolExecutor, until: float) -> None:
    """The best tile of each product in turn, the others being what they are."""
    made = model(form, given, min(given.layers, 8))
    known = tiles._known(torch.cuda.get_device_name())
    roles = {**_of_layer(made), "head": made.head}
    begun: dict[tuple[str, Tile], Future[str | None]] = {}
    for kind in ORDER:
        for tile in candidates(form, kind):
            begun[kind, tile] = pool.submit(compile_one, form, kind, tile)
    for number, kind in enumerate(ORDER):
        key = f"step {tiles.key(roles[kind])}"
        deadline = time.monotonic() + (until - time.monotonic()) / (len(ORDER) - number)
        found = [(step_us(made, given.depth, rounds=3), tiles.step_tile_for(roles[kind]))]
        for tile in candidates(form, kind):
            try:
                problem = begun[kind, tile].result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                continue
            if problem is not None or time.monotonic() > deadline:
                continue
            known[key] = tile
            found.append((step_us(made, given.depth, rounds=3), tile))
        best_us, best = fastest_right(found, made, kind, key)
        tiles.keep(torch.cuda.get_device_name(), key, best)
        print(f"  {form} {kind}: {found[0][0]:.0f} to {best_us:.0f} us by {best}, of {len(found)}", flush=True)
    for future in begun.values():
        future.cancel()


def fastest_right(found: list[tuple[float, Tile]], made: Any, kind: str, key: str) -> tuple[float, Tile]:
    """The fastest tile whose product is right, which is the one in use from here on. Raises `RuntimeError`."""
    for us, tile in sorted(found, key=lambda pair: pair[0]):
        tiles._known(torch.cuda.get_device_name())[key] = tile
        wrong = error(made, kind)
        if wrong < LARGEST_ERROR:
            return us, tile
        print(f"  {kind}: {tile} is wrong by {wrong:.1e}", flush=True)
    raise RuntimeError(f"no tile of {kind} is right")


def error(made: Any, kind: str) -> float:
    """Relative error of a product and of the sum of squares behind it, against float64 of the weights as stored."""
    steps, stream = made.steps, made.steps.stream
    matrix = {**_of_layer(made), "head": made.head}[kind]
    wanted = TorchSteps(steps.shape, stream.values.device, torch.float64)
    wanted.values, wanted.gained = stream.values.double(), stream.gained.double()
    if kind in ("out", "down"):
        x = torch.randn(matrix.inputs, device=stream.values.device).bfloat16()
        wanted.product_add(matrix, x.double(), made.gain)
        steps.product_add(matrix, x, made.gain)
        squares = stream.squares[: stream.parts].double().sum()
        return max(_off(stream.values, wanted.values), _off(squares, wanted.values.square().sum()))
    operation = {"qkv": "norm_product", "gate_up": "norm_product_swiglu", "head": "head"}[kind]
    return _off(getattr(steps, operation)(matrix), getattr(wanted, operation)(matrix))


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def candidates(form: str, kind: str) -> list[Tile]:
    """Tiles worth trying."""
    case = Case(form, *({**SIZES, "head": HEAD}[kind]))
    if case.item_bytes == 4:
        whole = 1 << (case.width - 1).bit_length()
        choices = [Tile(*values) for values in product((16, 32), (16, 32, 64, 128, 256), (2, 4, 8, 16), (1,), (3, 4))]
        # And all of a row at once, held in registers.
        at_once = [Tile(16, whole, warps) for warps in (4, 8, 16) if whole / warps <= 128]
        return at_once + [tile for tile in choices if possible_packed(case, tile)]
    choices = (Tile(*values) for values in product((2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8)))
    return [tile for tile in choices if possible(case, tile)]


def compile_one(form: str, kind: str, tile: Tile) -> str | None:
    """In a process of its own: have the kernel of a product compiled, and say what went wrong."""
    from lbi.kernels.decode import TritonSteps

    try:
        shape = Shape(hidden=4096, heads=32, kv_heads=8, width=128, slots=206, eps=1e-5)
        steps = TritonSteps(shape, torch.device("cpu"), torch.bfloat16)
        steps._pdl, steps.stream.parts = True, 256 if Case(form, 16, 4096).item_bytes == 4 else 2048
        matrix = Case(form, *({**SIZES, "head": HEAD}[kind])).matrix("cpu", torch.bfloat16, filled=False)
        tiles._known("cpu")[f"step {tiles.key(matrix)}"] = tile
        vector = torch.empty(matrix.inputs, dtype=torch.bfloat16)
        if kind in ("out", "down"):
            steps.product_add(matrix, vector, torch.empty(4096, dtype=torch.bfloat16))
        else:
            {"qkv": steps.norm_product, "gate_up": steps.norm_product_swiglu, "head": steps.head}[kind](matrix)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[-200:]
    return None


def _of_layer(made: Any) -> dict[str, Packed]:
    first = made.layers[0]
    return {"qkv": first.qkv, "out": first.out, "gate_up": first.gate_up, "down": first.down}


def _name(matrix: Packed) -> str:
    return next((kind for kind, size in SIZES.items() if size == (matrix.rows, matrix.inputs)), "head")


def _slot_bytes(layer: Any) -> float:
    """Bytes of one token's keys and values in a layer's cache."""
    held = [tensor for side in (layer.keys, layer.values) for tensor in getattr(side, "tensors", [side])]
    return float(sum(tensor.nbytes / tensor.shape[1] for tensor in held))


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def _bandwidth() -> float:
    """Bytes a second that this GPU reads."""
    from lbi.roofline import read_bandwidth

    return float(read_bandwidth("cuda"))


if __name__ == "__main__":
    main()
