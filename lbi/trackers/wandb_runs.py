"""What W&B is to say about a sweep, and what it has been told already.

One W&B run per result and per pruned cell, with an id made from what it is: writing it twice
changes nothing. What was told is kept in the store, beside what it is about:

    runs/<run_id>/<env_id>/attempt-N/wandb.json     a result
    sweeps/<name>/wandb.json                        the sweep's pruned cells, and how W&B was reached last
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lbi.collect import Row, rows
from lbi.config import AXES, IDENTITY, TrackerConfig
from lbi.files import BadFile, read_json, write_json
from lbi.identity import DISPLAY_ONLY
from lbi.store import SCHEMA, STATUSES, Store, attempt_numbers
from lbi.trackers.wandb_access import Access

TAGGED = ("model", "quantizer", "engine", "decoding", "cache", "status")
MAX_TAG = 64
"""W&B refuses longer tags."""

SAVE_EVERY_S = 1.0

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Run:
    """One W&B run, as the store says it should be. `folder` holds the attempt; None for a pruned cell."""

    id: str
    row: Row
    folder: Path | None

    def tags(self, sweeps: Sequence[str]) -> list[str]:
        """What the W&B page filters by: the options, the status, the sweeps it belongs to."""
        wanted = [str(self.row[name])[:MAX_TAG] for name in TAGGED] + [f"sweep:{name}"[:MAX_TAG] for name in sweeps]
        return [tag for tag in dict.fromkeys(wanted) if tag]

    def config(self, sweep: str) -> dict[str, Any]:
        """The names of the options, and every knob that can change the result as `quantizer_bits`.

        W&B's pages and filters read a dot in a key as nesting (wandb issues 3087, 6222), hence `_`.
        """
        named = {name: self.row[name] for name in (*AXES, "run_id", "env_id", "rule") if self.row[name]}
        request = _read(self.folder / "config.json") if self.folder else {}
        sections = request.get("config", {})
        knobs: dict[str, Any] = {}
        for group in IDENTITY:
            section = {key: value for key, value in sections.get(group, {}).items() if key not in DISPLAY_ONLY}
            knobs |= dict(_flat(group, section))
        device = {"device": request["device_name"]} if "device_name" in request else {}
        return {"sweep": sweep, **knobs, **device, **named}

    def metrics(self) -> dict[str, float]:
        """Every number that was measured."""
        if self.folder is None or self.row["status"] != "ok":
            return {}
        known = _read(self.folder / "metrics.json").get("metrics", {})
        return {name: value for name, value in known.items() if value is not None}

    def summary(self) -> dict[str, Any]:
        """What the W&B table shows: the metrics, and what became of the cell."""
        host = _read(self.folder / "outcome.json").get("host") if self.folder else None
        ending = {name: self.row[name] for name in ("status", "reason", "attempt")} | {"host": host}
        return self.metrics() | {name: value for name, value in ending.items() if value not in (None, "")}


def of_sweep(store: Store, sweep: str) -> list[Run]:
    """A run for every cell that has something to say; duplicates and cells without a result have not."""
    made: dict[str, Run] = {}
    prefix = "pruned-" + hashlib.sha256(sweep.encode()).hexdigest()[:8]
    for row in rows(store, sweep):
        if row["status"] in STATUSES:
            run = Run(f"{row['run_id']}-{row['env_id']}", row, Path(row["folder"]))
        elif row["status"] == "pruned":
            run = Run(f"{prefix}-{row['run_id'] or row['cell']}", row, None)
        else:
            continue
        made.setdefault(run.id, run)
    return list(made.values())


@dataclass(frozen=True, slots=True)
class Told:
    """What W&B was told about a run: as part of which sweep first and which since, and where it is.

    `folder` is the offline run's folder, relative to the store; empty for an online run.
    """

    mode: str
    id: str
    name: str
    project: str
    entity: str | None
    server: str
    sweep: str
    sweeps: Sequence[str]
    url: str | None = None
    project_url: str | None = None
    folder: str = ""


class Ledger:
    """What W&B has been told about a sweep's runs, for one project."""

    def __init__(self, store: Store, sweep: str, config: TrackerConfig) -> None:
        self.store, self.sweep, self.config = store, sweep, config
        self._file = store.sweep_folder(sweep) / "wandb.json"
        content = _read(self._file)
        self._pruned: dict[str, Any] = content.get("pruned", {})
        self.last: Access | None = _parsed(Access, content.get("access"))
        self._saved = 0.0

    def state(self, run: Run) -> str:
        """online, offline, or empty where W&B must be told (again)."""
        told = self.latest(run)
        if told is None or self.sweep not in told.sweeps or not self._same_place(told):
            return ""
        if told.mode == "online":
            return "online"
        folder = self.store.root / told.folder
        if any(folder.glob("*.wandb.synced")):
            # Somebody has uploaded it with `wandb sync`.
            return "online"
        return "offline" if folder.is_dir() else ""

    def latest(self, run: Run) -> Told | None:
        """What was told about exactly this attempt, or pruned cell."""
        if run.folder is None:
            return _parsed(Told, self._pruned.get(run.id))
        return _parsed(Told, _read(run.folder / "wandb.json"))

    def earlier(self, run: Run) -> list[Told]:
        """What was told of this run by any attempt, oldest first."""
        if run.folder is None:
            told = [self.latest(run)]
        else:
            folder = run.folder.parent
            attempts = [folder / f"attempt-{number}" for number in sorted(attempt_numbers(folder))]
            told = [_parsed(Told, _read(attempt / "wandb.json")) for attempt in attempts]
        return [item for item in told if item is not None]

    def note(self, run: Run, told: Told) -> None:
        """Keep what was told. Offline folders that it replaces go: uploaded beside it they would say it twice."""
        old = {item.folder for item in self.earlier(run)} - {told.folder, ""}
        if run.folder is None:
            self._pruned[run.id] = asdict(told)
            # All pruned cells share one file; with thousands of them it is not written for each.
            if time.monotonic() - self._saved > SAVE_EVERY_S:
                self.save()
        else:
            write_json(run.folder / "wandb.json", {"schema": SCHEMA, **asdict(told)})
        for name in old:
            folder = self.store.root / name
            if folder.parent == self.store.root / "wandb" and folder.name.startswith("offline-run-"):
                shutil.rmtree(folder, ignore_errors=True)

    def save(self) -> None:
        """Write the sweep's file."""
        access = asdict(self.last) if self.last else None
        write_json(self._file, {"schema": SCHEMA, "access": access, "pruned": self._pruned})
        self._saved = time.monotonic()

    def _same_place(self, told: Told) -> bool:
        server = os.environ.get("WANDB_BASE_URL")
        if told.mode == "online" and server and server.rstrip("/") != told.server.rstrip("/"):
            return False
        return told.project == self.config.project and self.config.entity in (None, told.entity)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Scalars under a value, each by its path; what is unset is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}_{key}", item)
    elif value is not None:
        yield re.sub(r"\W", "_", name), " ".join(map(str, value)) if isinstance(value, list) else value


def _read(file: Path) -> dict[str, Any]:
    """The content of a file that may be missing; a damaged one counts as missing and is written anew."""
    try:
        return read_json(file, SCHEMA) or {}
    except BadFile:
        return {}


def _parsed(cls: type[Kind], content: Any) -> Kind | None:
    if not isinstance(content, Mapping):
        return None
    try:
        return cls(**{key: value for key, value in content.items() if key != "schema"})
    except TypeError:
        return None
