"""The truth about what was measured: plain files, one folder per result.

    store.json                              schema version
    runs/<run_id>/<env_id>/status.json      what the result is, and which attempt holds it
    runs/<run_id>/<env_id>/attempt-N/       everything that attempt wrote
    sweeps/<name>/                          plan, units, tables, report
    references/<id>/                        outputs of the unquantized model
    compile_caches/<env_id>/<arch>/<key>/   archives of compiled graphs
    devices/<id>.json                       measured peaks of a machine

Invariants: an attempt writes only into its own folder, so a run that was started
twice cannot mix its outputs; `status.json` appears by one atomic rename when the
attempt is over, so whatever has no status did not finish. A file that is damaged
or foreign is reported in `Store.problems` and counts as absent.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbi.cost import cost_of
from lbi.errors import InputError
from lbi.files import BadFile, read_json, write_json

SCHEMA = 1

STATUSES = (
    "ok",
    "oom",
    "unsupported",
    "not_applied",
    "numerics",
    "timeout",
    "preempted",
    "crash",
    "lost",
    "cancelled",
)

UNFINISHED = frozenset({"preempted", "lost", "cancelled"})
"""Statuses that say nothing about the setting: the run is simply missing."""

HEARTBEAT_S = 5.0
"""A live attempt touches its heartbeat this often."""

STALE_S = 120.0
"""An attempt on another host whose heartbeat is older than this is given up as lost."""


@dataclass(frozen=True, slots=True)
class Result:
    """A published result; `folder` is the attempt that holds its files."""

    run_id: str
    env_id: str
    status: str
    reason: str
    attempt: int
    finished: float
    seconds: float
    folder: Path
    host: str = ""
    cost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a run, claimed by this process. `folder` is its alone."""

    run_id: str
    env_id: str
    number: int
    folder: Path


