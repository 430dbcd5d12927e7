"""How fast lbi's kernels multiply one token by a packed matrix, beside cuBLAS and the memory's own speed.

    python benchmarks/gemv.py [--forms plain,w8,...] [--shapes 4096x4096,...] [--rows 1,2,4,8,16] [--json FILE]
    python benchmarks/gemv.py --tune [--seconds 120]     the best tiles for this GPU, into lbi/kernels/tiles.json
    python benchmarks/gemv.py --ablation                 one program a row against several (arXiv 2402.00025)
    python benchmarks/gemv.py --dry-run [...]            the same on a CPU, by Triton's interpreter, on tiny shapes

Times are those of a product inside a CUDA graph that goes through more weights than a cache
holds. GB/s counts what is stored: packed weights, scales and zeros; the share is of the read
bandwidth measured here. The error is relative, against float64 with the weights as stored.
`--tune` first has every core compile, then times what is ready, the likeliest tiles first,
until its seconds are over; a tile that fails is counted and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gemv_ahead import Ahead
from gemv_cases import FORMS, LLAMA_8B, SPLITS, TINY, Case, cases, key, tiles_by_case
from gemv_timing import copies, microseconds, relative_error, stored_bytes

from lbi.kernels import tiles
from lbi.kernels.formats import Packed
from lbi.kernels.tiles import Tile

LARGEST_ERROR = 0.01
"""A tile whose product is further off is not taken, however fast: bfloat16's own rounding is 0.002."""


@dataclass
class Bench:
    """The machine, what was asked, and what was found so far."""

    device: str
    dtype: torch.dtype
    ahead: Ahead
    processors: int
    bandwidth: float
    json: str | None
    rounds: int = 11
    found: list[dict[str, Any]] = field(default_factory=list)

    def note(self, **row: Any) -> None:
        """Keep a row, and write all rows: a run that is cut off has left what it found."""
        self.found.append(row)
        if self.json:
            Path(self.json).write_text(json.dumps(self.found, indent=1))

    def share(self, stored: int, us: float) -> str:
        """Bytes a second, and their share of what the memory can do."""
        rate = stored / us * 1e6
        return f"{rate / 1e9:7.0f} GB/s {rate / self.bandwidth:4.0%}" if self.bandwidth else f"{rate / 1e9:7.3f} GB/s"


def say(text: str) -> None:
    """A line at once: the run may be cut off."""
    print(text, flush=True)


def timed(
    bench: Bench, matrices: list[Packed], x: torch.Tensor, tile: Tile | None, *, long: bool
) -> tuple[float, float]:
    """Microseconds of a product with one token or several, and their spread."""
    from lbi.kernels.gemv import gemv, matmul_small

    if x.dim() == 1:
        calls: list[Any] = [lambda m=matrix: gemv(x, m, None, tile) for matrix in matrices]
    else:
        calls = [lambda m=matrix: matmul_small(x, m) for matrix in matrices]
    return microseconds(calls, bench.device, bench.rounds if long else 3, 3.0 if long else 0.6)


def plain_us(bench: Bench, case: Case, tokens: int) -> float:
    """Microseconds of torch's own product in bfloat16, and a line about it."""
    weights = [matrix.data for matrix in copies(replace(case, form="plain"), bench.device, bench.dtype)]
    x = torch.randn(tokens, case.inputs, device=bench.device).to(bench.dtype)
    calls: list[Any] = [lambda w=weight: torch.nn.functional.linear(x, w) for weight in weights]
    us, spread = microseconds(calls, bench.device, bench.rounds, 3.0)
    share = bench.share(weights[0].nbytes, us)
    say(f"{case.rows:>6}x{case.inputs:<5} {tokens:>2}  {'F.linear':<12} {us:9.2f} us ±{spread:5.2f} {share}")
    bench.note(kind="linear", rows=case.rows, inputs=case.inputs, tokens=tokens, us=us, spread_us=spread)
    return us


def table(bench: Bench, chosen: list[Case], tokens: list[int]) -> None:
    """A line for each shape, number of tokens and form."""
    for case in chosen:
        bench.ahead.begin(case, tiles.tile_for(case.matrix(bench.device, bench.dtype, filled=False)))
    shapes = dict.fromkeys((case.rows, case.inputs) for case in chosen)
    for shape in shapes:
        for count in tokens:
            here = [case for case in chosen if (case.rows, case.inputs) == shape]
            baseline = plain_us(bench, here[0], count)
            for case in here:
                attempt(bench, case, count, baseline)


