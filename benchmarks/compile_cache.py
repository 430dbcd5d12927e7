"""What a compile costs cold, from the node's cache, and on another node seeded from the store.

    python benchmarks/compile_cache.py [--model smollm2_135m] [--rounds 1] [override ...]

One cell, three times in turn: with empty caches; again on the same node; with an empty node's cache and the store of
the first. A node is a cache folder and a temporary folder of its own, for inductor keeps precompiled headers in the
latter. Wall seconds are those of `compile_s`, CPU seconds those of the whole run; other programs spoil the former.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""This checkout before what else is on the path: packages may be there alone."""


def measure(command: list[str], store: Path, node: Path) -> dict[str, Any]:
    """Run the cell on a node; what its newest attempt found."""
    (node / "tmp").mkdir(parents=True, exist_ok=True)
    places = {"LBI_STORE": str(store), "LBI_CACHE": str(node / "cache"), "TMPDIR": str(node / "tmp")}
    variables = {**os.environ, "PYTHONPATH": PATH, **places}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=node)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    (file,) = store.glob("runs/*/*/status.json")
    status = json.loads(file.read_text())
    attempt = file.parent / f"attempt-{status['attempt']}"
    metrics, effective = (json.loads((attempt / name).read_text()) for name in ("metrics.json", "effective.json"))
    return {"status": status, "metrics": metrics["metrics"], "graph": effective["graph"]}


def show(what: str, found: dict[str, Any]) -> None:
    cost, graph = found["status"]["cost"], found["graph"]
    graphs_s = cost["phases_s"].get("graphs", 0.0)
    origin = "the store" if graph["from_the_store"] else "-" if graph["start"] == "cold" else "the node"
    print(
        f"{what:<28}{graph['start']:>6}{origin:>11}{found['metrics']['compile_s']:>12.1f}{cost['cpu_s']:>11.1f}"
        f"{graphs_s:>14.2f}{os.getloadavg()[0]:>7.1f}",
        flush=True,
    )


def main() -> None:
    """Print a line a start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "lbi",
        "-m",
        f"model={given.model}",
        "tracker=none",
        "measure=quick",
        "quality=off",
    ]
    command += ["cache=static", "compiler=inductor", "sweep.mode=force", "sweep.name=compile", *given.overrides]
    print(f"{date.today()}, {' '.join(command[4:])}, {os.cpu_count()} cores")
    print("start                       found       from   compile_s      CPU s   links, tar s   load")
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory(prefix="lbi-compile-") as name:
            folder = Path(name)
            store, node, other = folder / "store", folder / "node", folder / "other"
            show("empty caches", measure(command, store, node))
            show("again, the same node", measure(command, store, node))
            models = node / "cache" / "models"
            if models.exists():
                # A converted model is no part of this.
                shutil.copytree(models, other / "cache" / "models")
            show("another node, the same store", measure(command, store, other))
            size = sum(file.stat().st_size for file in store.glob("compile_caches/**/*.tar.gz"))
            print(f"the store's archive: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
