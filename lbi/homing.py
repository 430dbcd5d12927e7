"""Sends a result home from a machine that shares no folder with whoever asked for it.

By the job's log, where every cloud and cluster has one: bounded, compressed, with a sum; or by
W&B, where the runs go anyway. A run is not done before its result is home, so what cannot be
sent whole says so, and is not passed over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lbi import parcel
from lbi.config import TrackerConfig
from lbi.files import write_json
from lbi.store import SCHEMA, UNFINISHED, Result, Store
from lbi.trackers.wandb_files import TRACES, whole_files

Way = Literal["logs", "wandb"]

LOG_TAIL = 16384
"""Bytes of a run's own log that are sent where the whole is too much."""

RESULT, TOO_LARGE, REFUSAL, BEGUN, TOLD = "result", "toolarge", "refusal", "begun", "told"
"""Kinds of parcels and notes in a job's log."""


class Home(Protocol):
    """A way home."""

    def send(self, result: Result) -> bool:
        """Send a result; whether it is on its way for certain."""


def name_of(run_id: str, env_id: str) -> str:
    """What a result's parcel is called."""
    return f"{run_id}-{env_id}"


def begun(run_id: str) -> None:
    """Say in the log that a run has begun, so that whoever finds the job dead knows what killed it."""
    print(parcel.note(BEGUN, run_id), flush=True)


def refuse(reason: str) -> None:
    """Say in the log why this job cannot do what it is asked to."""
    for line in parcel.lines(REFUSAL, "job", parcel.pack({"reason": reason})):
        print(line, flush=True)


@dataclass(frozen=True, slots=True)
class ByLog:
    """Results as lines of this process's output, none larger than `limit_kb` (of letters)."""

    limit_kb: float

    def send(self, result: Result) -> bool:
        """Print the result; without its traces, and with the end of its log only, where it would be too large."""
        if result.status in UNFINISHED:
            return True
        name = name_of(result.run_id, result.env_id)
        smallest = 0
        for files in _smaller(result.folder):
            text = parcel.pack_files(files)
            smallest = len(text)
            if smallest <= self.limit_kb * 1000:
                for line in parcel.lines(RESULT, name, text):
                    print(line)
                print("", end="", flush=True)
                return True
        reason = f"its result takes {smallest / 1000:.0f} KB, more than hydra.launcher.max_result_kb={self.limit_kb:g}"
        for line in parcel.lines(TOO_LARGE, name, parcel.pack({"reason": reason})):
            print(line, flush=True)
        return False


@dataclass(slots=True)
class ByWandb:
    """Results as W&B runs with their files, as `lbi sync` writes them."""

    store: Store
    sweep: str
    tracker: TrackerConfig
    unsent: list[str] = field(default_factory=list)

    def send(self, result: Result) -> bool:
        """Write every result of this job that W&B does not have yet; whether it has all of them now."""
        if result.status in UNFINISHED:
            return True
        from lbi.trackers.wandb import write_meanwhile

        self.unsent.append(name_of(result.run_id, result.env_id))
        if not write_meanwhile(self.store, self.sweep, self.tracker, threading.Event()):
            print(f"W&B did not take {', '.join(self.unsent)}; tried again after the next run", flush=True)
            return False
        for name in self.unsent:
            print(parcel.note(TOLD, name), flush=True)
        self.unsent.clear()
        return True


def _smaller(folder: Path) -> Iterator[dict[str, Path]]:
    """The files of a result: all, then without traces, then with the end of its log only. What is left out is said."""
    files = dict(whole_files(folder, traces=True))
    traces = sorted(name for name in files if name.startswith(f"{TRACES}/"))
    yield files
    if traces:
        _say(folder, traces)
        files = {name: path for name, path in files.items() if name not in traces}
        yield files | {LEFT: folder / LEFT}
    log = files.get("log.txt")
    if log is not None and log.stat().st_size > LOG_TAIL:
        short = folder / ".log-end.txt"
        short.write_bytes(log.read_bytes()[-LOG_TAIL:])
        _say(folder, [*traces, "log.txt but its end"])
        yield files | {"log.txt": short, LEFT: folder / LEFT}


LEFT = "left_behind.json"
"""Names the files that were too large to be sent."""


def _say(folder: Path, names: list[str]) -> None:
    write_json(folder / LEFT, {"schema": SCHEMA, "files": names, "reason": "too large for the job's log"})
