"""What dispatching costs: cells that do nothing, sent to the same SLURM cluster by lbi and by its peer.

    python benchmarks/dispatch.py [--cells 200] [--sides peer,lbi] [--rounds 1] [--scale 2000]

The peer is hydra-submitit-launcher, in an environment of its own with no more than it needs.
The cluster is that of scripts/slurm, four virtual nodes on this machine; so the daemons and
the jobs share its cores with the driver, and all their CPU time is counted. What a cell costs
here is all overhead: the peer's task function returns at once, lbi's measuring process is a
stand-in, in units of 25. Rounds alternate between the sides. --scale then submits so many
cells through lbi alone, detached, and looks at them with `lbi status`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cost import Cost, Meter, measure, metering

ROOT = Path(__file__).parent.parent
PEER = ("hydra-submitit-launcher==1.2.0", "hydra-core==1.3.*", "submitit==1.5.4")
PARALLEL = 256
"""Jobs of an array that may run at a time: more than the cluster has cores, so that neither side is held back."""

PEER_APP = """
import hydra


@hydra.main(version_base="1.3", config_path=None)
def main(config):
    pass


main()
"""


@dataclass(frozen=True)
class Side:
    """A way to run `cells` trivial cells. `finished` counts those that a run in a folder really did."""

    name: str
    command: list[str]
    variables: Mapping[str, str]
    finished: Callable[[Path], int]


def peer(cells: int, folder: Path) -> Side:
    """hydra-submitit-launcher, installed for this run only."""
    environment = folder / "peer"
    python = str(environment / "bin" / "python")
    install([sys.executable, "-m", "venv", str(environment)])
    install([python, "-m", "pip", "install", "--quiet", *PEER])
    app = environment / "app.py"
    app.write_text(PEER_APP)
    command = [python, str(app), "-m", f"+cell=range({cells})", "hydra/launcher=submitit_slurm"]
    command += [
        f"hydra.launcher.array_parallelism={PARALLEL}",
        "hydra.sweep.dir=sweep",
        "hydra.launcher.timeout_min=60",
    ]
    return Side(PEER[0].replace("==", " "), command, {}, lambda run: len(list(run.glob("sweep/*/.hydra/config.yaml"))))


def install(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}")


def lbi(cells: int, folder: Path) -> Side:
    """This checkout, with the tests' stand-in for the measuring process."""
    command = [sys.executable, "-m", "lbi", "-m", "model=tiny_random", "quality=off", "tracker=none"]
    command += ["sweep.name=dispatch", f"workload.new_tokens=range(2,{cells + 2})", "hydra/launcher=lbi_slurm"]
    command += [f"resources.array_parallelism={PARALLEL}", "resources.runs_per_job=25"]
    variables = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fakes' / 'site'}",
        "LBI_STORE": "lbi_store",
        "LBI_TEST_SCRIPTS": "",
    }

    def finished(run: Path) -> int:
        files = run.glob("lbi_store/runs/*/*/status.json")
        return sum(json.loads(file.read_text())["status"] == "ok" for file in files)

    return Side("lbi", command, variables, finished)


SIDES: dict[str, Callable[[int, Path], Side]] = {"peer": peer, "lbi": lbi}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """A cluster for this run only; its SLURM_CONF."""
    scripts = ROOT / "scripts" / "slurm"
    started = subprocess.run(
        [str(scripts / "start"), str(folder)],
        env={**os.environ, "OWNER": str(os.getpid())},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if started.returncode:
        raise SystemExit(started.returncode)
    try:
        yield started.stdout.strip().removeprefix("export SLURM_CONF=")
    finally:
        subprocess.run([str(scripts / "stop"), "--purge", str(folder)], stdout=subprocess.DEVNULL, check=False)


def wait_idle(variables: Mapping[str, str]) -> None:
    """Until the cluster has no jobs: the last ones end a little after their results are there."""
    while subprocess.run(["squeue", "-h"], env=dict(variables), capture_output=True, check=True).stdout.strip():
        time.sleep(0.2)


def run(side: Side, cells: int, folder: Path, conf: str, meter: Meter) -> Cost:
    """One round of one side, checked for having done all cells."""
    folder.mkdir()
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LBI_", "SLURM"))}
    variables |= {"SLURM_CONF": conf, **side.variables}
    cost = measure(side.command, folder, variables, meter, settle=lambda: wait_idle(variables))
    if side.finished(folder) != cells:
        raise SystemExit(f"{side.name} finished {side.finished(folder)} of {cells} cells; its files are in {folder}")
    return cost


@dataclass(frozen=True)
class Taken:
    """What one command took, and its output."""

    wall_s: float
    peak_mb: float
    output: str


def taken(command: list[str], folder: Path, variables: Mapping[str, str]) -> Taken:
    """Run a command to its end; the peak memory is that of its own process."""
    began = time.perf_counter()
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=dict(variables), stdout=output, stderr=subprocess.STDOUT)
        _, _, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        output.seek(0)
        return Taken(wall_s, usage.ru_maxrss / 1024, output.read())


def scale(cells: int, folder: Path, conf: str) -> None:
    """Submit many cells, let go, and look at them while they run and when they are done."""
    folder.mkdir()
    side = lbi(cells, folder)
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LBI_", "SLURM"))}
    variables |= {"SLURM_CONF": conf, **side.variables}
    look = [sys.executable, "-m", "lbi", "status", "dispatch"]
    # This machine is the login node and all others: 256 jobs starting at once would be timed with the looking.
    few = "resources.array_parallelism=4"
    submitted = taken([*side.command, few, "sweep.wait=false"], folder, variables)
    print(f"\n{cells} cells: planned and submitted in {submitted.wall_s:.1f} s, {submitted.peak_mb:.0f} MB at the peak")
    time.sleep(10)
    running = taken(look, folder, variables)
    print(f"status while they run: {running.wall_s:.2f} s; {running.output.splitlines()[0]}")
    wait_idle(variables)
    done = taken(look, folder, variables)
    print(f"status when done: {done.wall_s:.2f} s; {done.output.splitlines()[0]}")
    if side.finished(folder) != cells:
        raise SystemExit(f"{side.finished(folder)} of {cells} cells are done")


def main() -> None:
    """Measure the sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--sides", default="peer,lbi")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lbi-dispatch-") as name, metering() as meter:
        folder = Path(name)
        sides = [SIDES[side](given.cells, folder) for side in given.sides.split(",") if side]
        with cluster(folder / "cluster") as conf:
            print(f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {given.cells} cells")
            print(f"CPU time is that of {meter.counts}.")
            print(
                "side                              wall s   CPU s   CPU s/cell   files   files/cell   CPU s of others"
            )
            for index in range(given.rounds):
                for side in sides:
                    cost = run(side, given.cells, folder / f"{side.name}-{index}".replace(" ", "-"), conf, meter)
                    print(
                        f"{side.name:<32}{cost.wall_s:>8.1f}{cost.cpu_s:>8.1f}{cost.cpu_s / given.cells:>13.3f}"
                        f"{cost.files:>8}{cost.files / given.cells:>13.1f}{cost.others_cpu_s:>18.1f}",
                        flush=True,
                    )
            if given.scale:
                scale(given.scale, folder / "scale", conf)


if __name__ == "__main__":
    main()