class AlreadyRunning(Exception):
    """Another live process is measuring this run; `owner` says which."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        super().__init__(f"being measured by {owner}")


@dataclass(slots=True)
class Store:
    """The store under `root`. `problems` collects what could not be read."""

    root: Path
    problems: list[BadFile] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path, *, write: bool) -> Store:
        """The store in `path`, made if need be.

        Raises `InputError` where the folder cannot be used, or belongs to another schema.
        """
        root = Path(path).expanduser().absolute()
        store = cls(root)
        if root.exists() and not root.is_dir():
            raise InputError("store.path", path, "is not a folder", "Name a folder, or set LBI_STORE")
        try:
            marker = read_json(root / "store.json")
        except BadFile as bad:
            store.problems.append(bad)
            marker = None
        if marker and marker.get("schema") != SCHEMA:
            raise InputError(
                "store.path",
                path,
                f"was written with schema {marker.get('schema')}; this lbi reads {SCHEMA}",
                "Use the lbi that wrote it, or another folder",
            )
        if write:
            store._make_writable(path, marker is None)
        return store

    def _make_writable(self, path: str | Path, new: bool) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".write-probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
            if new:
                write_json(self.root / "store.json", {"schema": SCHEMA, "kind": "lbi store"})
        except OSError as error:
            raise InputError(
                "store.path",
                path,
                f"cannot be written ({error.strerror or error})",
                "Choose a folder you may write with store.path=FOLDER or LBI_STORE",
            ) from error

    def run_folder(self, run_id: str, env_id: str) -> Path:
        return self.root / "runs" / run_id / env_id

    def known_runs(self) -> set[str]:
        """run_ids that have a folder, read in one pass so that a plan of 10,000 cells asks once."""
        try:
            return {entry.name for entry in os.scandir(self.root / "runs") if entry.is_dir()}
        except OSError:
            return set()

    def result(self, run_id: str, env_id: str) -> Result | None:
        """The published result, or None. An `ok` without readable metrics counts as absent."""
        folder = self.run_folder(run_id, env_id)
        try:
            status = read_json(folder / "status.json", SCHEMA)
            if status is None:
                return None
            result = _parse_status(folder, run_id, env_id, status)
            if result.ok and read_json(result.folder / "metrics.json", SCHEMA) is None:
                raise BadFile(result.folder / "metrics.json", "is missing")
        except BadFile as bad:
            self.problems.append(bad)
            return None
        return result

    def results(self, run_id: str) -> Iterator[Result]:
        """Every published result of a run, whatever the environment."""
        try:
            environments = sorted(entry.name for entry in os.scandir(self.root / "runs" / run_id) if entry.is_dir())
        except OSError:
            return
        for env_id in environments:
            result = self.result(run_id, env_id)
            if result is not None:
                yield result

    def costs(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """env_id and cost of every good result that has one, from its status alone; what cannot be read is left out."""
        for run_id in sorted(self.known_runs()):
            try:
                environments = [entry.name for entry in os.scandir(self.root / "runs" / run_id) if entry.is_dir()]
            except OSError:
                continue
            for env_id in environments:
                try:
                    status = read_json(self.run_folder(run_id, env_id) / "status.json", SCHEMA) or {}
                except BadFile:
                    continue
                if status.get("status") == "ok" and (cost := cost_of(status.get("cost"))):
                    yield env_id, cost

    def read(self, result: Result, name: str) -> dict[str, Any] | None:
        """A JSON file of a result; None where it is missing or damaged (then a problem is noted)."""
        try:
            return read_json(result.folder / name, SCHEMA)
        except BadFile as bad:
            self.problems.append(bad)
            return None

    def claim(self, run_id: str, env_id: str, request: Mapping[str, Any]) -> Attempt:
        """Begin the next attempt at a run. Raises `AlreadyRunning` if a live process has it."""
        folder = self.run_folder(run_id, env_id)
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = attempt_numbers(folder)
            latest = max(numbers, default=0)
            if latest:
                owner = live_owner(folder / f"attempt-{latest}")
                if owner:
                    raise AlreadyRunning(owner)
                self._finish(run_id, env_id, latest)
            attempt = Attempt(run_id, env_id, latest + 1, folder / f"attempt-{latest + 1}")
            try:
                # mkdir is the lock: of two drivers that get here, one makes the folder.
                attempt.folder.mkdir()
            except FileExistsError:
                continue
            write_json(attempt.folder / "claim.json", own_claim())
            write_json(attempt.folder / "config.json", {"schema": SCHEMA, **request})
            return attempt

    def release(self, attempt: Attempt) -> None:
        """Give back an attempt that turned out not to be needed, as if it had not been claimed."""
        shutil.rmtree(attempt.folder, ignore_errors=True)

    def publish(
        self, attempt: Attempt, status: str, reason: str, seconds: float, cost: Mapping[str, Any] | None = None
    ) -> None:
        """End an attempt; `cost` is what it cost by phase. A later attempt that has already published is left alone."""
        outcome = {
            "schema": SCHEMA,
            "run_id": attempt.run_id,
            "env_id": attempt.env_id,
            "status": status,
            "reason": reason,
            "attempt": attempt.number,
            "host": node_name(),
            "finished": time.time(),
            "seconds": seconds,
            **({"cost": dict(cost)} if cost else {}),
        }
        write_json(attempt.folder / "outcome.json", outcome)
        published = self.result(attempt.run_id, attempt.env_id)
        if published is None or published.attempt <= attempt.number:
            write_json(self.run_folder(attempt.run_id, attempt.env_id) / "status.json", outcome)

    def _finish(self, run_id: str, env_id: str, number: int) -> None:
        """Publish what an attempt came to if its process has not got to it between writing the two files."""
        folder = self.run_folder(run_id, env_id)
        try:
            outcome = read_json(folder / f"attempt-{number}" / "outcome.json", SCHEMA)
        except BadFile:
            return
        published = self.result(run_id, env_id)
        if outcome and (published is None or published.attempt < number):
            write_json(folder / "status.json", outcome)

    def attempts(self, run_id: str, env_id: str) -> list[dict[str, Any]]:
        """Outcomes of the attempts that ended, oldest first."""
        folder = self.run_folder(run_id, env_id)
        outcomes = []
        for number in sorted(attempt_numbers(folder)):
            try:
                outcome = read_json(folder / f"attempt-{number}" / "outcome.json", SCHEMA)
            except BadFile as bad:
                self.problems.append(bad)
                continue
            if outcome:
                outcomes.append(outcome)
        return outcomes

    def running(self, run_id: str, env_id: str) -> Path | None:
        """The folder of the attempt that a live process holds, or None."""
        folder = self.run_folder(run_id, env_id)
        latest = max(attempt_numbers(folder), default=0)
        attempt = folder / f"attempt-{latest}"
        return attempt if latest and live_owner(attempt) else None

    def abandoned(self, run_id: str, job: str) -> Attempt | None:
        """The attempt at a run that this job began and did not end, in whatever environment."""
        try:
            environments = [entry.name for entry in os.scandir(self.root / "runs" / run_id) if entry.is_dir()]
        except OSError:
            return None
        for env_id in environments:
            folder = self.run_folder(run_id, env_id)
            number = max(attempt_numbers(folder), default=0)
            attempt = folder / f"attempt-{number}"
            try:
                claim = read_json(attempt / "claim.json", SCHEMA)
            except BadFile:
                continue
            if claim and claim.get("job") == job and not (attempt / "outcome.json").exists():
                return Attempt(run_id, env_id, number, attempt)
        return None

    def sweep_folder(self, name: str) -> Path:
        return self.root / "sweeps" / name

    def sweeps(self) -> list[str]:
        """Names of the sweeps, the one planned last first."""
        try:
            found = [entry for entry in os.scandir(self.root / "sweeps") if entry.is_dir()]
        except OSError:
            return []
        return [entry.name for entry in sorted(found, key=_planned_at, reverse=True)]


def attempt_numbers(folder: Path) -> list[int]:
    """Numbers of the attempt folders under a result's folder."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []
    return [int(match[1]) for match in (re.fullmatch(r"attempt-(\d+)", name) for name in names) if match]


