"""Speaks to SkyPilot, which rents, recovers and shuts down machines, through its command line.

SkyPilot lives in an environment of its own: it and wandb cannot agree on a version of click. A
call takes seconds, so callers ask seldom and for many jobs at once. As with SLURM, silence is
no answer about a job: callers get None then, and nothing is declared dead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.errors import ClusterError, InputError
from lbi.executors.scheduler import Job

PREFIX = "sky-"
"""Begins the ids of SkyPilot's jobs in a store, whose numbers SLURM may have given out too."""

STATES = {
    "SUCCEEDED": "COMPLETED",
    "FAILED": "FAILED",
    "FAILED_SETUP": "FAILED_SETUP",
    "FAILED_PRECHECKS": "FAILED_PRECHECKS",
    "FAILED_NO_RESOURCE": "FAILED_NO_RESOURCE",
    "FAILED_CONTROLLER": "NODE_FAIL",
    "CANCELLED": "CANCELLED",
    "CANCELLING": "COMPLETING",
    "RUNNING": "RUNNING",
    "WINDING_DOWN": "COMPLETING",
}
"""SkyPilot's states in the words that the follower knows; every other one is a job that waits."""

HOPELESS = frozenset({"FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE"})
"""Ends that the same request would come to again."""

ANSWER_S = 120.0
"""A call starts a Python with many packages, and may start SkyPilot's server."""

APPLY_S = 900.0
"""Making a pool uploads the code and asks every cloud for its offers."""

