"""What a sweep has handed to a cluster: enough on disk that any shell can follow, adopt or cancel it.

    sweeps/<name>/submissions/<number>/
        claim.json          the driver that submits
        arrays.json         job name, units and cells of each array; written before sbatch
        units/<unit>.json   what a job executes
        array-<n>.json      the job id; written after sbatch
        submitted.json      every array is submitted, or why not
        logs/               what the jobs print

A driver killed between sbatch and array-<n>.json leaves an array whose name SLURM knows:
`Submissions.adopt` finds it again, so that it is neither lost nor submitted twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbi.executors.queues import Queue, Queues
from lbi.files import BadFile, read_json, write_json
from lbi.schedule import Unit, save_units
from lbi.store import SCHEMA, Store, live_owner, own_claim


@dataclass(frozen=True, slots=True)
class CellRef:
    """A cell as a submission lists it."""

    cell: int
    name: str
    run_id: str
    env_id: str


@dataclass(frozen=True, slots=True)
class UnitJob:
    """A unit and the job that executes it; `job` is the array task's id."""

    submission: Path
    unit: str
    job: str
    cells: tuple[CellRef, ...]
    began: float
    cluster: Mapping[str, Any] = field(default_factory=dict)

    def owes(self, status: str | None, finished: float | None) -> bool:
        """Whether the job may still measure a cell whose last result is this one (None: no result)."""
        return status is None or finished is None or finished < self.began or status in ("preempted", "lost")

    @property
    def log(self) -> Path:
        """What the job prints."""
        return self.submission / "logs" / f"{self.job}_0_log.out"


@dataclass(frozen=True, slots=True)
class Array:
    """Units that are submitted together, under a job name of their own."""

    name: str
    units: tuple[Unit, ...]


class SchedulerSilent(Exception):
    """The queue does not answer; `name` says whose."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} does not answer")


class Submissions:
    """All submissions of one sweep."""

    def __init__(self, store: Store, sweep: str) -> None:
        self.store, self.sweep = store, sweep
        self.folder = store.sweep_folder(sweep) / "submissions"

    def numbers(self) -> list[int]:
        """Numbers of the submissions, oldest first."""
        try:
            return sorted(int(entry.name) for entry in os.scandir(self.folder) if entry.name.isdigit())
        except OSError:
            return []

    def jobs(self) -> list[UnitJob]:
        """Every unit that has a job, of all submissions, oldest first."""
        found: list[UnitJob] = []
        for number in self.numbers():
            folder = self.path(number)
            listed = self._read(folder / "arrays.json") or {"arrays": []}
            for index, array in enumerate(listed["arrays"]):
                submitted = self._read(folder / f"array-{index}.json")
                if submitted and submitted.get("job"):
                    job = str(submitted["job"])
                    found += _unit_jobs(folder, array, job, float(listed["began"]), listed.get("cluster", {}))
        return found

    def clusters(self) -> list[dict[str, Any]]:
        """What each submission says of where it went, oldest first."""
        listed = [self._read(self.path(number) / "arrays.json") for number in self.numbers()]
        return [dict(content.get("cluster", {})) for content in listed if content]

    def array_names(self) -> list[str]:
        """Names of every array that was ever submitted."""
        listed = [self._read(self.path(number) / "arrays.json") for number in self.numbers()]
        return [str(array["name"]) for content in listed if content for array in content["arrays"]]

    def queues(self) -> Queues:
        """Everything that has had jobs of this sweep, asked as one."""
        return Queues(self.clusters())

    def path(self, number: int) -> Path:
        return self.folder / f"{number:03d}"

    def adopt(self, scheduler: Queue) -> bool:
        """Find the jobs of arrays whose driver died before it could note them.

        False while another driver is submitting. Raises `SchedulerSilent`.
        """
        for number in self.numbers():
            folder = self.path(number)
            if (folder / "submitted.json").exists():
                continue
            if live_owner(folder):
                return False
            arrays = (self._read(folder / "arrays.json") or {"arrays": []})["arrays"]
            unknown = {
                array["name"]: index
                for index, array in enumerate(arrays)
                if not (folder / f"array-{index}.json").exists()
            }
            ids = scheduler.named(list(unknown)) if unknown else {}
            if ids is None:
                raise SchedulerSilent(scheduler.name)
            for name, index in unknown.items():
                note_job(folder, index, ids.get(name), adopted=True)
            write_json(folder / "submitted.json", {"schema": SCHEMA, "adopted": True, "when": time.time()})
        return True

    def living(self, queue: Queue) -> set[str]:
        """run_ids that a queued or running job of this sweep has. Raises `SchedulerSilent`."""
        jobs = self.jobs()
        found = queue.jobs(job.job for job in jobs)
        if found is None:
            raise SchedulerSilent(queue.name)
        return {cell.run_id for job in jobs if not found[job.job].ended for cell in job.cells}

    def try_begin(self) -> Path | None:
        """The folder of a new submission, this process's alone; None if another driver was faster."""
        folder = self.path(max(self.numbers(), default=0) + 1)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            return None
        write_json(folder / "claim.json", own_claim())
        return folder

    def write_arrays(
        self, folder: Path, arrays: Sequence[Array], since: float, cluster: Mapping[str, Any] | None = None
    ) -> float:
        """Write the units, which array has which, and to whom they go, before anything is submitted; when that was."""
        rows = []
        for array in arrays:
            save_units(array.units, self.store, self.sweep, since, folder / "units")
            units = {
                unit.name: [[task.cell, task.name, task.run_id, task.env_id] for task in unit.tasks]
                for unit in array.units
            }
            rows.append({"name": array.name, "units": units})
        began = time.time()
        content = {"schema": SCHEMA, "began": began, "cluster": dict(cluster or {"kind": "slurm"}), "arrays": rows}
        write_json(folder / "arrays.json", content)
        return began

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            return read_json(file, SCHEMA)
        except BadFile as bad:
            self.store.problems.append(bad)
            return None


def note_job(folder: Path, index: int, job: str | None, *, adopted: bool = False) -> None:
    """Note an array's job id; None says that it was never submitted."""
    content = {"schema": SCHEMA, "job": job, "adopted": adopted, "when": time.time()}
    write_json(folder / f"array-{index}.json", content)


def _unit_jobs(
    folder: Path, array: dict[str, Any], submitted: str, began: float, cluster: Mapping[str, Any]
) -> Iterator[UnitJob]:
    """Task n of an array executes its n-th unit; one unit alone is submitted as a plain job.

    SkyPilot gives each job of an array an id of its own: they are joined by commas.
    """
    ids = submitted.split(",")
    alone = len(array["units"]) == 1
    for number, (unit, cells) in enumerate(array["units"].items()):
        if cluster.get("kind") == "sky":
            if number >= len(ids):
                return
            job = ids[number]
        else:
            job = submitted if alone else f"{submitted}_{number}"
        yield UnitJob(folder, unit, job, tuple(CellRef(*cell) for cell in cells), began, cluster)


@contextmanager
def marked_submitted(folder: Path) -> Iterator[None]:
    """While open, jobs are submitted; whatever ends it, the submission is over after it."""
    error = None
    try:
        yield
    except Exception as found:
        error = str(found)
        raise
    finally:
        write_json(folder / "submitted.json", {"schema": SCHEMA, "error": error, "when": time.time()})
