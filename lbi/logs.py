"""Shows what a cell printed: its own log, or its job's where the cell has not begun."""

from __future__ import annotations

import time
from pathlib import Path

from lbi.cells import find_cell
from lbi.collect import Row, rows
from lbi.executors.sky import Sky
from lbi.files import write_text
from lbi.store import Store
from lbi.submissions import Submissions

FOLLOW_S = 0.5
"""Pause between two looks at a log that is followed."""


def show(store: Store, sweep: str, cell: str, follow: bool) -> int:
    """Print the log of a cell, given by number, run id or a part of its name."""
    row = find_cell(rows(store, sweep), cell)
    log = _log(store, sweep, row)
    if log is None:
        reason = f" ({row['reason']})" if row["reason"] else ""
        print(f"{row['name']}: {row['status']}{reason}; it has printed nothing")
        if not follow:
            return 1
    position = 0
    while True:
        position = _print_from(log, position)
        row = find_cell(rows(store, sweep), str(row["cell"]))
        if not follow or row["status"] not in ("running", "missing", "queued"):
            _print_from(log, position)
            return 0
        time.sleep(FOLLOW_S)
        current = _log(store, sweep, row)
        if current != log:
            log, position = current, 0


def _log(store: Store, sweep: str, row: Row) -> Path | None:
    """The attempt's log, else the newest log of a job that has the cell."""
    own = Path(row["folder"]) / "log.txt"
    if row["folder"] and own.exists():
        return own
    jobs = [job for job in Submissions(store, sweep).jobs() if any(c.run_id == row["run_id"] for c in job.cells)]
    if jobs and jobs[-1].cluster.get("kind") == "sky":
        # The log of a rented machine is where it is until somebody asks for it.
        text = Sky(jobs[-1].cluster["command"]).logs([jobs[-1].job])[jobs[-1].job]
        if text is not None:
            write_text(jobs[-1].log, text)
    return next((job.log for job in reversed(jobs) if job.log.exists()), None)


def _print_from(log: Path | None, position: int) -> int:
    if log is None:
        return 0
    with log.open("rb") as file:
        file.seek(position)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return position + len(text)
