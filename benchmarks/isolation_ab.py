"""Runs that share a process against isolated ones: the same cells by both ways, in turn, in one run.

    python benchmarks/isolation_ab.py --store lbi_store model=smollm2_135m quantizer=int8_wo cache=dynamic,static

The overrides are those of a sweep. Each round measures all of its cells isolated and with
resources.isolation=shared_load, in an order that changes from round to round, each in a store of its own; the
unquantized model's outputs, the machine's peaks and compiled graphs are common to all. A run that shared its
process agrees with isolation if its tokens and its KLD are among those that isolation gave (mostly a single one),
and its speeds do not differ beyond noise: the interval of the ratios holds 1, or their median is nearer to 1 than
isolated rounds are to each other. Where that interval is wider than --within on either side, the machine is too
unquiet to tell: nothing is said of the pair.

What agrees and what does not is written into --store, for each pair of a run and one that came before it there; a
worker isolates a run that was refused after one that its process has done. Without --store nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from lbi import isolation_check
from lbi.isolation_check import Pair
from lbi.metrics import median_interval

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""This checkout before what else is on the path: packages may be there alone."""

SPEEDS = ("decode_tok_s", "prefill_tok_s")

WITHIN = 0.05
"""An interval of ratios that is wider than this on either side is too wide to agree by."""

WAYS = ("process", "shared_load")

COMMON = ("references", "devices")
"""Folders of a store that all of them have in common."""


@dataclass(frozen=True)
class Found:
    """One measurement of a cell: `after` are the runs that its process did before, `seconds` what it took in all."""

    name: str
    run_id: str
    env_id: str
    status: str
    after: tuple[str, ...]
    speeds: Mapping[str, float]
    kld: float | None
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Judged:
    """What the rounds say of one cell: whether both ways agree, in figures; None where there is too little to say."""

    cell: Found
    agrees: bool | None
    why: str


def measure(way: str, folder: Path, common: Path, overrides: Sequence[str]) -> list[Found]:
    """Measure all cells one way in a new store. Raises `SystemExit` if lbi refuses."""
    store = folder / "store"
    store.mkdir(parents=True)
    for name in COMMON:
        (common / name).mkdir(parents=True, exist_ok=True)
        (store / name).symlink_to(common / name)
    own = [f"resources.isolation={way}", "resources.shared_quality=false", "tracker=none", "sweep.name=ab"]
    command = [sys.executable, "-m", "lbi", "-m", *overrides, *own]
    places = {"LBI_STORE": str(store), "LBI_CACHE": str(common / "cache"), "PYTHONPATH": PATH}
    done = subprocess.run(
        command, env={**os.environ, **places}, cwd=folder, capture_output=True, text=True, check=False
    )
    table = store / "sweeps" / "ab" / "results.csv"
    if not table.exists():
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    with table.open() as file:
        return [_found(row) for row in csv.DictReader(file) if row["folder"]]


def _found(row: Mapping[str, str]) -> Found:
    folder = Path(row["folder"])
    ok = row["status"] == "ok"
    tokens = _json(folder / "text.json")["tokens"] if ok else ()
    return Found(
        name=row["name"],
        run_id=row["run_id"],
        env_id=row["env_id"],
        status=row["status"],
        after=tuple(_json(folder / "process.json").get("isolation", {}).get("after", ())),
        speeds={name: float(row[name]) for name in SPEEDS if row[name]},
        kld=float(row["mean_kld"]) if row["mean_kld"] else None,
        tokens=tuple(tokens),
        seconds=float(row["cell_s"]),
    )


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def judge(isolated: Sequence[Found], shared: Sequence[Found], within: float = WITHIN) -> Judged:
    """Hold the rounds of one cell against each other, the shared ones that came after others in their process."""
    cell = shared[0]
    endings = {one.status for one in (*isolated, *shared)}
    if endings != {"ok"}:
        return Judged(cell, {one.status for one in isolated} == {one.status for one in shared}, f"ended as {endings}")
    if {one.tokens for one in shared} - {one.tokens for one in isolated}:
        return Judged(cell, False, "its tokens are others")
    if {one.kld for one in shared} - {one.kld for one in isolated}:
        return Judged(cell, False, f"mean KLD {shared[0].kld} against {isolated[0].kld}")
    found = [_compare(name, isolated, shared) for name in SPEEDS]
    words = ", ".join(speed.words for speed in found)
    if any(speed.beyond for speed in found):
        return Judged(cell, False, words)
    if any(speed.width is None or speed.width > within for speed in found):
        return Judged(cell, None, f"{words}: too wide to tell")
    return Judged(cell, True, f"{words}; {len(shared)} rounds, tokens and KLD equal")


@dataclass(frozen=True)
class Ratio:
    """Shared over isolated: whether it differs beyond noise, and half its interval, None where there is none."""

    beyond: bool
    width: float | None
    words: str


def _compare(name: str, isolated: Sequence[Found], shared: Sequence[Found]) -> Ratio:
    theirs = [one.speeds[name] for one in isolated]
    found = median_interval([one.speeds[name] / other for one, other in zip(shared, theirs, strict=True)])
    if found.low is None or found.high is None:
        return Ratio(False, None, f"{name} {found.median:.3f}")
    spread = (max(theirs) - min(theirs)) / 2 / median_interval(theirs).median
    beyond = not found.low <= 1 <= found.high and abs(found.median - 1) > spread
    words = f"{name} {found.median:.3f} ({found.low:.3f} to {found.high:.3f}), isolated rounds ±{spread:.1%}"
    return Ratio(beyond, (found.high - found.low) / 2, words)


def pairs(judged: Sequence[Judged]) -> list[Pair]:
    """For the store: each run after each one that came before it."""
    return [
        Pair(before, one.cell.run_id, one.agrees, one.why)
        for one in judged
        if one.agrees is not None
        for before in one.cell.after
    ]


def main() -> int:
    """Measure, print a line a cell, and write what was found; 1 if a pair is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", type=Path, help="the store whose sweeps are to heed it; without, nothing is written")
    parser.add_argument("--rounds", type=int, default=6, help="below 6 an interval covers less than 95%%")
    parser.add_argument("--within", type=float, default=WITHIN, help="half the interval that is still narrow enough")
    parser.add_argument("overrides", nargs="+")
    given = parser.parse_args()
    rounds: dict[str, list[dict[str, Found]]] = {way: [] for way in WAYS}
    print(f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {' '.join(given.overrides)}")
    with tempfile.TemporaryDirectory(prefix="lbi-isolation-") as scratch:
        for number in range(given.rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                cells = measure(way, Path(scratch) / f"{way}-{number}", Path(scratch) / "common", given.overrides)
                rounds[way].append({cell.run_id: cell for cell in cells})
                wall = sum(cell.seconds for cell in cells)
                print(f"round {number + 1} {way}: {len(cells)} cells, {wall:.1f} s", flush=True)
    first = rounds["shared_load"][0].values()
    both = [[[one[cell.run_id] for one in rounds[way]] for way in WAYS] for cell in first if cell.after]
    judged = [judge(isolated, shared, given.within) for isolated, shared in both]
    for one in judged:
        said = {True: "agrees", False: "REFUSED", None: "not judged"}[one.agrees]
        print(f"{one.cell.name} after {', '.join(one.cell.after)}: {said}, {one.why}")
    if given.store is not None and judged:
        print(f"written to {isolation_check.add(given.store.absolute(), judged[0].cell.env_id, pairs(judged))}")
    return int(any(one.agrees is False for one in judged))


if __name__ == "__main__":
    sys.exit(main())
