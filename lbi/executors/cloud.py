"""Sends units to rented machines: a pool of them by SkyPilot, and one array of jobs that they take in turn.

The machines share no folder with the sweep: units travel in a variable, results come home in
the jobs' logs or by W&B (homing.py), and a run whose result has not come home is not done.
A machine that is taken away is replaced by SkyPilot, which starts its job anew; lbi then
gives what is missing to a new job, so that nothing that has come home is measured again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbi import homing, parcel, snapshot
from lbi.children import Stop
from lbi.config import SweepConfig
from lbi.errors import ClusterError, InputError
from lbi.executors import cloud_files, homecoming, pools
from lbi.executors.cloud_files import CloudLauncher
from lbi.executors.homecoming import Homecoming
from lbi.executors.queue_executor import QueueExecutor, forecast_text, without
from lbi.executors.reconcile import Ending, verdict
from lbi.executors.scheduler import RUNNING, Job
from lbi.executors.sky import HOPELESS, Sky
from lbi.executors.unit_parcel import pack_units
from lbi.files import write_text
from lbi.schedule import Durations, Unit
from lbi.store import Store
from lbi.submissions import Array, CellRef, SchedulerSilent, Submissions, UnitJob
from lbi.sweep_folder import environments, find_result
from lbi.typed import plain
from lbi.worker import Report

UNREADABLE = 5
"""As many times the log of a job that is over may not be had before its runs are given up."""


class CloudExecutor(QueueExecutor):
    """Submits units to a pool of rented machines, and follows them unless `settings.wait` is false."""

    def __init__(self, sweep: str, settings: SweepConfig, launcher: CloudLauncher) -> None:
        self.launcher = launcher
        self.sky = Sky(launcher.sky)
        super().__init__(sweep, settings, self.sky)
        self.ask_s = (launcher.poll_s, launcher.poll_s)
        self.unreadable: dict[str, int] = {}
        self._read_at: dict[str, float] = {}
        self._restarts: dict[str, int] = {}
        self._candidate: dict[str, int] = {}
        self._homecoming: Homecoming | None = None
        self._store: Store | None = None
        self._units: tuple[Unit, ...] = ()
        self._applied: set[str] = set()
        self._progress_at = time.monotonic()

    def forecast(self, units: Sequence[Unit], store: Store) -> str:
        """Jobs, machines and time that these units will take, in words."""
        if not units:
            return ""
        text = forecast_text("Cloud", units, store)
        machines = min(self.launcher.workers, len(units))
        prices = [unit.tasks[0].config.resources.max_price for unit in units]
        price = max((price for price in prices if price), default=None)
        return text + f" {machines} rented machines" + (f" at no more than ${price:g} an hour each." if price else ".")

    def check(self, units: Sequence[Unit]) -> None:
        """Raises `InputError` for what a rented machine cannot have, before it costs anything."""
        if not self.launcher.dry_run:
            self.sky.check()
        for task in (task for unit in units for task in unit.tasks):
            model = task.config.model
            if model.path and not model.path.startswith("package:") and Path(model.path).expanduser().exists():
                raise InputError(
                    "model.path", model.path, "lies on this machine, which a rented one does not see", "Name a hub id"
                )
            cloud_files.pool_resources(task.config.resources, task.config.engine.device, 0)
            tracker = task.config.tracker
            if self.launcher.results == "wandb" and (tracker.kind != "wandb" or tracker.files == "none"):
                raise InputError(
                    "hydra.launcher.results", "wandb", "W&B is not to have the results' files", "tracker=wandb"
                )
        if self.launcher.results == "wandb" and "WANDB_API_KEY" not in cloud_files.secrets():
            raise InputError("WANDB_API_KEY", None, "is not set, and results are to come home by W&B", "Set it")

    def cluster(self) -> Mapping[str, Any]:
        """The same command asks about the jobs later."""
        known: dict[str, Any] = {"kind": "sky", "command": list(self.launcher.sky), "results": self.launcher.results}
        if self.launcher.results == "wandb" and self._units:
            known["tracker"] = plain(self._units[0].tasks[0].config.tracker)
        return known

    def code(self, folder: Path) -> Path:
        """The code, and which packages it needs."""
        return snapshot.take(folder, {"requirements.txt": cloud_files.requirements()})

    def array_name(self, name: str) -> str:
        """A cluster's name may have small letters, digits and hyphens."""
        return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")

    def array_size(self, members: Sequence[Unit], start: int) -> int:
        """As many units as one variable holds."""
        size = len(members) - start
        while size > 1 and len(self._parcel(members[start : start + size])) > cloud_files.MOST:
            size = -(-size // 2)
        return size

    def execute(self, units: Sequence[Unit], store: Store, report: Report, since: float) -> Stop:
        """As every queue's, but for the pools: they end with the sweep, unless it goes on without being followed."""
        if self.launcher.dry_run:
            self.check(units)
            stop = Stop()
            stop.detached = self._write_files(units, store)
            return stop
        try:
            return super().execute(units, store, report, since)
        except BaseException:
            # Machines that nobody watches cost money. Those of an earlier command may be at work for it.
            self._end(store, self._applied)
            raise

    def submit(self, units: Sequence[Unit], store: Store, since: float, exclude: Any = ()) -> int:
        """Submit what no job has and none has made: what an earlier process let go may be over, and not be home yet."""
        first = self._store is None
        if first:
            self._store, self._units = store, tuple(units)
        living: set[str] = set()
        if first and self.settings.mode != "force":
            # In this order: a job that ends meanwhile is one that lives, and is followed to its end.
            living = self._living(store)
            said = homecoming.collect(store, self.sweep)
            if said:
                print(f"From jobs before: {said}", flush=True)
        found = environments(store, self.sweep)
        results = {
            task.run_id: find_result(store, found, task.run_id, task.env_id) for unit in units for task in unit.tasks
        }
        made = {run_id for run_id, result in results.items() if result is not None and result.finished > since}
        left = without(units, made | living)
        return super().submit(left, store, since, exclude) if left else 0

    def _living(self, store: Store) -> set[str]:
        submissions = Submissions(store, self.sweep)
        try:
            return submissions.living(self._queue(submissions))
        except SchedulerSilent as silent:
            raise ClusterError(f"nothing was submitted: {silent}. The same command tries again") from silent

    def send(
        self, folder: Path, array: Array, code: Path, durations: Durations, exclude: list[str], began: float
    ) -> str:
        """Make the pool, or bring it up to date, and submit one array to it; the ids of its jobs."""
        config = array.units[0].tasks[0].config
        pool = cloud_files.pool_name(self.launcher, config.resources, config.engine.device)
        models = [task.config for unit in self._units for task in unit.tasks]
        self._apply(pool, config, code, models, folder)
        file = folder / f"{array.name}.job.yaml"
        write_text(file, self._job_yaml(array))
        self.sky.launch(pool, file, len(array.units), cloud_files.secrets())
        ids = self.sky.named([array.name])
        if not ids or array.name not in ids:
            raise ClusterError(f"SkyPilot took the jobs of {array.name} and does not list them; see lbi status")
        return ids[array.name]

    def bring_home(self, store: Store, jobs: Sequence[UnitJob], states: Mapping[str, Job]) -> None:
        """Read the logs of jobs that run or are over, and put what has arrived into the store."""
        now = time.monotonic()
        if any(states[job.job].state in RUNNING for job in jobs):
            self._progress_at = now
        due = []
        for job in jobs:
            state = states[job.job]
            running = state.state in RUNNING and now - self._read_at.get(job.job, -1e9) >= self.launcher.logs_s
            if running or (state.ended and state.state not in HOPELESS):
                due.append(job)
                self._read_at[job.job] = now
        if due:
            self._home(store).read(self.sky, due)

    def endings(self, store: Store, job: UnitJob, state: Job, cells: list[CellRef]) -> list[Ending] | None:
        """The run that was in progress is the one that the log says had begun; None while the log cannot be had."""
        known = self._home(store).received.get(job.job)
        if known is None and state.state not in HOPELESS and state.state != "CANCELLED":
            self.unreadable[job.job] = self.unreadable.get(job.job, 0) + 1
            if self.unreadable[job.job] < UNREADABLE:
                return None
        begun = known.noted(homing.BEGUN) if known else {}
        status, reason = verdict(job, state)
        if known is None and status == "lost":
            reason += "; its log cannot be had"
        return [
            Ending(cell, status, reason, None, elsewhere=True)
            if cell.run_id in begun
            else Ending(cell, "cancelled" if status == "cancelled" else "", reason, None)
            for cell in cells
        ]

    def hopeless(self, job: UnitJob, state: Job, run_id: str) -> str:
        """Why a run of a job that is over would not come home the next time either."""
        if state.state in HOPELESS:
            said = f": {state.reason}" if state.reason else ""
            return f"SkyPilot ended job {job.job} as {state.state}{said}; see sky jobs logs --controller"
        known = self._homecoming.received.get(job.job) if self._homecoming else None
        if known is None:
            return ""
        too_large = [text for name, text in known.of(homing.TOO_LARGE).items() if name.startswith(f"{run_id}-")]
        told = [*known.of(homing.REFUSAL).values(), *too_large]
        return "; ".join(str(parcel.unpack(text)["reason"]) for text in told)

    def superseded(self, job: UnitJob, state: Job, done: int) -> bool:
        """A job that was begun anew on another machine would measure again what has come home."""
        restarts = self.sky.recovered.get(job.job, 0)
        before = self._restarts.get(job.job, 0)
        self._restarts[job.job] = restarts
        if restarts > before and self._homecoming:
            # Its log is that of its newest start.
            self._homecoming.received.pop(job.job, None)
        return restarts > before and done > 0

    def waited(self, job: UnitJob, waited_s: float, limit_s: float) -> bool:
        """Rent the next type of GPU in place of one that could not be had; False where there is none left."""
        unit = next((unit for unit in self._units if any(t.run_id == job.cells[0].run_id for t in unit.tasks)), None)
        if unit is None or self._store is None:
            return False
        if time.monotonic() - self._progress_at <= limit_s:
            # There are machines, at work for the jobs before it; or the next kind has just been asked for.
            return True
        config = unit.tasks[0].config
        pool = cloud_files.pool_name(self.launcher, config.resources, config.engine.device)
        number = self._candidate.get(pool, 0) + 1
        kinds = cloud_files.candidates(config.resources)
        if number >= len(kinds):
            return False
        self._candidate[pool], self._progress_at = number, time.monotonic()
        print(f"No {kinds[number - 1]} in {limit_s:g} s: renting {kinds[number]}", flush=True)
        models = [task.config for unit in self._units for task in unit.tasks]
        self._apply(pool, config, self.code(self._store.sweep_folder(self.sweep)), models, job.submission)
        return True

    def over(self, store: Store) -> None:
        """End the pools that this sweep has used."""
        self._end(store, [record.name for record in pools.up(store, self.sweep)])

    def _end(self, store: Store, chosen: Collection[str]) -> None:
        """End pools, but for those that others still use."""
        if not self.launcher.down or not chosen:
            return
        names = Submissions(store, self.sweep).array_names()
        for record in pools.up(store, self.sweep):
            pool = record.name
            if pool not in chosen:
                continue
            others = self.sky.busy(pool, besides=names)
            if others:
                print(f"The pool {pool} stays: {', '.join(sorted(set(others)))} has jobs in it", flush=True)
                continue
            try:
                self.sky.down(pool)
                record.downed()
                print(f"Ended the pool {pool}", flush=True)
            except ClusterError as error:
                again = f"python -m lbi cancel {self.sweep} --down --store {store.root}"
                print(f"THE POOL {pool} MAY STILL COST MONEY: {error}. Try: {again}", flush=True)

    def _apply(self, pool: str, config: Any, code: Path, models: Sequence[Any], folder: Path) -> None:
        if self._store is None:
            raise InputError("store", None, "is not open")
        file = folder / f"{pool}.pool.yaml"
        text = cloud_files.pool_yaml(self.launcher, config, str(code), models, self._candidate.get(pool, 0))
        write_text(file, text)
        known = next((record for record in pools.up(self._store) if record.name == pool), None)
        spec = parcel.sum_of(text)
        # Before it is made: a driver that dies in between leaves a note of what may be up.
        pools.PoolRecord.applied(self._store, pool, self.launcher.sky, self.sweep, spec)
        same = known is not None and known.spec == spec
        if not same or not (pool in self._applied or self.sky.pools([pool])):
            # Applied again as it is, SkyPilot may replace machines that are at work.
            self.sky.apply(pool, file, cloud_files.secrets())
        self._applied.add(pool)

    def _home(self, store: Store) -> Homecoming:
        if self._homecoming is None:
            tracker = next((task.config.tracker for unit in self._units for task in unit.tasks), None)
            by_wandb = tracker if self.launcher.results == "wandb" else None
            self._homecoming = Homecoming(store, self.sweep, by_wandb)
        return self._homecoming

    def _parcel(self, units: Sequence[Unit]) -> str:
        if self._store is None:
            raise InputError("store", None, "is not open")
        return pack_units(self._store, self.sweep, units, self.launcher.results, self.launcher.max_result_kb)

    def _job_yaml(self, array: Array) -> str:
        config = array.units[0].tasks[0].config
        return cloud_files.job_yaml(self.launcher, config, array.name, self._parcel(array.units), len(array.units))

    def _write_files(self, units: Sequence[Unit], store: Store) -> str:
        """pool.yaml and job.yaml of each array, below the sweep's folder; where they are."""
        folder = store.sweep_folder(self.sweep) / "cloud"
        self._store, self._units = store, tuple(units)
        code = self.code(store.sweep_folder(self.sweep))
        models = [task.config for unit in units for task in unit.tasks]
        for array in self._arrays(units, "000"):
            config = array.units[0].tasks[0].config
            pool = cloud_files.pool_name(self.launcher, config.resources, config.engine.device)
            write_text(folder / f"{pool}.pool.yaml", cloud_files.pool_yaml(self.launcher, config, str(code), models))
            write_text(folder / f"{array.name}.job.yaml", self._job_yaml(array))
        return f"Files for SkyPilot: {folder}"
