"""Finds what a user names at the command line: a cell of a sweep, or a result of the store."""

from __future__ import annotations

import re

from lbi.collect import Row, rows
from lbi.errors import InputError
from lbi.store import Result, Store

RUN_ID = re.compile(r"[0-9a-f]{6,12}$")
"""A run id, or enough of its beginning."""


def find_cell(table: list[Row], cell: str) -> Row:
    """The row of a cell, given by number, run id or a part of its name. Raises `InputError` unless it is one."""
    if cell.isdigit() and int(cell) < len(table):
        return table[int(cell)]
    matching = [row for row in table if cell in row["name"] or (row["run_id"] and row["run_id"].startswith(cell))]
    exact = [row for row in matching if row["name"] == cell]
    if len(exact or matching) == 1:
        return (exact or matching)[0]
    listed = "; ".join(f"{row['cell']}: {row['name']}" for row in (matching or table)[:10])
    raise InputError(
        "cell", cell, "fits several cells" if matching else "there is no such cell", f"There are: {listed}"
    )


def find_result(store: Store, sweep: str, run: str) -> Result:
    """The newest result of a run id of the store, else that of a cell of the sweep.

    Raises `InputError` where there is none.
    """
    known = [name for name in store.known_runs() if RUN_ID.match(run) and name.startswith(run)]
    if len(known) == 1:
        results = list(store.results(known[0]))
        if results:
            return max(results, key=lambda result: result.finished)
    row = find_cell(rows(store, sweep), run)
    result = store.result(row["run_id"], row["env_id"]) if row["run_id"] else None
    if result is None:
        why = f" ({row['reason']})" if row["reason"] else ""
        raise InputError("run", run, f"{row['name']} is {row['status']}{why}, so it has no result", "Run it first")
    return result
