"""The folder of one sweep: its plan and what is made from its results.

plan.jsonl has a first line about the sweep and a line per cell. Everything else in
the folder can be made again from it and the runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbi.errors import InputError
from lbi.files import BadFile, read_json_lines, write_json_lines
from lbi.store import SCHEMA, Result, Store

if TYPE_CHECKING:
    from lbi.plan import Plan


def write_plan(store: Store, name: str, plan: Plan, header: dict[str, Any]) -> Path:
    """Write the plan; `header` says what was asked (command, baseline, max_kld, when)."""
    rows: list[dict[str, Any]] = [{"schema": SCHEMA, "sweep": name, **header}]
    rows += [cell.row() for cell in plan.cells]
    file = store.sweep_folder(name) / "plan.jsonl"
    write_json_lines(file, rows)
    return file


def extend_plan(store: Store, name: str, plan: Plan, header: dict[str, Any]) -> None:
    """Add a plan's cells to those a sweep has; for searches, which plan a few cells at a time."""
    known = read_plan(store, name) if (store.sweep_folder(name) / "plan.jsonl").exists() else []
    new = [cell.row() for cell in plan.cells]
    replaced = {row["run_id"] for row in new}
    kept = [row for row in known if row["run_id"] not in replaced]
    rows = [{**row, "index": index} for index, row in enumerate([*kept, *new])]
    write_json_lines(store.sweep_folder(name) / "plan.jsonl", [{"schema": SCHEMA, "sweep": name, **header}, *rows])


def note_environment(store: Store, sweep: str, env_id: str) -> None:
    """Note an environment that a worker of this sweep found, and the plan could not know."""
    folder = store.sweep_folder(sweep) / "environments"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / env_id).touch()


def environments(store: Store, sweep: str) -> list[str]:
    """Environments that workers of this sweep found, and the plan could not know."""
    try:
        return sorted(entry.name for entry in os.scandir(store.sweep_folder(sweep) / "environments"))
    except OSError:
        return []


def find_result(store: Store, found: Sequence[str], run_id: str, env_id: str) -> Result | None:
    """The newest result of a run, planned for `env_id`, in that environment or one that workers `found`."""
    results = [store.result(run_id, name) for name in dict.fromkeys((env_id, *found))]
    return max((result for result in results if result), key=lambda result: result.finished, default=None)


def change_header(store: Store, name: str, **changes: Any) -> None:
    """Replace what was asked of the report (baseline, max_kld); None leaves a field as it is."""
    header, *cells = _read(store, name)
    kept = {**header, **{field: value for field, value in changes.items() if value is not None}}
    write_json_lines(store.sweep_folder(name) / "plan.jsonl", [kept, *cells])


def read_header(store: Store, name: str) -> dict[str, Any]:
    """What was asked. Raises `InputError` where there is no such sweep."""
    return _read(store, name)[0]


def read_plan(store: Store, name: str) -> list[dict[str, Any]]:
    """The cells. A damaged plan is noted as a problem and has none."""
    try:
        return _read(store, name)[1:]
    except InputError:
        return []


def find(store: Store, name: str | None) -> str:
    """The sweep called `name`, or begun by it, or the newest. Raises `InputError` where there is none."""
    known = store.sweeps()
    if not known:
        raise InputError("sweep", name, f"there is no sweep in {store.root}", "Run one, or name the store: LBI_STORE")
    if name is None:
        return known[0]
    if name in known:
        return name
    matching = [sweep for sweep in known if sweep.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join((matching or known)[:10])
    raise InputError(
        "sweep", name, "several sweeps begin so" if matching else "there is no such sweep", f"There are: {listed}"
    )


def _read(store: Store, name: str) -> list[dict[str, Any]]:
    file = store.sweep_folder(name) / "plan.jsonl"
    try:
        rows = read_json_lines(file)
        if not rows or rows[0].get("schema") != SCHEMA:
            raise BadFile(file, "has no header of a schema this lbi reads")
    except BadFile as bad:
        store.problems.append(bad)
        raise InputError("sweep", name, f"its plan is damaged ({bad.reason})", "Run the sweep's command again") from bad
    return rows