def attempt(bench: Bench, case: Case, tokens: int, baseline: float) -> None:
    """One line of the table, or what went wrong."""
    line = f"{case.rows:>6}x{case.inputs:<5} {tokens:>2}  {case.form:<12}"
    try:
        matrices = copies(case, bench.device, bench.dtype)
        x = torch.randn(tokens, case.inputs, device=bench.device).to(bench.dtype)
        tile = tiles.tile_for(matrices[0]) if tokens == 1 else None
        if tile:
            bench.ahead.wait(case, tile, 60.0)
        given = x[0] if tokens == 1 else x
        us, spread = timed(bench, matrices, given, tile, long=True)
        error = product_error(matrices[0], given, tile)
    except Exception as problem:
        say(f"{line} {type(problem).__name__}: {str(problem)[-160:]}")
        bench.note(kind="failed", **asdict(case), tokens=tokens, problem=str(problem)[-500:])
        still_alive(bench)
        return
    stored, tuned = stored_bytes(matrices[0]), tokens == 1 and tiles.is_tuned(matrices[0])
    say(
        f"{line} {us:9.2f} us ±{spread:5.2f} {bench.share(stored, us)} {baseline / us:5.2f}x "
        f"error {error:.1e} {words(tile)}{' tuned' if tuned else ''}"
    )
    row = {"us": us, "spread_us": spread, "bytes": stored, "linear_us": baseline, "error": error, "tuned": tuned}
    bench.note(kind="product", **asdict(case), tokens=tokens, **row, tile=asdict(tile) if tile else None)


def product_error(matrix: Packed, x: torch.Tensor, tile: Tile | None) -> float:
    """The error of the kernel that was timed."""
    from lbi.kernels.gemv import gemv, matmul_small

    return relative_error(gemv(x, matrix, None, tile) if x.dim() == 1 else matmul_small(x, matrix), matrix, x)


def words(tile: Tile | None) -> str:
    """A tile in four numbers: rows x words, warps, split."""
    return f"{tile.rows}x{tile.words} w{tile.warps} s{tile.split}" if tile else ""


def still_alive(bench: Bench) -> None:
    """Ends the run where a kernel has taken the GPU's context with it: nothing after it would be measured."""
    if bench.device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as problem:
            say(f"the GPU's context is lost: {problem}")
            bench.ahead.close()
            os._exit(1)


def search(
    bench: Bench, case: Case, tried: list[Tile], until: float, matrices: list[Packed]
) -> tuple[list[tuple[float, Tile]], int]:
    """Microseconds of each tile that could be timed before `until`, the fastest first; and how many failed."""
    x = torch.randn(case.inputs, device=bench.device).to(bench.dtype)
    found, failed = [], 0
    for tile in tried:
        left = until - time.monotonic()
        if left <= 0:
            break
        if bench.ahead.wait(case, tile, left) is not None:
            failed += 1
            continue
        try:
            found.append((timed(bench, matrices, x, tile, long=False)[0], tile))
        except Exception:
            failed += 1
            still_alive(bench)
    return sorted(found, key=lambda pair: pair[0]), failed


def tune(bench: Bench, chosen: list[Case], seconds: float, count: int) -> None:
    """The fastest right tile of each case into tiles.json, form by form, so that a run cut off has written some."""
    begun = time.monotonic()
    unique = {key(case): case for case in reversed(chosen)}
    plan = tiles_by_case(list(reversed(unique.values())), bench.processors, count)
    forms = list(dict.fromkeys(case.form for case in plan))
    for case, tried in plan.items():
        for tile in tried:
            bench.ahead.begin(case, tile)
    for position, form in enumerate(forms):
        here = [case for case in plan if case.form == form]
        for number, case in enumerate(here):
            left = begun + seconds - time.monotonic()
            share = left / (len(forms) - position) / (len(here) - number)
            tune_one(bench, case, plan[case], time.monotonic() + max(0.0, share))
    bench.ahead.forget()
    tiles._known.cache_clear()
    say(f"tuned in {time.monotonic() - begun:.0f} s: {tiles.FILE}")


