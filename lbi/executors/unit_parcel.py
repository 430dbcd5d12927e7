"""Units as a parcel, for machines that do not see the sweep's folder; job.py takes it apart there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lbi import environment, snapshot
from lbi.errors import InputError
from lbi.homing import Way
from lbi.model_files import inspect
from lbi.parcel import pack
from lbi.schedule import Unit
from lbi.store import SCHEMA, Store
from lbi.sweep_folder import read_plan
from lbi.typed import plain
from lbi.worker import Task


def pack_units(store: Store, sweep: str, units: Sequence[Unit], home: Way, limit_kb: float) -> str:
    """The units, and all that a job would look up in the sweep's folder: which code, which weights, which cells."""
    cells = {row["index"]: row for row in read_plan(store, sweep)}
    weights = {task.run_id: _fingerprint(task) for unit in units for task in unit.tasks}
    content = {
        "schema": SCHEMA,
        "sweep": sweep,
        "code": snapshot.identity(),
        "git": environment.git_state(),
        "home": home,
        "limit_kb": limit_kb,
        "weights": {run_id: known for run_id, known in weights.items() if known},
        "units": [
            {
                "name": unit.name,
                "tasks": [_row(task) for task in unit.tasks],
                "cells": [cells[task.cell] for task in unit.tasks if task.cell in cells],
            }
            for unit in units
        ],
    }
    return pack(content)


def _row(task: Task) -> dict[str, Any]:
    return {
        "cell": task.cell,
        "name": task.name,
        "run_id": task.run_id,
        "env_id": task.env_id,
        "config": plain(task.config),
    }


def _fingerprint(task: Task) -> str | None:
    """What the plan knows the weights by; None for a hub id that is not here, and for random weights."""
    if task.config.model.source == "random":
        return None
    try:
        return inspect(task.config.model).fingerprint
    except InputError:
        return None