AT_ONCE = 3
"""Logs that are fetched at the same time."""

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool as SkyPilot has it: its status, how many workers are ready of how many, and what they cost until now.

    `dollars` is None where nobody knows.
    """

    name: str
    status: str
    workers: str
    dollars: float | None


class Sky:
    """SkyPilot through its command line. `recovered` counts how often each living job has lost its machine."""

    name = "SkyPilot's server"

    def __init__(self, command: Sequence[str] = ("sky",)) -> None:
        self.command = list(command)
        self.recovered: dict[str, int] = {}

    def check(self) -> None:
        """Raises `InputError` where there is no such command."""
        if shutil.which(self.command[0]) is None:
            raise InputError(
                "hydra.launcher.sky",
                " ".join(self.command),
                "there is no such command",
                "Install SkyPilot in an environment of its own (docs/cloud.md) and name its sky command",
            )

    def jobs(self, ids: Iterable[str]) -> dict[str, Job] | None:
        """State of each job by id; None if nobody answers."""
        wanted = set(ids)
        if not wanted:
            return {}
        listed = self._queue()
        if listed is None:
            return None
        known = {}
        for row in listed:
            job = f"{PREFIX}{row['job_id']}"
            self.recovered[job] = int(row.get("recovery_count") or 0)
            state = STATES.get(str(row["status"]), "PENDING")
            why = "" if state != "PENDING" else str(row["status"]).lower()
            known[job] = Job(job, state, "", str(row.get("failure_reason") or why), str(row.get("job_name") or ""))
        return {job: known.get(job, Job(job, "GONE")) for job in wanted}

    def named(self, names: Sequence[str]) -> dict[str, str] | None:
        """Ids of the jobs of each name, in the order of their ranks, joined by commas; None if nobody answers."""
        listed = self._queue()
        if listed is None:
            return None
        found: dict[str, list[int]] = {}
        for row in listed:
            if row.get("job_name") in names:
                found.setdefault(str(row["job_name"]), []).append(int(row["job_id"]))
        return {name: ",".join(f"{PREFIX}{number}" for number in sorted(ids)) for name, ids in found.items()}

    def cancel(self, ids: Sequence[str]) -> bool:
        """Cancel jobs; whether SkyPilot took it."""
        numbers = [job.removeprefix(PREFIX) for job in ids]
        return not numbers or self._ask("jobs", "cancel", "-y", *numbers) is not None

    def logs(self, ids: Sequence[str]) -> dict[str, str | None]:
        """What each job has printed so far; None for one whose log cannot be had."""
        with ThreadPoolExecutor(AT_ONCE, "sky") as threads:
            return dict(zip(ids, threads.map(self._log, ids), strict=True))

    def apply(self, pool: str, file: Path, secrets: Sequence[str]) -> None:
        """Make a pool, or bring it up to date. Raises `ClusterError` with SkyPilot's own words."""
        named = [item for name in secrets for item in ("--secret", name)]
        self._demand(APPLY_S, "jobs", "pool", "apply", "-y", "-p", pool, *named, str(file))

    def launch(self, pool: str, file: Path, count: int, secrets: Sequence[str]) -> None:
        """Submit `count` jobs, ranked from 0. Raises `ClusterError` with SkyPilot's own words."""
        named = [item for name in secrets for item in ("--secret", name)]
        arguments = ["jobs", "launch", "-y", "-d", "--pool", pool, "--num-jobs", str(count), *named, str(file)]
        self._demand(APPLY_S, *arguments)

    def down(self, pool: str) -> None:
        """End a pool and its machines. Raises `ClusterError` with SkyPilot's own words."""
        self._demand(APPLY_S, "jobs", "pool", "down", "-y", pool)

    def busy(self, pool: str, besides: Iterable[str] = ()) -> list[str] | None:
        """Names of living jobs of a pool, besides those of some names; None if nobody answers."""
        listed = self._queue()
        if listed is None:
            return None
        mine = set(besides)
        living = [row for row in listed if row.get("pool") == pool and not _over(str(row["status"]))]
        return [str(row.get("job_name")) for row in living if row.get("job_name") not in mine]

    def pools(self, names: Sequence[str]) -> list[Pool] | None:
        """Those of the pools that are up; None if nobody answers."""
        said = self._ask("jobs", "pool", "status", *names)
        if said is None:
            return None
        costs = self._costs()
        found = []
        for line in COLOURS.sub("", said).splitlines():
            words = line.split()
            # NAME VERSION UPTIME... STATUS WORKERS; a worker's own line has a number after the name and no slash.
            if words and words[0] in names and re.fullmatch(r"\d+/\d+", words[-1]):
                worker = re.compile(rf"{re.escape(words[0])}-\d+$")
                spent = None if costs is None else sum(cost for name, cost in costs.items() if worker.match(name))
                found.append(Pool(words[0], words[-2], words[-1], spent))
        return found

    def _costs(self) -> dict[str, float] | None:
        """Dollars by machine, as SkyPilot estimates them."""
        said = self._ask("cost-report", "-o", "json")
        try:
            listed = _json(said)
            return {str(row["name"]): float(row.get("total_cost") or 0.0) for row in listed}
        except (ValueError, KeyError, TypeError):
            return None

    def _queue(self) -> list[dict[str, Any]] | None:
        # Without -a only the last ten are listed.
        try:
            listed = _json(self._ask("jobs", "queue", "-a", "-v", "-o", "json"))
            return [row for row in listed if isinstance(row, dict) and "job_id" in row and "status" in row]
        except (ValueError, TypeError):
            return None

    def _log(self, job: str) -> str | None:
        return self._ask("jobs", "logs", "--no-follow", "--tail", "0", job.removeprefix(PREFIX), failing=True)

    def _ask(self, *arguments: str, failing: bool = False) -> str | None:
        """Output of a call, or None if it is missing, fails, or takes too long. With `failing`, also of one that fails.

        `sky jobs logs` ends with an error where the job has failed.
        """
        try:
            done = self._run(ANSWER_S, arguments)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout if done.returncode == 0 or (failing and done.stdout) else None

    def _demand(self, seconds: float, *arguments: str) -> None:
        try:
            done = self._run(seconds, arguments)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"sky {' '.join(arguments[:3])} took longer than {seconds:g} s") from error
        except OSError as error:
            raise ClusterError(f"sky {' '.join(arguments[:3])} cannot be run: {error}") from error
        if done.returncode:
            raise ClusterError(f"sky {' '.join(arguments[:3])} failed: {_last_words(done.stdout + done.stderr)}")

    def _run(self, seconds: float, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env=_variables(),
            # Ctrl-C must not end a submission half way.
            start_new_session=True,
        )


def _variables() -> Mapping[str, str]:
    """This process's variables without its Python's: SkyPilot has a Python and packages of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "NO_COLOR": "1"}


def _over(status: str) -> bool:
    return status == "SUCCEEDED" or status == "CANCELLED" or status.startswith("FAILED")


def _json(said: str | None) -> Any:
    """The JSON in what a call printed, behind what it may have said before. Raises `ValueError`."""
    if said is None:
        raise ValueError("no answer")
    found = re.search(r"^[\[{]", said, re.MULTILINE)
    if not found:
        raise ValueError("no JSON")
    return json.JSONDecoder().raw_decode(said[found.start() :])[0]


def _last_words(said: str) -> str:
    """The lines of an error that say what is wrong."""
    lines = [line.strip() for line in COLOURS.sub("", said).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|invalid|not found|exception|refused", line, re.IGNORECASE)]
    return " ".join((telling or lines or ["it said nothing"])[-3:])[:600]
