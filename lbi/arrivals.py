"""Puts results that were measured on a machine without this store into it: from W&B, or from a job's log.

A result counts once it is whole here: its files first, its status last.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from lbi import environment, sites
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.files import read_json, write_json
from lbi.identity import digest
from lbi.store import SCHEMA, STATUSES, Store, attempt_numbers
from lbi.sweep_folder import note_environment
from lbi.typed import build

ID = re.compile(r"[0-9a-f]{1,64}")


def place(store: Store, source: Path, run_id: str, env_id: str, arrived: float | None = None) -> None:
    """Make the attempt whose files lie in `source` the result of a run, and remove `source`.

    With `arrived` the result is as old as its arrival here, if its own clock says that it is older:
    a rented machine's clock may be off. Raises `ValueError` for what is no such result.
    """
    if not ID.fullmatch(run_id) or not ID.fullmatch(env_id):
        raise ValueError(f"{run_id!r}, {env_id!r} are no ids of a result")
    outcome = read_json(source / "outcome.json", SCHEMA)
    if not outcome or (outcome["run_id"], outcome["env_id"]) != (run_id, env_id):
        raise ValueError(f"holds another result than {run_id}, {env_id}")
    if outcome["status"] not in STATUSES:
        raise ValueError(f"has the unknown status {outcome['status']!r}")
    if outcome["status"] == "ok" and read_json(source / "metrics.json", SCHEMA) is None:
        raise ValueError("is ok and has no metrics.json")
    folder = store.run_folder(run_id, env_id)
    taken = attempt_numbers(folder)
    # An attempt that was begun here, or stopped while it was fetched, stays as it is.
    number = int(outcome["attempt"]) if int(outcome["attempt"]) not in taken else max(taken) + 1
    outcome["attempt"] = number
    if arrived is not None:
        outcome["finished"] = max(arrived, float(outcome["finished"]))
    write_json(source / "outcome.json", outcome)
    shutil.copytree(source, folder / f"attempt-{number}")
    write_json(folder / "status.json", outcome)
    shutil.rmtree(source)


def has(store: Store, run_id: str, env_id: str, since: float) -> bool:
    """Whether the store has a result of this run that was finished after `since`."""
    result = store.result(run_id, env_id)
    return result is not None and result.finished > since


def note_origin(store: Store, sweep: str, run_id: str, env_id: str) -> None:
    """Note where a result came from: the sweep's reports look there, and the next plan expects that machine."""
    note_environment(store, sweep, env_id)
    result = store.result(run_id, env_id)
    description = store.read(result, "env.json") if result else None
    request = store.read(result, "config.json") if result else None
    if not result or not description or not request:
        return
    try:
        config = build(LbiConfig, request["config"])
        found = environment.key_of(description, config.engine.device)
    except (KeyError, IndexError, InputError):
        return
    # What was told by hand, or by another lbi, need not fit: then the next plan knows nothing, which is safe.
    if digest("env", found) == env_id:
        sites.note(store, config, found, env_id, result.finished)
