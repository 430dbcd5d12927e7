"""What every executor does that hands units to something with a queue: SLURM, or a cloud.

Nothing is returned by a job but through the store; what was submitted is on disk before and
after it is, so that any shell can follow, adopt or cancel it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbi import snapshot
from lbi.children import Stop
from lbi.config import SweepConfig
from lbi.errors import ClusterError, InputError
from lbi.executors.follow import Follower
from lbi.executors.queues import Queue
from lbi.executors.reconcile import Ending, endings
from lbi.executors.scheduler import Job
from lbi.schedule import Durations, Unit
from lbi.store import Store
from lbi.submissions import Array, CellRef, SchedulerSilent, Submissions, UnitJob, marked_submitted, note_job
from lbi.worker import Report, Task

RETRY_S = (5.0,)
"""Pauses before a submission is tried again where the controller did not answer."""


class QueueExecutor:
    """Submits units, and follows them unless `settings.wait` is false. Subclasses say to whom, and how."""

    pack = True
    here = False
    ask_s = (2.0, 15.0)
    """How often the queue is asked: at first, and after ten minutes."""

    def __init__(self, sweep: str, settings: SweepConfig, scheduler: Queue) -> None:
        self.sweep, self.settings, self.scheduler = sweep, settings, scheduler

    def check(self, units: Sequence[Unit]) -> None:
        """Raises `InputError` for what cannot be submitted from here."""

    def cluster(self) -> Mapping[str, Any]:
        """What a later process must know to ask the same queue."""
        return {"kind": "slurm"}

    def code(self, folder: Path) -> Path:
        """The copy of the code that jobs run."""
        return snapshot.take(folder)

    def array_size(self, members: Sequence[Unit], start: int) -> int:
        """How many of `members`, from `start` on, one array may have."""
        raise InputError("hydra/launcher", type(self).__name__, "has no arrays")

    def send(
        self, folder: Path, array: Array, code: Path, durations: Durations, exclude: list[str], began: float
    ) -> str:
        """Submit one array; its job id. Raises `InputError` or `ClusterError`."""
        raise InputError("hydra/launcher", type(self).__name__, "submits nothing")

    def bring_home(self, store: Store, jobs: Sequence[UnitJob], states: Mapping[str, Job]) -> None:
        """Put results that jobs have made elsewhere into the store; where they share it there is nothing to do."""

    def endings(self, store: Store, job: UnitJob, state: Job, cells: list[CellRef]) -> list[Ending] | None:
        """How each of `cells`, which have no result, stands now that the job is over; None if that is not known yet."""
        return endings(store, job, state, cells)

    def hopeless(self, job: UnitJob, state: Job, run_id: str) -> str:
        """Why a run of an ended job would end so again; empty if it may not."""
        return ""

    def superseded(self, job: UnitJob, state: Job, done: int) -> bool:
        """Whether a living job is to be cancelled, and its open cells are to have another; `done` cells have ended."""
        return False

    def waited(self, job: UnitJob, waited_s: float, limit_s: float) -> bool:
        """Whether a job that has waited for longer than it may goes on waiting all the same."""
        return False

    def over(self, store: Store) -> None:
        """Called once nothing is followed any more and nothing was detached."""

    def execute(self, units: Sequence[Unit], store: Store, report: Report, since: float) -> Stop:
        """Submit what is not yet queued, and follow all of it.

        Raises `InputError` for a request that is refused, `ClusterError` where nobody answers.
        """
        self.check(units)
        stop = Stop()
        count = self.submit(units, store, since)
        tasks = {task.run_id: task for unit in units for task in unit.tasks}
        if not self.settings.wait:
            stop.detached = (
                f"Submitted {count} jobs. Follow them from any shell: python -m lbi status {self.sweep} --watch "
                f"--store {store.root}\nCancel them: python -m lbi cancel {self.sweep} --store {store.root}"
            )
            return stop
        Follower(self, store, tasks, since, report).run(stop)
        return stop

    def submit(self, units: Sequence[Unit], store: Store, since: float, exclude: Iterable[str] = ()) -> int:
        """Submit the tasks that no living job of this sweep has; how many jobs that made."""
        submissions = Submissions(store, self.sweep)
        folder, wanted = self._begin(submissions, units)
        if folder is None:
            return 0
        arrays = self._arrays(wanted, folder.name)
        with marked_submitted(folder):
            began = submissions.write_arrays(folder, arrays, since, self.cluster())
            code = self.code(submissions.folder.parent)
            durations = Durations(store)
            for index, array in enumerate(arrays):
                try:
                    job = self.send(folder, array, code, durations, sorted(exclude), began)
                except (ClusterError, InputError):
                    if index:
                        go_on = f"{index} of {len(arrays)} arrays are submitted and go on"
                        print(f"{go_on}; to end them: python -m lbi cancel {self.sweep}")
                    raise
                note_job(folder, index, job)
        return len(wanted)

    def _begin(self, submissions: Submissions, units: Sequence[Unit]) -> tuple[Path | None, list[Unit]]:
        """This process's own submission and its units, or None if every task is queued already."""
        silent_until = time.monotonic() + sum(RETRY_S)
        while True:
            try:
                queue = self._queue(submissions)
                if submissions.adopt(queue):
                    wanted = without(units, submissions.living(queue))
                    if not wanted:
                        return None, []
                    folder = submissions.try_begin()
                    if folder is not None:
                        return folder, wanted
            except SchedulerSilent as silent:
                if time.monotonic() > silent_until:
                    raise ClusterError(f"nothing was submitted: {silent}. The same command tries again") from silent
            time.sleep(0.3)

    def _queue(self, submissions: Submissions) -> Queue:
        """Whom to ask about this sweep's jobs: earlier ones may have gone elsewhere."""
        kinds = {cluster.get("kind", "slurm") for cluster in submissions.clusters()}
        return self.scheduler if kinds <= {self.cluster()["kind"]} else submissions.queues()

    def _arrays(self, units: Sequence[Unit], number: str) -> list[Array]:
        """One array per resource class, and more where arrays may not be as long.

        An array whose driver died is found by its name, so no other store's may have the same.
        """
        own = uuid.uuid4().hex[:8]
        arrays: list[Array] = []
        for members in classes(units):
            start = 0
            while start < len(members):
                size = max(1, self.array_size(members, start))
                name = f"lbi-{self.sweep}-{number}-{own}-{len(arrays)}"
                arrays.append(Array(self.array_name(name), tuple(members[start : start + size])))
                start += size
        return arrays

    def array_name(self, name: str) -> str:
        """The name in the queue's own spelling."""
        return name