def tune_one(bench: Bench, case: Case, tried: list[Tile], until: float) -> None:
    """The fastest right tile of one case, written at once."""
    try:
        matrices = copies(case, bench.device, bench.dtype)
    except torch.cuda.OutOfMemoryError:
        say(f"{key(case):<24} no memory for the matrices of one pass")
        return
    ranked, failed = search(bench, case, tried, until, matrices)
    x = torch.randn(case.inputs, device=bench.device).to(bench.dtype)
    best = next(
        ((us, tile) for us, tile in ranked[:5] if product_error(matrices[0], x, tile) < LARGEST_ERROR),
        None,
    )
    if best is None:
        say(f"{key(case):<24} no tile: {len(ranked)} of {len(tried)} timed, {failed} failed")
        return
    us, tile = best
    slow = ranked[-1][0] / us
    say(
        f"{key(case):<24} {us:9.2f} us {bench.share(stored_bytes(matrices[0]), us)} {words(tile):<16} "
        f"of {len(ranked)} (slowest {slow:.1f}x, {failed} failed)"
    )
    bench.note(kind="tuned", **asdict(case), us=us, tile=asdict(tile), timed=len(ranked), failed=failed)
    tiles.keep(torch.cuda.get_device_name() if bench.device == "cuda" else "cpu", key(case), tile)


def ablation(bench: Bench, chosen: list[Case], seconds: float, count: int) -> None:
    """The best tile for each number of programs that share a row: what split-K is worth for one token."""
    begun = time.monotonic()
    plans = {split: tiles_by_case(chosen, bench.processors, count, (split,)) for split in SPLITS}
    for case in chosen:
        for plan in plans.values():
            for tile in plan[case]:
                bench.ahead.begin(case, tile)
    for number, case in enumerate(chosen):
        matrices, until = copies(case, bench.device, bench.dtype), 0.0
        best: dict[int, tuple[float, Tile]] = {}
        for split in SPLITS:
            left = (begun + seconds - time.monotonic()) / (len(chosen) - number) / (len(SPLITS) - len(best))
            until = time.monotonic() + max(0.0, left)
            ranked, _ = search(bench, case, plans[split][case], until, matrices)
            if ranked:
                best[split] = ranked[0]
        alone = best.get(1, (float("nan"), None))[0]
        line = "  ".join(
            f"split {split} {us:8.2f} us {alone / us:4.2f}x ({words(tile)})" for split, (us, tile) in best.items()
        )
        say(f"{key(case):<24} {line}")
        bench.note(
            kind="ablation", **asdict(case), best={split: [us, asdict(tile)] for split, (us, tile) in best.items()}
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--shapes", help="outputs x inputs, such as 4096x4096,4096x14336")
    parser.add_argument("--rows", default="1", help="tokens: 1 is the GEMV, 2 to 16 are matmul_small's")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0, help="for --tune, and for --ablation")
    parser.add_argument("--candidates", type=int, help="tiles tried for each case; 40, for --ablation 6 a split")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="0: none compile ahead")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, by Triton's interpreter")
    parser.add_argument("--json")
    given = parser.parse_args()
    for form in given.forms.split(","):
        if form not in FORMS:
            parser.error(f"--forms {form}: there are {', '.join(FORMS)}")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run goes the same way on a CPU")
    return given


def prepared(given: argparse.Namespace) -> Bench:
    """The machine as the benchmark uses it; for a dry run, set before Triton is imported."""
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        tiles.FILE = Path(tempfile.mkdtemp()) / "tiles.json"
        # In float32: the interpreter has no tl.dot of bfloat16.
        return Bench("cpu", torch.float32, Ahead(90, min(1, given.workers)), 132, 0.0, given.json, rounds=1)
    from lbi.roofline import read_bandwidth

    major, minor = torch.cuda.get_device_capability()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    ahead = Ahead(10 * major + minor, given.workers)
    bandwidth = read_bandwidth("cuda")
    say(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s read, torch {torch.__version__}")
    return Bench("cuda", torch.bfloat16, ahead, processors, bandwidth, given.json)


def main() -> None:
    """Do what was asked for, in the order tune, ablation, table."""
    given = arguments()
    bench = prepared(given)
    shapes = TINY if given.dry_run else LLAMA_8B
    if given.shapes:
        shapes = [
            (int(outputs), int(inputs)) for outputs, inputs in (one.split("x") for one in given.shapes.split(","))
        ]
    chosen = list(cases(given.forms.split(","), shapes))
    with torch.no_grad():
        if given.tune:
            tune(bench, chosen, given.seconds, given.candidates or 40)
        if given.ablation:
            ablation(bench, chosen, given.seconds, given.candidates or 6)
        if not given.ablation:
            table(bench, chosen, [int(count) for count in given.rows.split(",")])
    bench.ahead.close()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
