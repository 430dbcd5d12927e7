"""What slots buy and what they cost: one sweep in one slot and in several, in one run of this script.

    python benchmarks/slots.py [--gpus N] [--cells 16] [--model llama32_1b_random]
    python benchmarks/slots.py --slots 2 --model tiny_random --cells 4           (on a CPU)

On GPUs a cell must be as fast beside others as alone, so each cell's decode speed in one slot
and in several is printed side by side, with the GPU it ran on. On a CPU it may not be: a slot
has a share of the cores, and the figures are there to see how much that costs. The sweep
with several slots goes first, so that what the first one finds cold (files, imports) counts
against the speed-up.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lbi import environment


@dataclass(frozen=True, slots=True)
class Cell:
    """A measured cell: its decode tokens/s and where it ran."""

    name: str
    speed: float
    spread: float
    place: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Wall seconds of a sweep and its cells by number."""

    seconds: float
    cells: dict[int, Cell]


def sweep(store: Path, options: argparse.Namespace, *overrides: str) -> Sweep:
    """Run the cells into a store of their own."""
    lengths = ",".join(str(options.new_tokens + 4 * number) for number in range(options.cells))
    command = [
        *(sys.executable, "-m", "lbi", "-m"),
        *(f"model={options.model}", "quantizer=none", f"workload.new_tokens={lengths}"),
        *(f"measure={options.measure}", "tracker=none", "quality=off", "sweep.name=slots"),
        *(f"store.path={store}", *overrides),
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode == 2:
        raise SystemExit(done.stderr.strip())
    with (store / "sweeps" / "slots" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["status"] != "ok":
            raise SystemExit(f"{' '.join(overrides)}: {row['name']} ended as {row['status']}: {row['reason']}")
    return Sweep(seconds, {int(row["cell"]): _cell(row) for row in rows})


def _cell(row: dict[str, str]) -> Cell:
    effective = json.loads((Path(row["folder"]) / "effective.json").read_text())
    speed, low, high = (float(row[name]) for name in ("decode_tok_s", "decode_tok_s_lo", "decode_tok_s_hi"))
    place = effective.get("gpu") or f"slot {effective['slot']} ({effective['cores']} cores)"
    return Cell(row["name"], speed, (high - low) / 2 / speed, str(place))


def show(one: Sweep, several: Sweep, count: int) -> None:
    """Both sweeps side by side."""
    print(f"{'cell':<22}{'one slot':>12}{'±':>7}{f'{count} slots':>12}{'±':>7}{'ratio':>8}  where (of {count} slots)")
    ratios = []
    for number, alone in sorted(one.cells.items()):
        beside = several.cells[number]
        ratios.append(beside.speed / alone.speed)
        figures = f"{alone.speed:>12.1f}{alone.spread:>7.1%}{beside.speed:>12.1f}{beside.spread:>7.1%}"
        print(f"{alone.name:<22}{figures}{ratios[-1]:>8.3f}  {beside.place}")
    worst, middle = max(ratios, key=lambda ratio: abs(ratio - 1)), statistics.median(ratios)
    print(f"decode tok/s         median ratio {middle:.3f}, worst deviation {100 * (worst - 1):+.1f}%")
    print(f"wall time            one slot {one.seconds:.1f} s, {count} slots {several.seconds:.1f} s")
    print(f"speed-up             {one.seconds / several.seconds:.2f}")
    for place, cells in sorted(Counter(cell.place for cell in several.cells.values()).items()):
        print(f"  {place}: {cells} cells")


def main() -> None:
    """Measure both and print the comparison; exit code 1 if a slot got no cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--model", default="llama32_1b_random")
    parser.add_argument("--measure", default="brief")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the first cell; each has 4 more than the last")
    parser.add_argument("--gpus", type=int, help="GPUs of the second sweep; all of them if left out")
    parser.add_argument("--slots", type=int, help="share the CPU between so many runs instead of using GPUs")
    options = parser.parse_args()
    knob, device = ("resources.slots", "cpu") if options.slots else ("resources.gpus", "cuda")
    count = options.slots or options.gpus or len(environment.gpus())
    if count == 0:
        raise SystemExit("There is no GPU here; try --slots 2 --model tiny_random --cells 4")
    with tempfile.TemporaryDirectory() as folder:
        several = sweep(Path(folder) / "several", options, f"engine.device={device}", f"{knob}={count}")
        one = sweep(Path(folder) / "one", options, f"engine.device={device}", f"{knob}=1")
    show(one, several, count)
    used = len({cell.place for cell in several.cells.values()})
    if used < min(count, options.cells):
        raise SystemExit(f"only {used} of {count} slots were used")


if __name__ == "__main__":
    main()
