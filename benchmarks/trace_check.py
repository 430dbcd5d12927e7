"""Whether the numbers of a sweep's results agree with each other: breakdown, launches, bandwidth, energy.

    python benchmarks/trace_check.py [SWEEP] [--store lbi_store]

For each measured cell, from its files alone:

- the breakdown of a decode step, kernels and idle time together, over the step that was profiled (bound: 5%), and that
  step over the one that was timed, which is what the profiler costs;
- launches per token, and the share of them that CUDA graphs made;
- the bytes of a token over its time, the median of the raw samples, and over the measured bandwidth: the MBU, over the
  recorded one (bound: 5%);
- joules per token over power times time (bound: 10%): the median power at the samples' ends, which NVML averages over
  about a second, so generations should take longer than that.

What a result does not have is said. The exit code is 1 if any figure is out of its bound, or no cell has any.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from lbi.collect import Row, rows
from lbi.compare_traces import IDLE
from lbi.store import Store
from lbi.sweep_folder import find

BREAKDOWN, MBU, ENERGY = 0.05, 0.05, 0.10


@dataclass
class Checked:
    """What is said of one cell; `out` are the figures out of their bound, `judged` how many had one."""

    lines: list[str] = field(default_factory=list)
    out: int = 0
    judged: int = 0

    def ratio(self, what: str, value: float, bound: float) -> None:
        holds = abs(value - 1) <= bound
        self.judged += 1
        self.out += not holds
        self.lines.append(f"{what}: {value:.3f}{'' if holds else f'  OUT OF {bound:.0%}'}")

    def note(self, text: str) -> None:
        self.lines.append(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", help="name of a sweep, or its beginning; left out: the newest")
    parser.add_argument("--store", default=os.environ.get("LBI_STORE", "lbi_store"))
    given = parser.parse_args()
    store = Store.open(given.store, write=False)
    sweep = find(store, given.sweep)
    checked = []
    for row in rows(store, sweep):
        if row["status"] != "ok":
            print(f"{row['name']}: {row['status']} {row['reason']}\n")
            continue
        found = check(row, Path(row["folder"]))
        checked.append(found)
        print("\n".join([str(row["name"]), *(f"  {line}" for line in found.lines)]), end="\n\n")
    judged, out = sum(found.judged for found in checked), sum(found.out for found in checked)
    print(f"Sweep {sweep}: {len(checked)} measured cells, {judged} figures with a bound, {out} out of it.")
    return 1 if out or not judged else 0


def check(row: Row, folder: Path) -> Checked:
    """Every figure of one result."""
    effective, made = json.loads((folder / "effective.json").read_text()), Checked()
    config = json.loads((folder / "config.json").read_text())["config"]
    times = samples(folder / "samples.parquet")
    batch = int(config["workload"].get("batch", 1))
    _breakdown(row, effective.get("timeline") or {}, made)
    _bandwidth(row, effective.get("peaks") or {}, times, batch, made)
    _energy(row, effective.get("clocks") or {}, times, batch, made)
    return made


@dataclass(frozen=True)
class Times:
    """Medians over the valid samples, in seconds: between two tokens, and a whole generation of `tokens`."""

    token: float
    generation: float
    tokens: float


def samples(file: Path) -> Times:
    """Read from the raw samples, as little of lbi between as there can be."""
    by_number: dict[int, dict[int, float]] = {}
    for line in pq.read_table(file).to_pylist():
        if not line["void"]:
            by_number.setdefault(line["repetition"], {})[line["token"]] = line["seconds"]
    steps, wholes, counts = [], [], []
    for known in by_number.values():
        moments = [known[token] for token in sorted(known) if token >= 0]
        steps.append((moments[-1] - moments[0]) / (len(moments) - 1))
        wholes.append(known[-1])
        counts.append(len(moments))
    return Times(median(steps), median(wholes), median(counts))


def _breakdown(row: Row, seen: dict[str, Any], made: Checked) -> None:
    if not seen.get("ms_per_token"):
        made.note("no breakdown: the profiler saw no decode step, or an older lbi made this result")
        return
    idle = sum(seen.get(name) or 0.0 for name in IDLE)
    made.ratio("breakdown / profiled step", (sum(seen["kinds_ms"].values()) + idle) / seen["ms_per_token"], BREAKDOWN)
    made.note(f"profiled / timed step: {seen['ms_per_token'] / 1e3 / row['tpot_s']:.3f} (the profiler's own cost)")
    graphs = f", {seen['in_graphs']:.0%} of them by CUDA graphs" if "in_graphs" in seen else ""
    made.note(f"launches per token: {seen['launches_per_token']:.1f}{graphs}")
    if "idle_share" in seen:
        made.note(f"idle share of the GPU: {seen['idle_share']:.1%}")


def _bandwidth(row: Row, peaks: dict[str, Any], times: Times, batch: int, made: Checked) -> None:
    if not row["bytes_per_token"] or not peaks.get("read_bytes_per_s") or not row["mbu_measured"]:
        made.note(f"no MBU: {row['missing'].get('mbu_measured', 'bytes or bandwidth are not known')}")
        return
    achieved = row["bytes_per_token"] * batch / times.token
    mbu = achieved / peaks["read_bytes_per_s"]
    made.note(f"bytes / time: {achieved / 1e9:.1f} GB/s of {peaks['read_bytes_per_s'] / 1e9:.1f}, MBU {mbu:.1%}")
    made.ratio("MBU recomputed / recorded", mbu / row["mbu_measured"], MBU)


def _energy(row: Row, clocks: dict[str, Any], times: Times, batch: int, made: Checked) -> None:
    joules, watts = row["energy_j_per_token"], clocks.get("power_at_end_w")
    if not joules:
        made.note(f"no energy: {row['missing'].get('energy_j_per_token', 'it was not read')}")
        return
    counted = joules * times.tokens * batch / times.generation
    if not watts:
        made.note(
            f"{joules:.4f} J/token, {counted:.0f} W on average; no power to compare with: {clocks.get('missing', '')}"
        )
        return
    short = (
        "" if times.generation > 1 else f" (a generation takes {times.generation:.2f} s, too short for NVML's power)"
    )
    made.note(f"{joules:.4f} J/token, {counted:.0f} W by the counter, {watts:.0f} W by NVML{short}")
    made.ratio("energy / (power x time)", counted / watts, ENERGY)


if __name__ == "__main__":
    raise SystemExit(main())
