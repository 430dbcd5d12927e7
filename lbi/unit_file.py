"""A unit as a job finds it: the file that schedule.py wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.files import BadFile, read_json
from lbi.store import SCHEMA
from lbi.typed import build
from lbi.worker import Task


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A unit as a job finds it: its tasks, the store, when it was planned, and what it was planned for."""

    tasks: list[Task]
    store: Path
    since: float
    sweep: str
    packages: dict[str, str]
    git: dict[str, Any] | None


def load_unit(file: Path) -> UnitFile:
    """Read a unit file. Raises `InputError` for a file that is none."""
    try:
        unit = read_json(file, SCHEMA)
    except BadFile as bad:
        raise InputError("unit", str(file), bad.reason) from bad
    if unit is None:
        raise InputError("unit", str(file), "there is no such file")
    tasks = [
        Task(row["cell"], row["name"], row["run_id"], row["env_id"], build(LbiConfig, row["config"]))
        for row in unit["tasks"]
    ]
    return UnitFile(tasks, Path(unit["store"]), float(unit["since"]), unit["sweep"], unit["packages"], unit["git"])
