"""The process that runs of one slot share, and which runs may: the worker's side of resources.isolation=shared_load.

Runs with one `share_key` follow each other in one child (shared_run.py), which is handed a claimed attempt at a time.
It is ended before the slot is given to anything else: a run of its own, the unquantized model, another driver. A run
that ends otherwise than well ends it, and the rest of the group is isolated.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbi import isolation_check
from lbi.children import Ended, Started, end_session
from lbi.share_key import PROCESS, SHARED, share_key, why_alone

if TYPE_CHECKING:
    from lbi.worker import Task

OWN_WORD = frozenset({"oom", "numerics", "not_applied"})
"""Statuses that are kept for good. What another run left behind may be their cause, so a run that was not the first
of its process is measured again in one of its own before they count."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """How a run is kept from others, for its record.

    `how` is process or shared_load. `after` are the runs that its process did before, oldest first; `why` says why
    it has a process of its own although it was to share one, `compared` what the A/B check found.
    """

    how: str = PROCESS
    after: tuple[str, ...] = ()
    why: str = ""
    compared: str = ""

    def record(self) -> dict[str, Any]:
        """What is to be said of it."""
        return {name: value for name, value in asdict(self).items() if value}


class Sharing:
    """The shared process of one slot, if there is one at the moment. `root` is the store's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process: Any = None
        self._key: tuple[str, str] | None = None
        self._done: list[str] = []
        self._broken: dict[tuple[str, str], str] = {}
        self._orders: _Orders | None = None

    @property
    def lives(self) -> bool:
        """Whether there is a process, as far as is known."""
        return self._process is not None

    def takes(self, task: Task) -> bool:
        """Whether the process that there is could do this run next."""
        return self.lives and self._key == (share_key(task.config), task.env_id)

    def of(self, task: Task) -> Isolation:
        """How a run is to be isolated now. A process that it cannot follow in is ended."""
        found = self._of(task)
        if not found.after:
            self.end()
        return found

    def _of(self, task: Task) -> Isolation:
        if task.config.resources.isolation != SHARED:
            return Isolation()
        key = (share_key(task.config), task.env_id)
        if key[0] is None:
            return Isolation(why=why_alone(task.config) or "")
        if self.takes(task) and self._process.poll() is not None:
            self._break(f"the process ended by itself between two runs (code {self._process.returncode})")
        if key in self._broken:
            return Isolation(why=self._broken[key])
        after = tuple(self._done) if self.takes(task) else ()
        checked = isolation_check.read(self.root, task.env_id)
        refusal = checked.refusal(after, task.run_id)
        if refusal:
            return Isolation(why=refusal)
        return Isolation(SHARED, after, compared=checked.said(after, task.run_id))

    def begin(self, task: Task, start: Callable[..., Started]) -> Started:
        """Start a process for this run and those after it; `start(stdin=...)` does."""
        self.end()
        self._orders = _Orders()
        started = start(stdin=self._orders.path)
        self._process, self._key = started.process, (str(share_key(task.config)), task.env_id)
        return started

    def give(self, folder: Path) -> Started:
        """Have the process do the attempt in `folder`."""
        if self._orders is None:
            raise RuntimeError("no process is there to be given a run")
        self._orders.give(folder)
        return Started(self._process, f"done by the process of {', '.join(self._done)}")

    def note(self, task: Task, ended: Ended | None, status: str, spoilt: str) -> None:
        """A run of the process has ended with `status`; `ended` is None if the process lives on.

        `spoilt` says why the process itself would not do another run.
        """
        if ended is None:
            self._done.append(task.run_id)
        elif spoilt:
            self._break(f"{task.run_id} did not leave the model as it was: {spoilt}")
        else:
            self._break(f"{task.run_id}, which shared its process, ended as {status} ({ended.describe()})")

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            end_session(self._process)
        self._process, self._key, self._done = None, None, []
        if self._orders is not None:
            self._orders.close()
        self._orders = None

    def _break(self, why: str) -> None:
        if self._key is not None:
            self._broken[self._key] = why
        self.end()


class _Orders:
    """A named pipe, for a process that may be forked by another one: this end stays open as long as it has a use."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lbi-orders-"))
        self.path = self._folder / "attempts"
        os.mkfifo(self.path)
        # To read, too: opening it to write alone would wait for the reader.
        self._end = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def give(self, folder: Path) -> None:
        os.write(self._end, f"{folder}\n".encode())

    def close(self) -> None:
        os.close(self._end)
        shutil.rmtree(self._folder, ignore_errors=True)
