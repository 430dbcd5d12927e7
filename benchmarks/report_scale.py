"""What looking at a large sweep costs: CPU seconds and memory of `status` and `report`, by the number of cells.

    python benchmarks/report_scale.py [--cells 500 1000 2000]

The store is written as lbi.store lays it out, with results like those of a tiny model; nothing is measured. Twice the
cells should cost at most twice the seconds, less what a process costs without any.
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
from typing import Any

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "host": "node1",
    "cpu": "Some CPU",
    "cores": 8,
    "gpus": [],
    "packages": {"torch": "2.13.0"},
    "lbi": "0.1.0",
}
KERNELS = [{"name": f"kernel_{number}", "kind": "gemv", "share": 0.1, "ms": 0.5, "count": 30} for number in range(10)]


def write(file: Path, **content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"schema": 1, **content}))


def make_store(root: Path, cells: int) -> None:
    """A store with one finished sweep of so many cells."""
    write(root / "store.json", kind="lbi store")
    asked = {
        "command": "python -m lbi -m ...",
        "planned": 1.7e9,
        "baseline": None,
        "max_kld": 0.05,
        "notes": {},
        "problems": [],
    }
    lines = [{"schema": 1, "sweep": "many", **asked}]
    for index in range(cells):
        run_id, choices = f"{index:012x}", {"model": "tiny", "engine": "hf", "decoding": "greedy", "workload": "chat"}
        choices |= {"quantizer": f"q{index % 40}", "compiler": f"c{index % 5}", "cache": f"k{index % 7}"}
        overrides = [f"{group}={option}" for group, option in choices.items()]
        name = f"{choices['quantizer']} {choices['compiler']} {choices['cache']} group_size={index}"
        known = {
            "index": index,
            "name": name,
            "overrides": overrides,
            "choices": choices,
            "run_id": run_id,
            "env_id": "e0",
        }
        lines.append({**known, "verdict": "RUN", "reason": "", "rule": ""})
        result(root / "runs" / run_id / "e0", run_id, index)
    folder = root / "sweeps" / "many"
    folder.mkdir(parents=True)
    (folder / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def result(folder: Path, run_id: str, index: int) -> None:
    phases = {"start": 0.1, "load": 1.0, "warm up": 2.0, "measure": 4.0, "quality": 1.0, "other": 0.2}
    cost = {"phases_s": phases, "lane": "node1 0", "device": "cpu", "gpus": 0, "cpu_s": 5.0, "forked": True}
    ended = {
        "run_id": run_id,
        "status": "ok",
        "reason": "",
        "attempt": 1,
        "finished": 1.7e9 + 9 * index,
        "seconds": 8.3,
    }
    write(folder / "status.json", **ended, cost=cost)
    speed = 100.0 + index % 97 + index / 1e4
    metrics = {"decode_tok_s": speed, "decode_tok_s_lo": speed - 1, "decode_tok_s_hi": speed + 1, "repetitions": 5.0}
    metrics |= {
        "mean_kld": 1e-4 * (index % 89),
        "weight_bytes": 1e6 + index,
        "bits_per_weight": 4.5,
        "prefill_tok_s": 900.0,
    }
    attempt = folder / "attempt-1"
    write(attempt / "metrics.json", metrics=metrics, missing={"energy_j_per_token": "no meter"}, phases_s=phases)
    write(attempt / "effective.json", compiler={"graphs": 1}, kernels={"top": KERNELS}, cache={"class": "StaticCache"})
    write(attempt / "env.json", **ENVIRONMENT)
    write(attempt / "text.json", tokens=list(range(24)), text="a generated text " * 6)
    write(attempt / "verdict.json", status="ok", reason="", phases_s=phases)


def taken(arguments: list[str], root: Path) -> tuple[float, float]:
    """CPU seconds and megabytes of one verb."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "LBI_STORE": str(root)}
    command = [sys.executable, "-m", "lbi", *arguments]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root)
    output = process.stdout.read() if process.stdout else b""
    _, code, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(code) not in (0, 1):
        raise SystemExit(f"{' '.join(command)}\n{output.decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Print a line a number of cells."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[1, 500, 1000, 2000])
    given = parser.parse_args()
    print(f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("cells    status CPU s    MB    report CPU s    MB")
    for cells in given.cells:
        with tempfile.TemporaryDirectory(prefix="lbi-report-") as name:
            make_store(Path(name), cells)
            status, report = taken(["status", "many"], Path(name)), taken(["report", "many"], Path(name))
        print(f"{cells:>5}{status[0]:>16.2f}{status[1]:>6.0f}{report[0]:>16.2f}{report[1]:>6.0f}", flush=True)


if __name__ == "__main__":
    main()
