"""What a result's files say beyond its row: read once for the whole report.

A file that is missing or damaged leaves its part empty and is noted in the store's
problems, like everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.collect import Row
from lbi.files import BadFile, read_json
from lbi.store import SCHEMA, Store


@dataclass(frozen=True, slots=True)
class Facts:
    """The attempt's files of one cell; empty where it has none."""

    effective: dict[str, Any]
    environment: dict[str, Any]
    text: dict[str, Any]
    ending: dict[str, Any]
    phase: str


NONE = Facts({}, {}, {}, {}, "")


def read_facts(store: Store, rows: Sequence[Row]) -> dict[int, Facts]:
    """The facts by cell."""
    return {row["cell"]: _read(store, row) for row in rows}


def _read(store: Store, row: Row) -> Facts:
    if not row["folder"]:
        return NONE
    folder = Path(row["folder"])
    if row["status"] == "running":
        return Facts({}, {}, {}, {}, str(_file(store, folder / "progress.json").get("phase") or ""))
    return Facts(
        effective=_file(store, folder / "effective.json"),
        environment=_file(store, folder / "env.json"),
        text=_file(store, folder / "text.json"),
        ending=_file(store, folder / "verdict.json") or _file(store, folder / "metrics.json"),
        phase="",
    )


def _file(store: Store, path: Path) -> dict[str, Any]:
    try:
        return read_json(path, SCHEMA) or {}
    except BadFile as bad:
        store.problems.append(bad)
        return {}


def part(known: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside a file; empty where the file holds something else there."""
    value = known.get(name)
    return value if isinstance(value, dict) else {}
