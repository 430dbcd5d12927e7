"""Cancels the queued and running jobs of a sweep, or those of its cells that a filter names.

A job that has other cells too goes on with them: it finds a note beside its unit file and
leaves the named cells out.
"""

from __future__ import annotations

from lbi.errors import ClusterError, InputError
from lbi.executors import pools
from lbi.executors.reconcile import Ending, publish
from lbi.executors.sky import Sky
from lbi.executors.slurm_job import cancelled_file, cancelled_runs
from lbi.files import write_json
from lbi.store import SCHEMA, Store
from lbi.submissions import CellRef, Submissions, UnitJob
from lbi.sweep_folder import environments, find_result


def cancel(store: Store, sweep: str, part: str | None, down: bool = False) -> int:
    """Cancel; 0 if something was. With `down` the sweep's rented machines are ended too.

    Raises `InputError` if nothing fits, `ClusterError` if the queue does not answer.
    """
    jobs, queues = Submissions(store, sweep).jobs(), Submissions(store, sweep).queues()
    states = queues.jobs(job.job for job in jobs)
    if states is None and down:
        # Machines cost money whether or not the queue answers.
        _end_pools(store, sweep)
    if states is None:
        raise ClusterError(f"{queues.name} does not answer; nothing was cancelled")
    living = [job for job in jobs if not states[job.job].ended]
    still = {job.job: _open(store, sweep, job) for job in living}
    chosen = {job: [cell for cell in cells if part is None or part in cell.name] for job, cells in still.items()}
    if down and not any(chosen.values()):
        return _end_pools(store, sweep)
    if not any(chosen.values()):
        out = "A sweep on this machine is stopped with Ctrl-C where it runs"
        raise InputError("sweep", sweep, f"has no queued or running cell{f' like {part}' if part else ''}", out)
    rented = [job.job for job in living if job.cluster.get("kind") == "sky" and chosen[job.job]]
    if part is not None and any(chosen[job] != still[job] for job in rented):
        out = "Cancel it whole, and give the command again without these cells"
        raise InputError("filter", part, "a rented machine's job cannot be told to leave cells out", out)
    whole = [job for job in living if chosen[job.job] and chosen[job.job] == still[job.job]]
    if whole and not queues.cancel([job.job for job in whole]):
        raise ClusterError("The cancellation was not taken; see squeue or sky jobs queue")
    for job in living:
        if chosen[job.job] and job not in whole:
            _note(job, chosen[job.job])
    for job in whole:
        _publish(store, job, still[job.job])
    cells = sum(len(cells) for cells in chosen.values())
    parts = sum(bool(chosen[job.job]) for job in living) - len(whole)
    print(f"Cancelled {cells} cells: {len(whole)} jobs ended, {parts} go on with their other cells.")
    return _end_pools(store, sweep) if down else 0


def _end_pools(store: Store, sweep: str) -> int:
    """End the machines that a sweep has rented."""
    records = pools.up(store, sweep)
    if not records:
        print(f"No pool of {sweep} is up, as far as this store knows.")
        return 0
    problems = []
    for record in records:
        try:
            Sky(record.command).down(record.name)
            record.downed()
            print(f"Ended the pool {record.name}")
        except ClusterError as error:
            problems.append(f"THE POOL {record.name} MAY STILL COST MONEY: {error}")
    if problems:
        raise ClusterError("; ".join(problems))
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
