"""Which pools of rented machines a store has made, so that a forgotten one is seen: it costs money until it is ended.

<store>/pools/<pool>.json
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbi.executors.sky import Pool, Sky
from lbi.files import BadFile, read_json, write_json
from lbi.store import SCHEMA, Store


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """What the store says of a pool."""

    file: Path
    name: str
    command: tuple[str, ...]
    sweeps: tuple[str, ...]
    applied_at: float
    down_at: float | None
    spec: str = ""
    """Sum of the YAML that it was applied with."""

    @classmethod
    def applied(cls, store: Store, name: str, command: Sequence[str], sweep: str, spec: str = "") -> PoolRecord:
        """Note that a pool is about to be made, brought up to date or used for a sweep."""
        file = store.root / "pools" / f"{name}.json"
        known = _parsed(file)
        up = known if known and known.down_at is None else None
        sweeps = tuple(dict.fromkeys([*(up.sweeps if up else ()), sweep]))
        record = cls(file, name, tuple(command), sweeps, up.applied_at if up else time.time(), None, spec)
        record._write()
        return record

    def downed(self) -> None:
        """Note that the pool has been ended."""
        replace(self, down_at=time.time())._write()

    def _write(self) -> None:
        content: dict[str, Any] = {"schema": SCHEMA, "pool": self.name, "command": list(self.command)}
        content |= {"sweeps": list(self.sweeps), "applied": self.applied_at, "down": self.down_at}
        content["spec"] = self.spec
        write_json(self.file, content)


def up(store: Store, sweep: str | None = None) -> list[PoolRecord]:
    """Pools that nobody has ended, of one sweep or of all."""
    found = [_parsed(file) for file in sorted((store.root / "pools").glob("*.json"))]
    return [
        record
        for record in found
        if record is not None and record.down_at is None and (sweep is None or sweep in record.sweeps)
    ]


def describe(records: Sequence[PoolRecord]) -> list[str]:
    """What is up and what it has cost, a line for each pool, as far as SkyPilot answers."""
    lines = []
    for command in dict.fromkeys(record.command for record in records):
        mine = {record.name: record for record in records if record.command == command}
        found = Sky(command).pools(list(mine))
        if found is None:
            lines += [f"The pool {name} may be up; SkyPilot's server does not answer" for name in mine]
            continue
        for name in mine.keys() - {pool.name for pool in found}:
            # It was ended by hand.
            mine[name].downed()
        lines += [_line(pool, mine[pool.name]) for pool in found]
    return lines


def _line(pool: Pool, record: PoolRecord) -> str:
    hours = (time.time() - record.applied_at) / 3600
    spent = "at a cost that SkyPilot does not know" if pool.dollars is None else f"for ${pool.dollars:.2f} until now"
    return (
        f"The pool {pool.name} is up ({pool.status}, {pool.workers} machines) since {hours:.1f} h, {spent}. "
        f"To end it: python -m lbi cancel {record.sweeps[-1]} --down"
    )


def _parsed(file: Path) -> PoolRecord | None:
    try:
        known = read_json(file, SCHEMA)
    except BadFile:
        return None
    if known is None:
        return None
    sweeps, command = tuple(known["sweeps"]), tuple(known["command"])
    return PoolRecord(file, known["pool"], command, sweeps, float(known["applied"]), known["down"], known["spec"])
