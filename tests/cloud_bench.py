"""A store, SkyPilot's real client, a server that executes its jobs, and lbi run on them with stand-in children."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

from fakes.sky_server import FakeSky
from slurm_bench import ROOT, SITE, SWEEP, finish

SKY = Path(os.environ.get("LBI_SKY_VENV", ROOT / ".sky-venv")) / "bin" / "sky"


class CloudBench:
    """Runs lbi in a folder of its own, its rented machines being folders of `server`."""

    def __init__(self, folder: Path, server: FakeSky) -> None:
        self.folder, self.server = folder, server
        self.store = folder / "lbi_store"
        self.gate = folder / "gate"
        self.variables: dict[str, str] = {}
        self.home = folder / "driver_home"
        self.home.mkdir()

    def python(self, scripts: str) -> str:
        """What machines call Python: with stand-in children, and with nothing else of this machine's."""
        variables = f"LBI_TEST_SCRIPTS={scripts} LBI_TEST_GATE={self.gate} PYTHONPATH={SITE}"
        return f"env {variables} {sys.executable}"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start `python -m lbi` with these arguments."""
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "LBI_STORE": str(self.store),
            "SKYPILOT_API_SERVER_ENDPOINT": self.server.url,
            **self.variables,
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
        cloud = [
            "hydra/launcher=lbi_cloud",
            f"hydra.launcher.sky=[{SKY}]",
            f"hydra.launcher.python='{self.python(scripts)}'",
            "hydra.launcher.poll_s=1",
            "hydra.launcher.logs_s=1",
            "resources.setup=['true']",
        ]
        return self.start(*SWEEP, *cloud, *arguments, **variables)

    def run(self, *arguments: str, scripts: str = "", timeout: float = 240, **variables: str) -> tuple[int, str]:
        """Run a sweep to its end; exit code and output."""
        return finish(self.sweep(*arguments, scripts=scripts, **variables), timeout)

    def verb(self, *arguments: str) -> tuple[int, str]:
        return finish(self.start(*arguments), 120)

    def rows(self) -> list[dict[str, str]]:
        """The cells as the store has them, without asking anybody."""
        file = self.store / "sweeps" / "test" / "results.csv"
        with file.open() as opened:
            return list(csv.DictReader(opened))

    def statuses(self) -> list[str]:
        return [row["status"] for row in self.rows()]

    def home_runs(self) -> list[str]:
        """run_ids whose result has come home."""
        return [file.parent.parent.name for file in self.store.glob("runs/*/*/status.json")]

    def wait_home(self, runs: int, timeout: float = 90) -> None:
        """Wait until so many results have come home."""
        end = time.monotonic() + timeout
        while len(self.home_runs()) < runs:
            assert time.monotonic() < end, f"waited {timeout:.0f} s for {runs} results"
            time.sleep(0.2)

    def wait_jobs(self, count: int, status: str, timeout: float = 90) -> None:
        """Wait until so many jobs have this status."""
        end = time.monotonic() + timeout
        while sum(job.status == status for job in list(self.server.jobs.values())) < count:
            assert time.monotonic() < end, f"waited {timeout:.0f} s for {count} jobs {status}"
            time.sleep(0.1)
