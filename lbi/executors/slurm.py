"""Sends units to SLURM through submitit: one job array per resource class, chunked to what the cluster takes.

Nothing is returned through submitit: a job is given a file and leaves its results in the
store, so that the sweep can be followed from any shell, or not at all.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbi import snapshot
from lbi.children import Stop
from lbi.config import ResourcesConfig, SweepConfig
from lbi.errors import ClusterError, InputError
from lbi.executors.follow import Follower
from lbi.executors.scheduler import Scheduler
from lbi.model_files import inspect
from lbi.schedule import Durations, Unit
from lbi.store import Store
from lbi.submissions import Array, SchedulerSilent, Submissions, marked_submitted, note_job
from lbi.worker import Report, Task

START_S = 600.0
"""Added to a job's time limit: imports, a cold file system, a queue of downloads."""

GUESS_FACTOR, KNOWN_FACTOR = 4.0, 2.0
"""A time limit is this many times the estimate: one too short costs a requeue, one too long a place in line."""

TRANSIENT = ("Unable to contact slurm controller", "Socket timed out", "temporarily", "Connection refused")
RETRY_S = (5.0,)
"""Pauses before sbatch is tried again where the controller did not answer."""


class SlurmExecutor:
    """Submits units, and follows them unless `settings.wait` is false."""

    pack = True
    here = False

    def __init__(self, sweep: str, settings: SweepConfig) -> None:
        self.sweep, self.settings = sweep, settings
        self.scheduler = Scheduler()

    def forecast(self, units: Sequence[Unit], store: Store) -> str:
        """Jobs, GPUs and GPU time that these units will take, in words."""
        durations = Durations(store)
        seconds = gpus = gpu_seconds = 0.0
        guessed = False
        for task in (task for unit in units for task in unit.tasks):
            took, guess = durations.seconds(task.config)
            cards = gpus_of(task)
            seconds, gpu_seconds, guessed = seconds + took, gpu_seconds + took * cards, guessed or guess
            gpus = max(gpus, cards)
        classes = len(_classes(units))
        sure = "in part a guess" if guessed else "from what like runs took"
        time_text = f"{gpu_seconds / 3600:.2f} GPU hours" if gpus else f"{seconds / 3600:.2f} hours without a GPU"
        cards_text = f", {gpus:.0f} GPU each" if gpus else ""
        return (
            f"SLURM: {len(units)} jobs in {classes} resource class{'es' if classes > 1 else ''}{cards_text}; "
            f"{time_text}, {sure}."
        )

    def execute(self, units: Sequence[Unit], store: Store, report: Report, since: float) -> Stop:
        """Submit what is not yet queued, and follow all of it.

        Raises `InputError` for a request that SLURM refuses, `ClusterError` where it does not answer.
        """
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise InputError(
                "hydra/launcher", "lbi_slurm", "there is no sbatch or srun on this machine", "Run it on a login node"
            )
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
            submissions.write_arrays(folder, arrays, since)
            code = snapshot.take(submissions.folder.parent)
            durations = Durations(store)
            for index, array in enumerate(arrays):
                try:
                    job = self._sbatch(folder, array, code, durations, sorted(exclude))
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
                if submissions.adopt(self.scheduler):
                    wanted = _without(units, submissions.living(self.scheduler))
                    if not wanted:
                        return None, []
                    folder = submissions.try_begin()
                    if folder is not None:
                        return folder, wanted
            except SchedulerSilent as silent:
                if time.monotonic() > silent_until:
                    raise ClusterError(f"nothing was submitted: {silent}. The same command tries again") from silent
            time.sleep(0.3)

    def _arrays(self, units: Sequence[Unit], number: str) -> list[Array]:
        """One array per resource class, and more where the cluster's arrays are too short.

        An array whose driver died is found by its name, so no other store's may have the same.
        """
        size, own = self.scheduler.max_array_size(), uuid.uuid4().hex[:8]
        arrays: list[Array] = []
        for members in _classes(units):
            for start in range(0, len(members), size):
                name = f"lbi-{self.sweep}-{number}-{own}-{len(arrays)}"
                arrays.append(Array(name, tuple(members[start : start + size])))
        return arrays

    def _sbatch(self, folder: Path, array: Array, code: Path, durations: Durations, exclude: list[str]) -> str:
        """Submit one array; its job id."""
        from submitit import AutoExecutor

        from lbi.executors import slurm_job

        resources = array.units[0].tasks[0].config.resources
        python = {"slurm_python": "python3"} if resources.container else {}
        executor = AutoExecutor(folder=folder / "logs", cluster="slurm", **python)
        executor.update_parameters(**parameters(array, code, durations, exclude))
        files = [str(folder / "units" / f"{unit.name}.json") for unit in array.units]
        for pause in (*RETRY_S, None):
            try:
                jobs = executor.map_array(slurm_job.run, files)
                return str(jobs[0].job_id).split("_")[0]
            except RuntimeError as error:
                reason = _why(error)
                if pause is None or not any(sign in reason for sign in TRANSIENT):
                    break
                time.sleep(pause)
        if exclude and "node" in reason:
            # Better on a node that has failed than nowhere.
            return self._sbatch(folder, array, code, durations, [])
        if any(sign in reason for sign in TRANSIENT):
            raise ClusterError(f"SLURM did not take the jobs of {array.name}: {reason}. The same command tries again")
        raise InputError("resources", resources.name, f"SLURM refused the jobs: {reason}", "Change resources.*")


