"""Brings results home that jobs made on machines without the store: from their logs, or from W&B.

The same for whoever follows a sweep and for whoever looks after it later from another shell:
what has come home before is left alone, and what is damaged has not come home.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from lbi import arrivals, homing, parcel
from lbi.collect import rows
from lbi.config import TrackerConfig
from lbi.errors import ClusterError, InputError
from lbi.executors.sky import Sky
from lbi.files import write_text
from lbi.store import UNFINISHED, Store
from lbi.submissions import Submissions, UnitJob
from lbi.typed import build


class Homecoming:
    """Puts what arrives for one sweep into its store. `received` is what each job's log said last.

    With a `tracker` results come by W&B, and the logs only say which have been sent there.
    """

    def __init__(self, store: Store, sweep: str, tracker: TrackerConfig | None = None) -> None:
        self.store, self.sweep, self.tracker = store, sweep, tracker
        self.received: dict[str, parcel.Received] = {}
        self.arrived = 0
        self._known: set[tuple[str, str]] = set()

    def read(self, sky: Sky, jobs: Sequence[UnitJob]) -> list[str]:
        """Read the logs of jobs; ids of those whose log cannot be had."""
        by_id = {job.job: job for job in jobs}
        silent = []
        for job_id, text in sky.logs(list(by_id)).items():
            if text is None:
                silent.append(job_id)
            else:
                job = by_id[job_id]
                write_text(job.log, text)
                self.take(job_id, text, {cell.run_id for cell in job.cells}, job.began)
        return silent

    def take(self, source: str, log: str, wanted: Collection[str], since: float) -> None:
        """Put the results in a log into the store, of the runs `wanted` that have none finished after `since`."""
        received = parcel.read_log(log)
        self.received[source] = received
        for name, text in received.of(homing.RESULT).items():
            self._place(source, name, text, wanted, since)
        if self.tracker is not None:
            told = [name for name in received.noted(homing.TOLD) if self._is_new(source, name, wanted, since)]
            self._ask_wandb(source, told)

    def _is_new(self, source: str, name: str, wanted: Collection[str], since: float) -> bool:
        run_id, _, env_id = name.partition("-")
        if (source, name) in self._known:
            return False
        if run_id in wanted and not arrivals.has(self.store, run_id, env_id, since):
            return True
        self._known.add((source, name))
        return False

    def _place(self, source: str, name: str, text: str, wanted: Collection[str], since: float) -> None:
        if not self._is_new(source, name, wanted, since):
            return
        run_id, _, env_id = name.partition("-")
        folder = Path(tempfile.mkdtemp(prefix="lbi-arrival-"))
        try:
            parcel.unpack_files(text, folder / "result")
            arrivals.place(self.store, folder / "result", run_id, env_id, arrived=time.time())
            arrivals.note_origin(self.store, self.sweep, run_id, env_id)
            self._known.add((source, name))
            self.arrived += 1
        except ValueError as error:
            print(f"A result from {source} is damaged, and its run is not done: {error}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _ask_wandb(self, source: str, names: Sequence[str]) -> None:
        from lbi.trackers.wandb_collect import collect_runs

        if not names or self.tracker is None:
            return
        try:
            collect_runs(self.store, self.sweep, self.tracker, names)
        except InputError as error:
            print(f"Results cannot be had from W&B yet: {error}", flush=True)
            return
        for name in names:
            run_id, _, env_id = name.partition("-")
            if self.store.result(run_id, env_id) is not None:
                self._known.add((source, name))
                self.arrived += 1


def collect(store: Store, sweep: str) -> str:
    """Bring home what the rented machines of a sweep have made and is not here yet; in words, empty if nothing is.

    Raises `ClusterError` where SkyPilot does not answer.
    """
    open_ = {row["run_id"] for row in rows(store, sweep) if row["status"] in ("missing", *UNFINISHED)}
    jobs = [
        job
        for job in Submissions(store, sweep).jobs()
        if job.cluster.get("kind") == "sky" and open_ & {cell.run_id for cell in job.cells}
    ]
    said = []
    for cluster in {str(job.cluster): job.cluster for job in jobs}.values():
        mine = [job for job in jobs if job.cluster == cluster]
        sky = Sky(cluster["command"])
        states = sky.jobs(job.job for job in mine)
        if states is None:
            raise ClusterError(f"{sky.name} does not answer; what has come home is in the store")
        waiting = [job for job in mine if not states[job.job].ended and states[job.job].state == "PENDING"]
        begun = [job for job in mine if job not in waiting]
        tracker = build(TrackerConfig, cluster["tracker"], "tracker") if "tracker" in cluster else None
        home = Homecoming(store, sweep, tracker)
        silent = home.read(sky, begun)
        said.append(f"{home.arrived} results came home from {len(begun)} jobs")
        said += [f"the logs of {', '.join(silent)} cannot be had"] if silent else []
        said += [f"{len(waiting)} jobs have not begun"] if waiting else []
    return "; ".join(said)


def collect_logs(store: Store, sweep: str, files: Sequence[Path]) -> str:
    """Bring home results from logs that somebody has fetched (kubectl logs); in words. Raises `InputError`."""
    from lbi.sweep_folder import read_header, read_plan

    header = read_header(store, sweep)
    wanted = {row["run_id"] for row in read_plan(store, sweep)}
    home = Homecoming(store, sweep)
    broken = 0
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError as error:
            raise InputError("--from-logs", str(file), error.strerror or "cannot be read") from error
        home.take(file.name, text, wanted, float(header["planned"]))
        broken += len(home.received[file.name].broken)
    damage = f"; {broken} are there in part only, which is not done" if broken else ""
    return f"{home.arrived} results came home from {len(files)} logs{damage}"
