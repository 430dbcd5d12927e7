"""Cancels the queued and running jobs of a sweep, or those of its cells that a filter names.

A job that has other cells too goes on with them: it finds a note beside its unit file and
leaves the named cells out.
"""

from __future__ import annotations

from lbi.errors import ClusterError, InputError
from lbi.executors.reconcile import Ending, publish
from lbi.executors.scheduler import Scheduler
from lbi.executors.slurm_job import cancelled_file, cancelled_runs
from lbi.files import write_json
from lbi.store import SCHEMA, Store
from lbi.submissions import CellRef, Submissions, UnitJob
from lbi.sweep_folder import environments, find_result


def cancel(store: Store, sweep: str, part: str | None) -> int:
    """Cancel; 0 if something was. Raises `InputError` if nothing fits, `ClusterError` if SLURM does not answer."""
    scheduler = Scheduler()
    jobs = Submissions(store, sweep).jobs()
    states = scheduler.jobs(job.job for job in jobs)
    if states is None:
        raise ClusterError("SLURM's controller does not answer; nothing was cancelled")
    living = [job for job in jobs if not states[job.job].ended]
    still = {job.job: _open(store, sweep, job) for job in living}
    chosen = {job: [cell for cell in cells if part is None or part in cell.name] for job, cells in still.items()}
    if not any(chosen.values()):
        out = "A sweep on this machine is stopped with Ctrl-C where it runs"
        raise InputError("sweep", sweep, f"has no queued or running cell{f' like {part}' if part else ''}", out)
    whole = [job for job in living if chosen[job.job] and chosen[job.job] == still[job.job]]
    if whole and not scheduler.cancel([job.job for job in whole]):
        raise ClusterError("SLURM did not take the cancellation; see squeue")
    for job in living:
        if chosen[job.job] and job not in whole:
            _note(job, chosen[job.job])
    for job in whole:
        _publish(store, job, still[job.job])
    cells = sum(len(cells) for cells in chosen.values())
    parts = sum(bool(chosen[job.job]) for job in living) - len(whole)
    print(f"Cancelled {cells} cells: {len(whole)} jobs ended, {parts} go on with their other cells.")
    return 0


def _open(store: Store, sweep: str, job: UnitJob) -> list[CellRef]:
    """The job's cells that this job may still measure."""
    found = environments(store, sweep)
    results = [find_result(store, found, cell.run_id, cell.env_id) for cell in job.cells]
    return [
        cell
        for cell, result in zip(job.cells, results, strict=True)
        if result is None or job.owes(result.status, result.finished)
    ]


def _note(job: UnitJob, cells: list[CellRef]) -> None:
    unit = job.submission / "units" / f"{job.unit}.json"
    runs = cancelled_runs(unit) | {cell.run_id for cell in cells}
    write_json(cancelled_file(unit), {"schema": SCHEMA, "runs": sorted(runs)})


def _publish(store: Store, job: UnitJob, cells: list[CellRef]) -> None:
    """The cells that the job has not begun; the one in progress it publishes itself."""
    for cell in cells:
        if store.abandoned(cell.run_id, job.job) is None:
            publish(store, Ending(cell, "cancelled", "", None), "cancelled", f"job {job.job} was cancelled")