def parameters(array: Array, code: Path, durations: Durations, exclude: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters for one array."""
    task = array.units[0].tasks[0]
    resources = task.config.resources
    minutes = resources.time_min or max(time_limit_min(unit, durations) for unit in array.units)
    signal_s = min(resources.signal_s, minutes * 30)
    lines = [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export LBI_SIGNAL_S={signal_s}",
    ]
    left_out = [resources.exclude, *exclude] if resources.exclude else list(exclude)
    chosen = {
        "name": array.name,
        "timeout_min": minutes,
        "stderr_to_stdout": True,
        "mem_gb": resources.memory_gb or memory_gb(task),
        "cpus_per_task": resources.cpus,
        "slurm_signal_delay_s": signal_s,
        "slurm_array_parallelism": resources.array_parallelism,
        "slurm_partition": resources.partition,
        "slurm_constraint": resources.constraint,
        "slurm_account": resources.account,
        "slurm_qos": resources.qos,
        "slurm_exclusive": _exclusive(task) or None,
        "slurm_exclude": ",".join(left_out) or None,
        "slurm_setup": [*resources.setup, *lines],
        "slurm_additional_parameters": {"requeue": True, **_gpus(task), **resources.sbatch},
        "slurm_srun_args": _container(resources) or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def time_limit_min(unit: Unit, durations: Durations) -> int:
    """A job's time limit, in minutes, from the estimate of its runs."""
    total = START_S
    for task in unit.tasks:
        seconds, guess = durations.seconds(task.config)
        total += min(seconds * (GUESS_FACTOR if guess else KNOWN_FACTOR), task.config.resources.run_timeout_s)
    return math.ceil(total / 60)


def memory_gb(task: Task) -> int | None:
    """Host memory to ask for, in GB: on a CPU the weights, their quantized copy and the reference's; None if unknown.

    Clusters give little by default, and what exceeds it is killed.
    """
    try:
        parameters = inspect(task.config.model).parameters()
    except InputError:
        parameters = None
    if parameters is None:
        return None
    weights = parameters * (4 if task.config.model.dtype == "float32" else 2) / 1e9
    return math.ceil(6 + 3 * weights if task.config.engine.device == "cpu" else 8 + 1.5 * weights)


def _exclusive(task: Task) -> bool:
    """Timings on a CPU suffer from neighbours, so a cell there gets a node of its own unless told otherwise."""
    chosen = task.config.resources.exclusive
    return task.config.engine.device == "cpu" if chosen is None else chosen


def gpus_of(task: Task) -> int:
    """GPUs of a task's job."""
    if task.config.resources.gpus is not None:
        return task.config.resources.gpus
    return 1 if task.config.engine.device == "cuda" or task.config.resources.gpu_type else 0


def _gpus(task: Task) -> dict[str, str]:
    count, kind = gpus_of(task), task.config.resources.gpu_type
    # submitit's gpus_per_node takes no type.
    return {"gres": f"gpu:{kind}:{count}" if kind else f"gpu:{count}"} if count else {}


def _container(resources: ResourcesConfig) -> list[str]:
    mounts = [f"--container-mounts={resources.mounts}"] if resources.mounts else []
    return [f"--container-image={resources.container}", *mounts] if resources.container else []


def _classes(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that may share an array: the same resources and device."""
    classes: dict[str, list[Unit]] = {}
    for unit in units:
        config = unit.tasks[0].config
        classes.setdefault(repr((config.resources, config.engine.device)), []).append(unit)
    return list(classes.values())


def _without(units: Sequence[Unit], queued: set[str]) -> list[Unit]:
    """The units less the runs that are queued already."""
    left = [replace(unit, tasks=tuple(task for task in unit.tasks if task.run_id not in queued)) for unit in units]
    return [unit for unit in left if unit.tasks]


def _why(error: RuntimeError) -> str:
    """What sbatch said, out of submitit's exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: error: ") for line in lines if line.startswith("sbatch: error")]
    return "; ".join(said) or (lines[-1] if lines else type(error).__name__)
