"""How good the estimate of a second sweep is: run a small sweep, then more of its kind, and compare.

    python benchmarks/estimate.py [--model smollm2_135m]

Three steps in one store of their own: a sweep, whose estimate is a guess; the same grid with one more
quantizer, which pays for that alone; and all of it measured again. The ratio is what the runs took, over the estimate
made before. Other programs on the machine spoil it, so their load stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""This checkout before what else is on the path: packages may be there alone."""


def sweep(store: Path, model: str, quantizers: str, *more: str) -> tuple[int, float, float]:
    """Run one; how many runs it had, their seconds, and what had been estimated."""
    command = [sys.executable, "-m", "lbi", "-m", f"model={model}", "tracker=none", "measure=brief", "cache=static"]
    command += ["compiler=eager,inductor", f"quantizer={quantizers}", "sweep.name=estimate", *more]
    variables = {**os.environ, "PYTHONPATH": PATH, "LBI_STORE": str(store), "LBI_CACHE": str(store / "cache")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=store)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    plan = (store / "sweeps" / "estimate" / "plan.jsonl").read_text().splitlines()
    header, cells = json.loads(plan[0]), [json.loads(line) for line in plan[1:]]
    took = []
    for cell in cells:
        status = json.loads((store / "runs" / cell["run_id"] / cell["env_id"] / "status.json").read_text())
        if status["finished"] >= header["planned"]:
            took.append(status["seconds"])
    return len(took), sum(took), header["estimate_s"]


def main() -> None:
    """Print a line a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2_135m")
    given = parser.parse_args()
    steps = (
        ("first, a guess", "none,int8_wo", ()),
        ("one more quantizer", "none,int8_wo,int4_wo", ()),
        ("all again", "none,int8_wo,int4_wo", ("sweep.mode=force",)),
    )
    print(f"{date.today()}, {given.model}, {os.cpu_count()} cores")
    print("step                    runs   took s   estimate s   ratio   load")
    with tempfile.TemporaryDirectory(prefix="lbi-estimate-") as folder:
        for what, quantizers, more in steps:
            runs, took, estimate = sweep(Path(folder), given.model, quantizers, *more)
            load = os.getloadavg()[0]
            print(f"{what:<24}{runs:>4}{took:>9.1f}{estimate:>13.1f}{took / estimate:>8.2f}{load:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
