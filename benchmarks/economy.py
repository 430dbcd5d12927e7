"""What a sweep's economies are worth: the same cells with every mechanism off, each alone, and all on.

    python benchmarks/economy.py --model tiny_random                          # a quick check
    python benchmarks/economy.py --model smollm2_135m --folder E --minutes 20 # again and again, until it is done
    python benchmarks/economy.py --model llama31_8b_random --grid "engine=loop cache=static,static_int8 ..."

24 cells: 3 quantizers x 2 compilers x 2 caches x 2 decodings. Each side has a store and a cache folder of its own,
which begin empty, and its compiler's precompiled headers, which inductor keeps in the temporary folder, are its own
too. --minutes stops after so long and keeps everything in --folder; the same command goes on. A cell that was
stopped is run again, so a side's wall time is the sum of its finished cells and of what lies between them.

The tables must be the same: what is exact is compared exactly, a KLD to 1e-3 nats, a speed by its interval. Sides
run one after the other, so a machine that others use meanwhile compares nothing: the share of the CPU that others
took stands beside each side.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""This checkout before what else is on the path: packages may be there alone."""

GRID = "engine=hf quantizer=none,int8_wo,hqq4 compiler=eager,inductor compiler.dynamic=true measure=brief"
"""On both devices; with `compiler.dynamic` a growing cache is one graph, too."""

AXES = {
    24: "cache=static,dynamic decoding=greedy,sampling",
    12: "cache=static decoding=greedy,sampling",
    6: "cache=static decoding=greedy",
}
"""The other two axes, by the number of cells that they make with `GRID`."""


@dataclass(frozen=True)
class Mechanism:
    """One economy, by the knobs that switch it."""

    name: str
    on: tuple[str, ...]
    off: tuple[str, ...]


MECHANISMS = (
    Mechanism("forked imports", ("resources.fork=true",), ("resources.fork=false",)),
    Mechanism("shared loads", ("resources.isolation=shared_load",), ("resources.isolation=process",)),
    Mechanism(
        "kept graphs",
        ("resources.compile_cache=store", "resources.compile_ahead=null"),
        ("resources.compile_cache=off", "resources.compile_ahead=1"),
    ),
    Mechanism("shared quality", ("resources.shared_quality=true",), ("resources.shared_quality=false",)),
    Mechanism("kept weights", ("store.quantized_gb=20",), ("store.quantized_gb=0",)),
    Mechanism("kept references", ("resources.shared_references=true",), ("resources.shared_references=false",)),
)

EXACT = ("status", "bits_per_weight", "weight_bytes", "bytes_per_token", "kv_bytes", "quantized_fraction")
NEAR = {"mean_kld": 1e-3, "top1_agreement": 5e-3, "ppl_ratio": 5e-3}
"""The most by which these may differ: a pass of one's own rounds as its kernels do."""

SPEEDS = ("decode_tok_s", "prefill_tok_s", "ttft_s")

Row = Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """A number of a cell that two sides do not agree on. `noise`: intervals that do not overlap, else an error."""

    cell: str
    metric: str
    ours: str
    theirs: str
    noise: bool


def sides() -> dict[str, tuple[str, ...]]:
    """The knobs of each side: all off, each alone, all on."""
    found = {"all off": tuple(knob for mechanism in MECHANISMS for knob in mechanism.off)}
    for alone in MECHANISMS:
        chosen = (one.on if one is alone else one.off for one in MECHANISMS)
        found[f"only {alone.name}"] = tuple(knob for knobs in chosen for knob in knobs)
    return found | {"all on": tuple(knob for mechanism in MECHANISMS for knob in mechanism.on)}


def differences(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Difference]:
    """Where two tables of the same cells differ beyond what noise allows."""
    others = {row["run_id"]: row for row in theirs}
    found = []
    for row in ours:
        other = others.get(row["run_id"])
        if other is None:
            found.append(Difference(row["name"], "run_id", row["run_id"], "is not there", False))
            continue
        for name in EXACT:
            if row[name] != other[name]:
                found.append(Difference(row["name"], name, row[name], other[name], False))
        for name, most in NEAR.items():
            if _apart(row[name], other[name], most):
                found.append(Difference(row["name"], name, row[name], other[name], False))
        for name in SPEEDS:
            if _beyond(row, other, name):
                found.append(Difference(row["name"], name, row[name], other[name], True))
    return found


def _apart(ours: str, theirs: str, most: float) -> bool:
    """Whether one of two numbers is missing, or they are more than `most` apart."""
    if "" in (ours, theirs):
        return ours != theirs
    return abs(float(ours) - float(theirs)) > most


def _beyond(row: Row, other: Row, name: str) -> bool:
    """Whether the intervals of the two do not overlap; not to be said where one has none."""
    bounds = [table[f"{name}_{end}"] for table in (row, other) for end in ("lo", "hi")]
    if "" in bounds:
        return False
    low, high, other_low, other_high = map(float, bounds)
    return low > other_high or other_low > high


