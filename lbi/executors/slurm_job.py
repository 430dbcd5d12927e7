"""What a SLURM job does: checks its environment, executes its unit, and has itself started again.

SLURM speaks to a job through signals. SIGUSR2 comes ahead of the time limit and of a
preemption: the run in progress is stopped and published as `preempted`, and the job asks
to be requeued. SIGTERM comes with seconds to live. Finished runs are in the store, so a
job that starts again goes on where it was. What a job did not live to publish is settled
by whoever follows the sweep (reconcile.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from lbi.children import Stop
from lbi.executors import scheduler
from lbi.executors.job import changed, placed, publish_all
from lbi.files import BadFile, read_json
from lbi.slots import Slot
from lbi.store import SCHEMA, Store, job_name, node_name
from lbi.task_queue import TaskQueue
from lbi.unit_file import UnitFile, load_unit
from lbi.worker import Event, Work, log_line, run_slot

TERM_GRACE_S = 1.0
"""After SIGTERM the rest of the job's life may be a few seconds: a child gets this long."""

CANCEL_LOOK_S = 1.0
"""How often a job looks whether its current run has been cancelled."""


class JobStop(Stop):
    """Asked by SLURM's signals. `told` is SIGUSR2: the job may ask to be started again."""

    def __init__(self, unit_file: Path) -> None:
        super().__init__()
        self.told = False
        self.near_limit = False
        self.alone = True
        self.unit_file = unit_file
        self._cause: tuple[str, str] | None = None

    def on_usr2(self, number: int, frame: object) -> None:
        """Ahead of the time limit, or of a preemption."""
        self.told = True
        self.request()

    def on_term(self, number: int, frame: object) -> None:
        """A cancelled job, or the end of a preempted one: seconds are left."""
        self.request()
        threading.Timer(TERM_GRACE_S, self.request).start()

    def of(self, run_id: str) -> Stop:
        return _RunStop(self, run_id)

    def why(self) -> tuple[str, str]:
        if self._cause is None:
            self._cause = self._find_cause()
        return self._cause

    def _find_cause(self) -> tuple[str, str]:
        job = job_name() or ""
        left = scheduler.seconds_left(job)
        signal_s = float(os.environ.get("LBI_SIGNAL_S", "90"))
        self.near_limit = self.told and left is not None and left <= 2 * signal_s
        if self.near_limit and self.alone:
            return "timeout", "it alone took the job's whole time limit; raise resources.time_min"
        if self.near_limit:
            return "preempted", f"the time limit of job {job_name()} was near"
        if not self.told and scheduler.was_preempted(job) is False:
            return "cancelled", f"job {job} was cancelled"
        return "preempted", f"job {job} was preempted on {node_name()}"


class _RunStop(Stop):
    """The job's stop, and `lbi cancel` of one of its cells."""

    def __init__(self, job: JobStop, run_id: str) -> None:
        super().__init__()
        self.job, self.run_id = job, run_id
        self._looked, self._cancelled = -float("inf"), False

    @property
    def wanted(self) -> bool:
        if time.monotonic() - self._looked > CANCEL_LOOK_S:
            self._looked = time.monotonic()
            self._cancelled = self.run_id in cancelled_runs(self.job.unit_file)
        return self.job.wanted or self._cancelled

    @property
    def now(self) -> bool:
        return self.job.now

    def why(self) -> tuple[str, str]:
        return self.job.why() if self.job.wanted else ("cancelled", "cancelled with lbi cancel")


def cancelled_file(unit: Path) -> Path:
    """Where `lbi cancel` names the runs that this unit is to leave out."""
    return unit.with_suffix(".cancelled.json")


def cancelled_runs(unit: Path) -> frozenset[str]:
    """run_ids that this unit is to leave out."""
    try:
        return frozenset((read_json(cancelled_file(unit), SCHEMA) or {}).get("runs", []))
    except BadFile:
        return frozenset()


def run_file(file: Path) -> int:
    """Execute the unit in a file, in a job that submitit did not make; an exit code."""
    run(str(file))
    return 0


def run(unit_file: str) -> int:
    """Execute the unit in a file. Called by submitit inside the job; the number of runs that it began."""
    unit = load_unit(Path(unit_file))
    store = Store.open(unit.store, write=True)
    stop = JobStop(Path(unit_file))
    # submitit's own handlers pickle the job and ignore SIGTERM; the store makes both needless.
    signal.signal(signal.SIGUSR2, stop.on_usr2)
    signal.signal(signal.SIGTERM, stop.on_term)
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    print(f"job {job_name()} on {node_name()}, start {restart + 1}: {len(unit.tasks)} runs", flush=True)
    difference = changed(unit)
    if difference:
        publish_all(unit.tasks, store, "lost", difference)
        return 0
    tasks = placed(unit, store)
    started = 0

    def report(event: Event) -> None:
        nonlocal started
        started += event.kind == "start"
        # Runs that an earlier start of this job has finished took none of this one's time.
        stop.alone = started <= 1
        log_line(event)

    # A snapshot of the code is no checkout: what was submitted says which commit it is.
    recorded = {"git": unit.git, "host": node_name()}
    run_slot(Work(TaskQueue(tasks), store, report, stop, unit.since, recorded=recorded, sweep=unit.sweep), Slot())
    # A job that was only terminated is cancelled, or SLURM itself starts it again.
    if stop.told:
        _start_again(unit, restart)
    return started


def _start_again(unit: UnitFile, restart: int) -> None:
    allowed = max(task.config.resources.requeues for task in unit.tasks)
    job = job_name() or ""
    if restart >= allowed:
        print(f"started {restart + 1} times, which is as often as resources.requeues={allowed} allows", flush=True)
        return
    taken = scheduler.requeue(job)
    print("requeued" if taken else "SLURM did not take the requeue", flush=True)
    if taken:
        # The job ends by SLURM's hand; ending by itself first could pass for completed.
        time.sleep(60)
