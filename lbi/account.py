"""The worker's account of one run: what it timed around the child, what the child said, and for what kind of run.

It becomes the `cost` of the run's status.json, from which the report says where the time went and
the cost model learns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbi.children import Started
from lbi.cost import summed
from lbi.cost_keys import Kinds
from lbi.files import BadFile, read_json, write_json
from lbi.store import SCHEMA

if TYPE_CHECKING:
    from lbi.ahead import Share
    from lbi.worker import Task

REFERENCE_COST = "cost.json"
"""In a reference's folder: what it took to make."""


class Account:
    """Seconds by step, and facts that say what was shared."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}

    @contextlib.contextmanager
    def timing(self, step: str) -> Iterator[None]:
        """Count the time while it is open as that step's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - began

    def note_started(self, started: Started) -> None:
        """How the measuring process, and before it perhaps the reference's, was started."""
        new = started.new_server or bool(self.facts.get("new_server"))
        self.facts |= {"forked": started.import_s is not None, "server_import_s": started.import_s, "new_server": new}

    def note_ahead(self, share: Share | None) -> float:
        """What compiling the run's graph ahead took of the slot, if that was for this run; its seconds."""
        if share is None:
            return 0.0
        self.seconds["compile ahead"] = share.seconds
        self.facts["new_server"] = share.new_server
        return share.seconds

    def note_reference(self, seconds: float, made: Sequence[Path]) -> None:
        """The unquantized model was run for `seconds`, the start of its process included; `made` holds what it left."""
        # Starting its process is counted as such: where that imported the libraries, later runs fork from them.
        seconds = self.seconds["reference"] = max(0.0, seconds - self.seconds.get("start", 0.0))
        self.facts["reference"] = "computed"
        for folder in made:
            if folder.exists() and not (folder / REFERENCE_COST).exists():
                # What the next cell saves; a store that cannot take the note loses the note.
                with contextlib.suppress(OSError):
                    write_json(folder / REFERENCE_COST, {"schema": SCHEMA, "seconds": seconds})

    def note_kept(self, used: Sequence[Path]) -> None:
        """The run's references were there already; what they once took, where that is known."""
        self.facts["reference"] = "kept"
        took = [_seconds(folder / REFERENCE_COST) for folder in used]
        # One process makes both outputs, so its seconds stand in both folders.
        self.facts["reference_s"] = max((seconds for seconds in took if seconds is not None), default=None)

    def cost(self, task: Task, attempt: Path, seconds: float, lane: str) -> dict[str, Any]:
        """All of it, with what the child left in its verdict; `lane` names the place that was occupied meanwhile."""
        said = _verdict(attempt)
        steps = {**(said.get("phases_s") or {}), **self.seconds}
        config = task.config
        return {
            "phases_s": summed(steps, seconds),
            "lane": lane,
            "device": config.engine.device,
            "gpus": 1 if config.engine.device == "cuda" else 0,
            **self.facts,
            **(said.get("cost") or {}),
            "kind": Kinds().of(config),
        }


def _verdict(attempt: Path) -> dict[str, Any]:
    """What the child said at its end; nothing of one that was killed, whose time is then all `other`."""
    try:
        return read_json(attempt / "verdict.json", SCHEMA) or {}
    except BadFile:
        return {}


def _seconds(file: Path) -> float | None:
    try:
        found = (read_json(file, SCHEMA) or {}).get("seconds")
    except BadFile:
        return None
    return float(found) if isinstance(found, int | float) else None