class Side:
    """One side of the comparison, in a folder of its own."""

    def __init__(self, name: str, knobs: Sequence[str], folder: Path, grid: Sequence[str]) -> None:
        self.name, self.folder = name, folder / name.replace(" ", "-")
        self.command = [sys.executable, "-m", "lbi", "-m", *grid, "tracker=none", "sweep.name=economy", *knobs]
        self.store = self.folder / "store"

    def done(self) -> bool:
        return (self.folder / "done").exists()

    def run(self, until: float) -> bool:
        """Run what is missing, at most until then; whether all of it is there. Raises `SystemExit` if lbi refuses."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        places = {"LBI_STORE": "store", "LBI_CACHE": "cache", "TMPDIR": "tmp"}
        variables = {**os.environ, "PYTHONPATH": PATH}
        variables |= {name: str(self.folder / place) for name, place in places.items()}
        with (self.folder / "output").open("a") as output:
            process = subprocess.Popen(self.command, env=variables, stdout=output, stderr=output, cwd=self.folder)
            try:
                code = process.wait(max(1.0, until - time.time()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait()
                return False
        if code not in (0, 1):
            raise SystemExit(f"{shlex.join(self.command)}\nended with {code}; see {self.folder / 'output'}")
        (self.folder / "done").touch()
        return True

    def rows(self) -> list[dict[str, str]]:
        with (self.store / "sweeps" / "economy" / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def costs(self) -> list[dict[str, Any]]:
        """status.json of each result."""
        return [json.loads(file.read_text()) for file in sorted(self.store.glob("runs/*/*/status.json"))]


@dataclass(frozen=True)
class Sums:
    """What the finished cells of a side took, in seconds; `phases` by phase."""

    cells: int
    wall: float
    cpu: float
    gpu: float
    phases: dict[str, float]
    foreign: float


def sums(statuses: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Sums:
    """Add up a side."""
    phases: dict[str, float] = {}
    for status in statuses:
        for name, seconds in status["cost"]["phases_s"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    return Sums(
        cells=len(statuses),
        wall=sum(status["seconds"] for status in statuses),
        cpu=sum(status["cost"].get("cpu_s") or 0.0 for status in statuses),
        gpu=sum(status["seconds"] * status["cost"]["gpus"] for status in statuses),
        phases=phases,
        foreign=max((float(row["foreign_cpu"]) for row in rows if row["foreign_cpu"]), default=0.0),
    )


def table(found: Mapping[str, Sums]) -> str:
    """Sides as columns, phases as rows, the largest of the first side first; then how many times less wall time."""
    first = next(iter(found.values()))
    named = {name for one in found.values() for name in one.phases}
    names = sorted(named, key=lambda name: (-first.phases.get(name, 0.0), name))
    lines = [["seconds", *found]]
    lines += [[name, *(f"{one.phases.get(name, 0.0):.1f}" for one in found.values())] for name in names]
    lines.append(["wall of all cells", *(f"{one.wall:.1f}" for one in found.values())])
    lines.append(["CPU of the runs", *(f"{one.cpu:.1f}" for one in found.values())])
    if first.gpu:
        lines.append(["GPU", *(f"{one.gpu:.1f}" for one in found.values())])
    lines.append(["times less wall", *(f"{first.wall / one.wall:.2f}" for one in found.values())])
    lines.append(["others' CPU, at most", *(f"{one.foreign:.0%}" for one in found.values())])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def compared(name: str, found: Sequence[Difference], cells: int) -> str:
    """What a side's table says against that with everything off, in words."""
    wrong, noisy = [one for one in found if not one.noise], [one for one in found if one.noise]
    lines = [f"{name}: {cells} cells, {len(wrong)} numbers wrong, {len(noisy)} speeds beyond the two intervals"]
    for one in found:
        what = "beyond noise" if one.noise else "WRONG"
        lines.append(f"  {what}: {one.cell}, {one.metric}: {one.ours} against {one.theirs}")
    return "\n".join(lines)


def report(made: Sequence[Side]) -> int:
    """Print what there is; 1 if a number is wrong."""
    ready = [side for side in made if side.done()]
    if not ready:
        print("No side is done yet.")
        return 0
    print(table({side.name: sums(side.costs(), side.rows()) for side in ready}))
    base, wrong = ready[0], False
    for side in ready[1:]:
        found = differences(base.rows(), side.rows())
        print(compared(side.name, found, len(side.rows())))
        wrong = wrong or any(not one.noise for one in found)
    return int(wrong)


def main() -> int:
    """Run the sides that are not done, in turn, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="tiny_random")
    parser.add_argument("--cells", type=int, choices=AXES, default=24)
    parser.add_argument(
        "--grid", default="", help="overrides in place of those of --cells; several values make an axis"
    )
    parser.add_argument("--sides", default="", help="names of sides, by commas; all of them if not given")
    parser.add_argument("--folder", type=Path, help="where stores and caches are kept between calls")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long; the same command goes on")
    given = parser.parse_args()
    until = time.time() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="lbi-economy-") as scratch:
        folder = given.folder.absolute() if given.folder else Path(scratch)
        wanted = [name for name in given.sides.split(",") if name] or list(sides())
        grid = [f"model={given.model}", *shlex.split(given.grid or f"{GRID} {AXES[given.cells]}")]
        made = [Side(name, sides()[name], folder, grid) for name in wanted]
        print(f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {' '.join(grid)}")
        for side in made:
            if not side.done() and not side.run(until):
                print(f"{side.name} is not done; the same command goes on")
                break
        return report(made)


if __name__ == "__main__":
    sys.exit(main())
