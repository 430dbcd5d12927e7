"""Which files of a result go to W&B, as artifacts made from the store.

wandb's offline runs keep absolute paths of artifacts and lose them when their folder moves, so
artifacts are never part of an offline run: they are attached from the store when W&B can be reached.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OF_A_PROCESS = {"process.json", "progress.json", "trace/process.json", "trace/request.json"}

LEFT_HERE = frozenset({"claim.json", "heartbeat", "wandb.json"} | OF_A_PROCESS)
"""Files of an attempt that say something about this machine's processes only."""

TRACES = "trace"
"""Folder of an attempt with what was recorded beside the measurement."""

VIEWED = ".pt.trace.json"
"""W&B's trace viewer opens files of this name, which must not be compressed."""

MB = 1e6


@dataclass(frozen=True, slots=True)
class Attachment:
    """An artifact: a name, a type, and files as (name in it, file here). `opens` is the file to look at."""

    name: str
    type: str
    files: Sequence[tuple[str, Path]]
    opens: str = ""

    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.stat().st_size for _, file in self.files)

    def add_to(self, artifact: Any) -> None:
        """Put the files in a `wandb.Artifact`, without the copies that wandb would stage and cache."""
        for name, file in self.files:
            artifact.add_file(str(file), name=name, policy="immutable", skip_cache=True)


@dataclass(frozen=True, slots=True)
class Attachments:
    """What is attached to a run, and the files that are larger than allowed."""

    made: Sequence[Attachment]
    too_large: Sequence[str]


def attachments(run_id: str, folder: Path | None, level: str, max_mb: float, scratch: Path) -> Attachments:
    """A result's artifacts by `tracker.files`; traces that W&B is to show are unpacked into `scratch`."""
    if folder is None or level == "none":
        return Attachments([], [])
    kept, too_large = [], []
    for name, file in whole_files(folder, traces=level == "all"):
        if file.stat().st_size > max_mb * MB:
            too_large.append(name)
        else:
            kept.append((name, file))
    results = [(name, file) for name, file in kept if not name.startswith(f"{TRACES}/")]
    made = [Attachment(f"result-{run_id}", "result", results)] if results else []
    traces = [(name, file) for name, file in kept if name.startswith(f"{TRACES}/")]
    if traces:
        shown = list(_unpacked(traces, max_mb, scratch / run_id))
        opens = next((name for name, _ in [*shown, *traces] if name.endswith(VIEWED)), "")
        made.append(Attachment(f"trace-{run_id}", "profile", [*traces, *shown], opens))
    return Attachments(made, too_large)


def whole_files(folder: Path, *, traces: bool) -> Iterator[tuple[str, Path]]:
    """Every whole file of an attempt, by its path inside; links could lead anywhere and are left out."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or file.is_symlink() or file.name.startswith(".") or name in LEFT_HERE:
            continue
        if traces or not name.startswith(f"{TRACES}/"):
            yield name, file


def _unpacked(files: Sequence[tuple[str, Path]], max_mb: float, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Traces under a name that W&B's viewer takes, unless that is larger than allowed."""
    for name, file in files:
        if "trace" not in file.name or name.endswith(VIEWED) or not name.endswith((".json.gz", ".json")):
            continue
        target = scratch / (name.removesuffix(".gz").removesuffix(".json").removesuffix(".pt.trace") + VIEWED)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with gzip.open(file) if name.endswith(".gz") else file.open("rb") as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        except (OSError, EOFError, zlib.error):
            # A damaged trace is attached as it is.
            continue
        if target.stat().st_size <= max_mb * MB:
            yield target.relative_to(scratch).as_posix(), target
