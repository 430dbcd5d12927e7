"""What W&B is to say about a sweep, and what it has been told already.

One W&B run per result and per pruned cell, and one for the sweep's table (wandb_sweep_run.py),
with an id made from what it is: writing it twice changes nothing. What was told is kept in the
store, beside what it is about:

    runs/<run_id>/<env_id>/attempt-N/wandb.json     a result
    sweeps/<name>/wandb.json                        the sweep's pruned cells and table, and how W&B was reached last
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lbi.collect import Row, rows
from lbi.config import AXES, IDENTITY, TrackerConfig
from lbi.files import BadFile, read_json, write_json
from lbi.identity import DISPLAY_ONLY
from lbi.ranking import KLD_FLOOR
from lbi.store import SCHEMA, STATUSES, Store, attempt_numbers
from lbi.trackers.wandb_access import Access
from lbi.trackers.wandb_files import Attachments, attachments

TAGGED = ("model", "quantizer", "engine", "decoding", "cache", "status")
LEVELS = ("none", "results", "all")
"""Values of `tracker.files`, each attaching what the one before does."""

KLD_PLOTTED = "mean_kld_plotted"
"""The mean KLD, at least `KLD_FLOOR`: a logarithmic axis cannot show the baseline's zero."""

PAGES = "dashboard"
"""Summary entry of a sweep's run: ids and addresses of its workspace and its report."""

MAX_TAG = 64
"""W&B refuses longer tags."""

SAVE_EVERY_S = 1.0

Kind = TypeVar("Kind")

Grid = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""A table's columns and rows."""


@dataclass(frozen=True, slots=True)
class Run:
    """One W&B run, as the store says it should be. `folder` holds the attempt; None for a pruned cell.

    `digest` changes with the content of a run that is not about one attempt.
    """

    id: str
    row: Row
    folder: Path | None
    digest: str = ""

    job_type: ClassVar[str] = "bench"
    keeps: ClassVar[Collection[str]] = ()
    """Summary entries of others, which stay when the run is written anew."""

    def tags(self, sweeps: Sequence[str]) -> list[str]:
        """What the W&B page filters by: the options, the status, the sweeps it belongs to."""
        wanted = [*(str(self.row[name]) for name in TAGGED), self._device(), *(sweep_tag(name) for name in sweeps)]
        return [tag for tag in dict.fromkeys(tag[:MAX_TAG] for tag in wanted) if tag]

    def _device(self) -> str:
        """The GPU's or CPU's name; empty for a cell that has not run."""
        request = _read(self.folder / "config.json") if self.folder else {}
        return str(request.get("device_name") or "")

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
        device = {"device": self._device()} if self._device() else {}
        return {"sweep": sweep, **knobs, **device, **named}

    def metrics(self) -> dict[str, float]:
        """Every number that was measured."""
        if self.folder is None or self.row["status"] != "ok":
            return {}
        known = _read(self.folder / "metrics.json").get("metrics", {})
        found = {name: value for name, value in known.items() if value is not None}
        if "mean_kld" in found:
            found[KLD_PLOTTED] = max(found["mean_kld"], KLD_FLOOR)
        return found

    def grids(self) -> dict[str, Grid]:
        """The raw samples and the generated text, as W&B's tables by the name of their summary entry."""
        if self.folder is None or self.row["status"] != "ok":
            return {}
        made = {
            "samples": _samples(self.folder / "samples.parquet"),
            "generated": _generated(self.folder / "text.json"),
        }
        return {name: grid for name, grid in made.items() if grid is not None}

    def pages(self) -> dict[str, Path]:
        """HTML pages by the name of their summary entry."""
        return {}

    def attachments(self, config: TrackerConfig, scratch: Path) -> Attachments:
        """The artifacts to attach, as `tracker.files` and `tracker.max_file_mb` have it."""
        return attachments(self.id, self.folder, config.files, config.max_file_mb, scratch)

    def summary(self) -> dict[str, Any]:
        """What the W&B table shows: the metrics, and what became of the cell."""
        host = _read(self.folder / "outcome.json").get("host") if self.folder else None
        ending = {name: self.row[name] for name in ("status", "reason", "attempt")} | {"host": host}
        return self.metrics() | {name: value for name, value in ending.items() if value not in (None, "")}


def of_sweep(store: Store, sweep: str, table: Sequence[Row] | None = None) -> list[Run]:
    """A run for every cell that has something to say; duplicates and cells without a result have not.

    `table` are the sweep's rows, where they have been read.
    """
    made: dict[str, Run] = {}
    prefix = "pruned-" + hashlib.sha256(sweep.encode()).hexdigest()[:8]
    for row in rows(store, sweep) if table is None else table:
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

    `folder` is the offline run's folder, relative to the store; empty for an online run. `artifacts` are those
    that the server has committed, with their addresses, under a `tracker.files` of `files`; `opens` is the
    address of the trace's viewer.
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
    digest: str = ""
    files: str = "none"
    artifacts: Mapping[str, str] = field(default_factory=dict)
    opens: str = ""


class Ledger:
    """What W&B has been told about a sweep's runs, for one project."""

    def __init__(self, store: Store, sweep: str, config: TrackerConfig) -> None:
        self.store, self.sweep, self.config = store, sweep, config
        self._file = store.sweep_folder(sweep) / "wandb.json"
        content = _read(self._file)
        self._kept: dict[str, Any] = content.get("pruned", {})
        self.last: Access | None = _parsed(Access, content.get("access"))
        self._saved = 0.0

    def state(self, run: Run) -> str:
        """online, offline, or empty where W&B must be told (again)."""
        told = self.latest(run)
        if told is None or self.sweep not in told.sweeps or not self._same_place(told) or told.digest != run.digest:
            return ""
        if told.mode == "online":
            return "online" if LEVELS.index(told.files) >= LEVELS.index(self.config.files) else ""
        # What `wandb sync` has uploaded lacks tables and artifacts, so it still counts as offline.
        return "offline" if (self.store.root / told.folder).is_dir() else ""

    def latest(self, run: Run) -> Told | None:
        """What was told about exactly this attempt, or pruned cell."""
        if run.folder is None:
            return _parsed(Told, self._kept.get(run.id))
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
            self._kept[run.id] = asdict(told)
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
        write_json(self._file, {"schema": SCHEMA, "access": access, "pruned": self._kept})
        self._saved = time.monotonic()

    def _same_place(self, told: Told) -> bool:
        server = os.environ.get("WANDB_BASE_URL")
        if told.mode == "online" and server and server.rstrip("/") != told.server.rstrip("/"):
            return False
        return told.project == self.config.project and self.config.entity in (None, told.entity)


def sweep_tag(sweep: str) -> str:
    """The tag that every run of a sweep has, also one whose group is another sweep."""
    return f"sweep:{sweep}"[:MAX_TAG]


def _samples(file: Path) -> Grid | None:
    """The raw samples as `lbi.measuring` wrote them, a row for each token, without empty columns."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (OSError, ValueError):
        return None
    columns = [name for name in table.column_names if table.column(name).null_count != len(table)]
    return (columns, [[row[name] for name in columns] for row in table.to_pylist()]) if columns else None


def _generated(file: Path) -> Grid | None:
    """The text that was generated, in one row."""
    content = _read(file)
    if "text" not in content:
        return None
    return ["prompt_tokens", "new_tokens", "text"], [
        [content.get("prompt_tokens"), len(content.get("tokens") or []), str(content["text"])]
    ]


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
