"""A thousand real cells of a tiny model on a SLURM cluster: does anything grow faster than their number?

    python benchmarks/many_cells.py [--cells 1000] [--jobs 2] [--isolation process|shared_load] [--folder F]

Nothing is a stand-in: each cell is measured, two jobs at a time on this machine's own cores, and the driver follows
them to the end. The cells differ in their seed alone, so that each should cost what the others cost. Printed are the
seconds of each phase in each quarter of the cells, by the order in which they ended, the driver's peak of memory, and
the CPU time of `status` and `report` when all are there. The exit status is 1 if the driver takes more than 300 MB, one
of the two more than 2 s, or a cell does not end as ok.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from dispatch import cluster, taken
from report_scale import taken as cpu_and_memory

ROOT = Path(__file__).parent.parent

MOST_MB, MOST_S = 300, 2.0

QUARTERS = 4


def command(cells: int, jobs: int, isolation: str) -> list[str]:
    """The sweep: sampling from a model of two small layers, a seed a cell."""
    asked = ["model=tiny_random", "decoding=sampling", f"decoding.seed=range({cells})", "workload.new_tokens=8"]
    asked += ["measure=quick", "quality=off", "tracker=none", "sweep.name=many"]
    where = ["hydra/launcher=lbi_slurm", f"resources.array_parallelism={jobs}", "resources.runs_per_job=50"]
    return [sys.executable, "-m", "lbi", "-m", *asked, *where, f"resources.isolation={isolation}"]


def by_quarter(statuses: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean seconds of each phase, and of a whole cell, in each quarter of the cells by the order of their ends."""
    ordered = sorted(statuses, key=lambda status: float(status["finished"]))
    bounds = [round(len(ordered) * part / QUARTERS) for part in range(QUARTERS + 1)]
    quarters = [ordered[low:high] for low, high in pairwise(bounds)]
    names = sorted({name for status in ordered for name in status["cost"]["phases_s"]})
    table = {
        name: [fmean(status["cost"]["phases_s"].get(name, 0.0) for status in quarter) for quarter in quarters]
        for name in names
    }
    table["a whole cell"] = [fmean(status["seconds"] for status in quarter) for quarter in quarters]
    return table


def main() -> int:
    """Run the sweep and print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--isolation", default="process", choices=("process", "shared_load"))
    parser.add_argument("--folder", type=Path, help="an empty one, in which the store stays")
    given = parser.parse_args()
    print(f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {given.cells} cells", flush=True)
    with tempfile.TemporaryDirectory(prefix="lbi-many-") as name:
        folder = given.folder.absolute() if given.folder else Path(name)
        store = folder / "lbi_store"
        with cluster(folder / "cluster") as conf:
            variables = {key: value for key, value in os.environ.items() if not key.startswith(("LBI_", "SLURM"))}
            variables |= {"SLURM_CONF": conf, "PYTHONPATH": str(ROOT), "LBI_STORE": str(store)}
            driver = taken(command(given.cells, given.jobs, given.isolation), folder, variables)
        statuses = [json.loads(file.read_text()) for file in store.glob("runs/*/*/status.json")]
        ok = sum(status["status"] == "ok" for status in statuses)
        print(f"{ok} of {given.cells} ok in {driver.wall_s:.0f} s; the driver's peak: {driver.peak_mb:.0f} MB")
        if not statuses:
            print(driver.output[-2000:])
            return 1
        for phase, seconds in by_quarter(statuses).items():
            print(f"{phase:24}{''.join(f'{value:9.3f}' for value in seconds)} s a cell in each quarter")
        verbs = {verb: cpu_and_memory([verb, "many"], store) for verb in ("status", "report")}
    for verb, (seconds, megabytes) in verbs.items():
        print(f"{verb}: {seconds:.2f} s of CPU time, {megabytes:.0f} MB")
    late = any(seconds > MOST_S for seconds, _ in verbs.values())
    return int(ok != given.cells or driver.peak_mb > MOST_MB or late)


if __name__ == "__main__":
    sys.exit(main())