def may_live(attempt: Path) -> bool:
    """Whether the processes of an attempt may live on although their job is over.

    Certain on this host; elsewhere, whether its heart has beaten within the last three beats.
    """
    try:
        claim = read_json(attempt / "claim.json", SCHEMA)
    except BadFile:
        claim = None
    if claim and claim["host"] == socket.gethostname() and claim["boot"] == _boot_id():
        return bool(_start_ticks(claim["pid"]) == claim["start_ticks"])
    return min(_age_s(attempt / "claim.json"), _age_s(attempt / "heartbeat")) < 3 * HEARTBEAT_S


def own_claim() -> dict[str, Any]:
    """What a claim says of the process that makes it."""
    return {"schema": SCHEMA, **_own_identity()}


def live_owner(attempt: Path) -> str | None:
    """Who is measuring in this attempt folder right now, or None if nobody is."""
    if (attempt / "outcome.json").exists():
        return None
    try:
        claim = read_json(attempt / "claim.json", SCHEMA)
    except BadFile:
        claim = None
    if claim is None:
        # Between mkdir and the claim lies a moment; a folder without a claim for longer was killed in it.
        return "a process that has just begun" if _age_s(attempt) < 10 else None
    owner = f"process {claim['pid']} on {claim['host']}"
    if claim["host"] == socket.gethostname() and claim["boot"] == _boot_id():
        return owner if _start_ticks(claim["pid"]) == claim["start_ticks"] else None
    return owner if min(_age_s(attempt / "claim.json"), _age_s(attempt / "heartbeat")) < STALE_S else None


def _parse_status(folder: Path, run_id: str, env_id: str, status: Mapping[str, Any]) -> Result:
    try:
        if status["run_id"] != run_id or status["status"] not in STATUSES:
            raise ValueError("belongs to another run, or has an unknown status")
        return Result(
            run_id=run_id,
            env_id=env_id,
            status=status["status"],
            reason=str(status["reason"]),
            attempt=int(status["attempt"]),
            finished=float(status["finished"]),
            seconds=float(status["seconds"]),
            folder=folder / f"attempt-{int(status['attempt'])}",
            host=str(status.get("host", "")),
            cost=cost_of(status.get("cost")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(folder / "status.json", f"is not a status of this run ({error})") from error


def _own_identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "start_ticks": _start_ticks(os.getpid()),
        "node": node_name(),
        "job": job_name(),
        "claimed": time.time(),
    }


def node_name() -> str:
    """This node as its scheduler calls it, else the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_name() -> str | None:
    """The job this process is part of (SLURM: "12" or "12_3"), or None."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("SKYPILOT_TASK_ID")


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def process_name() -> str:
    """A name for this process that no other one has, on whichever host."""
    return f"{socket.gethostname()}-{os.getpid()}-{_start_ticks(os.getpid())}"


def process_is_dead(name: str) -> bool:
    """Whether the process with this `process_name` is known to be gone; of other hosts' processes nothing is known."""
    host, _, rest = name.rpartition("-")[0].rpartition("-")
    ticks = name.rpartition("-")[2]
    return host == socket.gethostname() and rest.isdigit() and str(_start_ticks(int(rest))) != ticks


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie.

    A process number alone is not an identity: it is given out again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _alive(pid)
    return None if fields[0] in "ZX" else int(fields[19])


def _alive(pid: int) -> int | None:
    """Where there is no /proc: 0 for a process that exists. A number given out again goes unnoticed."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")


def _planned_at(entry: os.DirEntry[str]) -> float:
    try:
        return (Path(entry.path) / "plan.jsonl").stat().st_mtime
    except OSError:
        return 0.0
