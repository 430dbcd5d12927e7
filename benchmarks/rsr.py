"""RSR beside a packed GEMV: the same ternary matrix multiplied in five ways, in one run.

    python benchmarks/rsr.py [--sizes 1024 2048 4096 8192 16384] [--threads 1 2] [--rows 1] [--rounds 15]

A random ternary matrix of size x size times `rows` vectors: torch's F.linear in bf16 and in
float32, quantizer=bitnet's kernel from 2 bits a weight, and RSR and RSR++ at the block size
that is fastest here. Each is compared with a float64 product first. The five take turns, so
that whatever else runs on the machine meets all of them, and none finds its weights in a
cache that a model's other layers would have emptied. GB/s are bytes of stored weights.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from lbi import environment
from lbi.kernels import rsr_index, ternary_ops

Multiply = Callable[[], torch.Tensor]

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Contender:
    """One way to multiply: what it is called, what it does, the bytes it stores, how long those took to make."""

    name: str
    multiply: Multiply
    stored: int
    build_s: float = 0.0


def seconds(contenders: list[Contender], rounds: int) -> list[list[float]]:
    """Times of each contender, the contenders taking turns; a first turn is not counted."""
    taken: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 1):
        for times, contender in zip(taken, contenders, strict=True):
            started = time.perf_counter()
            contender.multiply()
            if turn:
                times.append(time.perf_counter() - started)
    return taken


def rsr_contenders(codes: torch.Tensor, inputs: torch.Tensor) -> tuple[list[Contender], list[Contender]]:
    """RSR and RSR++ at each k around those of least work; one index serves both."""
    outputs, columns = codes.shape
    scale = torch.ones(1)
    sizes = range(rsr_index.block_size(columns, fold=False) - 1, rsr_index.block_size(columns) + 2)
    plain, folded = [], []
    for k in sizes:
        started = time.perf_counter()
        index, starts = (torch.from_numpy(part) for part in rsr_index.build(codes.numpy(), k))
        built = time.perf_counter() - started
        stored = index.nbytes + starts.nbytes
        for name, fold, into in (("RSR", False, plain), ("RSR++", True, folded)):
            least = k == rsr_index.block_size(columns, fold)

            def multiply(
                k: int = k, fold: bool = fold, parts: tuple[torch.Tensor, ...] = (index, starts)
            ) -> torch.Tensor:
                product: torch.Tensor = torch.ops.lbi.rsr_linear(inputs, *parts, scale, outputs, k, fold)
                return product

            into.append(Contender(f"{name} k={k}{' (least work)' if least else ''}", multiply, stored, built))
    return plain, folded


def others(codes: torch.Tensor, inputs: torch.Tensor) -> list[Contender]:
    """torch in two types, and the packed kernel."""
    narrow, wide = codes.to(torch.bfloat16), codes.float()
    started = time.perf_counter()
    packed, scale = ternary_ops.pack(codes), torch.ones(1)
    built = time.perf_counter() - started
    wide_inputs = inputs.float()
    linear = torch.nn.functional.linear
    return [
        Contender("F.linear bf16", lambda: linear(inputs, narrow), narrow.nbytes),
        Contender("F.linear fp32", lambda: linear(wide_inputs, wide), wide.nbytes),
        Contender("packed 2 bit", lambda: torch.ops.lbi.ternary_linear(inputs, packed, scale), packed.nbytes, built),
    ]


def check(contenders: list[Contender], codes: torch.Tensor, inputs: torch.Tensor) -> None:
    """Raises `SystemExit` for a product that is not the float64 one."""
    expected = torch.cat([inputs.double() @ rows.double().T for rows in codes.split(1024)], dim=1)
    for contender in contenders:
        found = contender.multiply()
        off = float((found.double() - expected).norm() / expected.norm())
        if not off < LARGEST_ERROR[found.dtype]:
            raise SystemExit(f"{contender.name}: a relative error of {off:.2g}")


def compare(size: int, rows: int, threads: list[int], rounds: int) -> None:
    """Print the table of one size."""
    codes = torch.randint(-1, 2, (size, size), dtype=torch.int8)
    inputs = torch.randn(rows, size).to(torch.bfloat16)
    rivals, (plain, folded) = others(codes, inputs), rsr_contenders(codes, inputs)
    check([*rivals, *plain, *folded], codes, inputs)
    for count in threads:
        torch.set_num_threads(count)
        best = []
        for family in (plain, folded):
            tried = [median(times) for times in seconds(family, max(3, rounds // 3))]
            best.append(family[tried.index(min(tried))])
        contenders = [*rivals, *best]
        taken = seconds(contenders, rounds)
        packed = median(taken[2])
        print(f"\n{size} x {size}, {rows} row(s), {count} thread(s)")
        print(f"  {'':<24}{'median us':>10}{'least us':>10}{'GB/s':>7}{'x packed':>10}{'bits/w':>8}{'build s':>9}")
        for contender, times in zip(contenders, taken, strict=True):
            usual, bits = median(times), 8 * contender.stored / codes.numel()
            print(
                f"  {contender.name:<24}{1e6 * usual:>10.0f}{1e6 * min(times):>10.0f}"
                f"{contender.stored / usual / 1e9:>7.1f}{usual / packed:>10.2f}{bits:>8.2f}{contender.build_s:>9.2f}",
                flush=True,
            )


def main() -> None:
    """Compare all sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    problem = ternary_ops.problem()
    if problem:
        raise SystemExit(problem)
    print(
        f"{environment.cpu_model()}, {os.cpu_count()} cores, torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"
    )
    with torch.no_grad():
        for size in given.sizes:
            compare(size, given.rows, given.threads, given.rounds)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
