"""What a sweep is doing, from its store and, where it has jobs on a cluster, from the scheduler."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table as Grid

from lbi.children import phase_of
from lbi.collect import Row, rows
from lbi.executors import pools
from lbi.executors.scheduler import RUNNING, Job
from lbi.report.terminal import console
from lbi.store import UNFINISHED, Store
from lbi.submissions import Submissions, UnitJob
from lbi.sweep_folder import read_header

WATCH_S = 5.0
"""Pause between two looks."""

SHOWN = 30
"""As many running and as many failed cells are named; the report has them all."""

SETTLED = ("ok", "pruned", "duplicate")


def show(store: Store, sweep: str) -> int:
    """Print where the sweep stands: 0 if every cell is settled well, 1 otherwise."""
    table = _with_jobs(store, sweep, rows(store, sweep))
    _print(store, sweep, table)
    return 0 if all(row["status"] in SETTLED for row in table) else 1


def watch(store: Store, sweep: str) -> int:
    """Print it again and again until nothing is queued or running any more."""
    out = console()
    while True:
        table = _with_jobs(store, sweep, rows(store, sweep))
        if out.is_terminal:
            out.clear()
        _print(store, sweep, table)
        if not any(row["status"] in ("queued", "running") for row in table):
            return 0 if all(row["status"] in SETTLED for row in table) else 1
        time.sleep(WATCH_S)


def _print(store: Store, sweep: str, table: list[Row]) -> None:
    out = console()
    header = read_header(store, sweep)
    planned = time.strftime("%Y-%m-%d %H:%M", time.localtime(header["planned"]))
    counts = Counter(row["status"] for row in table)
    listed = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    out.print(f"[bold]{escape(sweep)}[/], planned {planned}, {len(table)} cells: {listed}")
    active = [row for status in ("running", "queued") for row in table if row["status"] == status]
    failed = [row for row in table if row["status"] not in (*SETTLED, "running", "queued", "missing")]
    if active or failed:
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        for column in ("cell", "setting", "status", "where", "doing, or why"):
            grid.add_column(column, justify="right" if column == "cell" else "left", overflow="fold")
        for row in [*active[:SHOWN], *failed[:SHOWN]]:
            grid.add_row(
                str(row["cell"]), escape(row["name"]), row["status"], row.get("where", ""), escape(row["reason"])
            )
        out.print(grid)
        left = len(active) + len(failed) - grid.row_count
        if left:
            out.print(f"... and {left} more")
    for line in pools.describe(pools.up(store)):
        out.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    for problem in store.problems:
        out.print(f"Ignored in the store: {escape(str(problem))}")
    if any(row["status"] in ("missing", *UNFINISHED) for row in table):
        out.print(f"The same command runs what is missing: {escape(header['command'])}", soft_wrap=True)


def _with_jobs(store: Store, sweep: str, table: list[Row]) -> list[Row]:
    """The rows, with what each open cell's job is doing."""
    jobs = _jobs_of_open_cells(store, sweep, table)
    states: Mapping[str, Job] = {}
    if jobs:
        queues = Submissions(store, sweep).queues()
        found = queues.jobs({job.job for job in jobs.values()})
        if found is None:
            console().print(f"[yellow]{queues.name} does not answer; this is what the store says.[/]")
        states = found or {}
    return [_with_job(row, jobs.get(row["run_id"]), states) for row in table]


def _jobs_of_open_cells(store: Store, sweep: str, table: list[Row]) -> dict[str, UnitJob]:
    """The newest job of each cell that may still get a result."""
    wanted = {row["run_id"]: row for row in table if row["status"] in ("missing", "running", *UNFINISHED)}
    newest: dict[str, UnitJob] = {}
    for job in Submissions(store, sweep).jobs() if wanted else []:
        for cell in job.cells:
            row = wanted.get(cell.run_id)
            if row and (row["finished"] is None or job.owes(row["status"], row["finished"])):
                newest[cell.run_id] = job
    return newest


def _with_job(row: Row, job: UnitJob | None, states: Mapping[str, Job]) -> Row:
    if row["status"] == "running":
        row = row | {"reason": phase_of(Path(row["folder"]))}
    state = states.get(job.job) if job else None
    if state is None or (state.ended and row["status"] != "running"):
        return row
    where = f"job {state.id}" + (f" on {state.node}" if state.node else "")
    if row["status"] == "running":
        return row | {"where": where}
    if state.state in RUNNING and job and job.cluster.get("kind") == "sky":
        return row | {"status": "queued", "where": where, "reason": "its job runs; the result has not come home"}
    if state.state in RUNNING:
        return row | {"status": "queued", "where": where, "reason": "waits for a run before it in its job"}
    return row | {
        "status": "queued",
        "where": where,
        "reason": ", ".join(filter(None, (state.state.lower(), state.reason))),
    }