def classes(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that may share an array: the same resources and device."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        config = unit.tasks[0].config
        found.setdefault(repr((config.resources, config.engine.device)), []).append(unit)
    return list(found.values())


def gpus_of(task: Task) -> int:
    """GPUs of a task's job."""
    if task.config.resources.gpus is not None:
        return task.config.resources.gpus
    return 1 if task.config.engine.device == "cuda" or task.config.resources.gpu_type else 0


def amount(units: Sequence[Unit], store: Store) -> tuple[float, float, int, bool]:
    """Seconds, GPU seconds, GPUs of a job, and whether a part of it is a guess."""
    tasks = [task for unit in units for task in unit.tasks]
    seconds = gpu_seconds = 0.0
    gpus, guessed = 0, False
    for task, (took, guess) in zip(tasks, Durations(store).of(tasks), strict=True):
        cards = gpus_of(task)
        seconds, gpu_seconds, guessed = seconds + took, gpu_seconds + took * cards, guessed or guess
        gpus = max(gpus, cards)
    return seconds, gpu_seconds, gpus, guessed


def forecast_text(where: str, units: Sequence[Unit], store: Store) -> str:
    """Jobs, GPUs and GPU time that these units will take, in words."""
    seconds, gpu_seconds, gpus, guessed = amount(units, store)
    count = len(classes(units))
    sure = "in part a guess" if guessed else "from what like runs took"
    time_text = f"{gpu_seconds / 3600:.2f} GPU hours" if gpus else f"{seconds / 3600:.2f} hours without a GPU"
    cards_text = f", {gpus} GPU each" if gpus else ""
    classes_text = f"{count} resource class{'es' if count > 1 else ''}"
    return f"{where}: {len(units)} jobs in {classes_text}{cards_text}; {time_text}, {sure}."


def without(units: Sequence[Unit], queued: set[str]) -> list[Unit]:
    """The units less the runs that are queued already."""
    left = [replace(unit, tasks=tuple(task for task in unit.tasks if task.run_id not in queued)) for unit in units]
    return [unit for unit in left if unit.tasks]
