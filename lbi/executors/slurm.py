"""Sends units to SLURM through submitit: one job array per resource class, chunked to what the cluster takes.

Nothing is returned through submitit: a job is given a file and leaves its results in the
store, so that the sweep can be followed from any shell, or not at all.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lbi.config import ResourcesConfig, SweepConfig
from lbi.errors import ClusterError, InputError
from lbi.executors.queue_executor import RETRY_S, QueueExecutor, forecast_text, gpus_of
from lbi.executors.scheduler import Scheduler
from lbi.model_files import inspect
from lbi.schedule import Durations, Unit
from lbi.store import Store
from lbi.submissions import Array
from lbi.worker import Task

START_S = 600.0
"""Added to a job's time limit: imports, a cold file system, a queue of downloads."""

GUESS_FACTOR, KNOWN_FACTOR = 4.0, 2.0
"""A time limit is this many times the estimate: one too short costs a requeue, one too long a place in line."""

TRANSIENT = ("Unable to contact slurm controller", "Socket timed out", "temporarily", "Connection refused")


class SlurmExecutor(QueueExecutor):
    """Submits job arrays through submitit."""

    def __init__(self, sweep: str, settings: SweepConfig) -> None:
        self.slurm = Scheduler()
        super().__init__(sweep, settings, self.slurm)

    def forecast(self, units: Sequence[Unit], store: Store) -> str:
        """Jobs, GPUs and GPU time that these units will take, in words."""
        return forecast_text("SLURM", units, store)

    def check(self, units: Sequence[Unit]) -> None:
        """Raises `InputError` where SLURM is not here."""
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise InputError(
                "hydra/launcher", "lbi_slurm", "there is no sbatch or srun on this machine", "Run it on a login node"
            )

    def array_size(self, members: Sequence[Unit], start: int) -> int:
        """As long as the cluster takes them."""
        return self._most

    @cached_property
    def _most(self) -> int:
        return self.slurm.max_array_size()

    def send(
        self, folder: Path, array: Array, code: Path, durations: Durations, exclude: list[str], began: float
    ) -> str:
        """Submit one array; its job id."""
        return self._sbatch(folder, array, code, durations, exclude)

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
    for task, (seconds, guess) in zip(unit.tasks, durations.of(unit.tasks), strict=True):
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


def _gpus(task: Task) -> dict[str, str]:
    count, kind = gpus_of(task), task.config.resources.gpu_type
    # submitit's gpus_per_node takes no type.
    return {"gres": f"gpu:{kind}:{count}" if kind else f"gpu:{count}"} if count else {}


def _container(resources: ResourcesConfig) -> list[str]:
    mounts = [f"--container-mounts={resources.mounts}"] if resources.mounts else []
    return [f"--container-image={resources.container}", *mounts] if resources.container else []


def _why(error: RuntimeError) -> str:
    """What sbatch said, out of submitit's exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: error: ") for line in lines if line.startswith("sbatch: error")]
    return "; ".join(said) or (lines[-1] if lines else type(error).__name__)
