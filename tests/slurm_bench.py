"""A store, a cluster, and lbi run on it with stand-in children."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster

ROOT = Path(__file__).parent.parent
SITE = Path(__file__).parent / "fakes" / "site"
SWEEP = ["-m", "model=tiny_random", "tracker=none", "measure=quick", "quality=off", "sweep.name=test"]
SLURM = ["hydra/launcher=lbi_slurm", "resources.memory_gb=4"]


class SlurmBench:
    """Runs lbi in a folder of its own. `code` is the checkout that the driver runs from."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster, self.code = folder, cluster, ROOT
        self.store = folder / "lbi_store"

    def start(self, *arguments: str, scripts: str = "", **variables: str) -> subprocess.Popen[str]:
        """Start `python -m lbi` with these arguments."""
        environment = {
            **os.environ,
            **self.cluster.environment,
            "PYTHONPATH": f"{self.code}:{SITE}",
            "LBI_STORE": str(self.store),
            "LBI_TEST_SCRIPTS": scripts,
            **variables,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "lbi", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def sweep(self, *arguments: str, scripts: str = "", **variables: str) -> subprocess.Popen[str]:
        """Start a sweep whose cells differ in workload.new_tokens."""
        return self.start(*SWEEP, *SLURM, *arguments, scripts=scripts, **variables)

    def run(self, *arguments: str, scripts: str = "", timeout: float = 240, **variables: str) -> tuple[int, str]:
        """Run a sweep to its end; exit code and output."""
        return finish(self.sweep(*arguments, scripts=scripts, **variables), timeout)

    def verb(self, *arguments: str) -> tuple[int, str]:
        return finish(self.start(*arguments), 60)

    def rows(self) -> list[dict[str, str]]:
        """The cells, as `lbi collect` finds them now."""
        self.verb("collect", "test")
        with (self.store / "sweeps" / "test" / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def statuses(self) -> list[str]:
        return [row["status"] for row in self.rows()]

    def outcomes(self, cell: int) -> list[str]:
        """Statuses of all attempts at a cell that ended, oldest first."""
        run_id = self.rows()[cell]["run_id"]
        files = sorted((self.store / "runs" / run_id).glob("*/attempt-*/outcome.json"))
        found = [json.loads(file.read_text()) for file in files]
        return [outcome["status"] for outcome in sorted(found, key=lambda outcome: float(outcome["finished"]))]

    def attempts(self, cell: int) -> int:
        run_id = self.rows()[cell]["run_id"]
        return len(list((self.store / "runs" / run_id).glob("*/attempt-*")))

    def jobs(self) -> list[str]:
        """Ids of the arrays or jobs submitted so far."""
        files = sorted(self.store.glob("sweeps/test/submissions/*/array-*.json"))
        return [str(json.loads(file.read_text())["job"]) for file in files]

    def wait_jobs(self, count: int = 1, timeout: float = 30) -> list[str]:
        """Wait until so many arrays are submitted."""
        wait(lambda: len(self.jobs()) >= count, timeout, f"{count} submitted arrays")
        return self.jobs()

    def wait_begun(self, runs: int = 1, timeout: float = 40) -> list[dict[str, Any]]:
        """Wait until so many children are measuring; their attempts' claims."""

        def begun() -> list[Path]:
            return [file.parent for file in self.store.glob("runs/*/*/attempt-*/progress.json")]

        wait(lambda: len(begun()) >= runs, timeout, f"{runs} runs to begin")
        return [json.loads((folder / "claim.json").read_text()) for folder in begun()]


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """Exit code and output; a process that does not end in time is killed and its output shown."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout:.0f} s:\n{output}") from None
    return process.returncode, output


def wait(condition: Callable[[], bool], timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.1)


def without_times(text: str) -> str:
    """Output whose measured seconds do not matter."""
    return re.sub(r"\d+ s\b", "N s", text)
