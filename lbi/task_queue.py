"""The tasks that several slots take in turn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbi.worker import Task

AGAIN_S = 1.0
"""A run that another process was measuring is looked at again after this time."""


class TaskQueue:
    """Gives out tasks in order, each to one slot. What another process has comes back after all others."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._lock = threading.Lock()
        self._fresh = deque(tasks)
        self._busy: deque[tuple[float, Task]] = deque()

    def next(self) -> Task | None:
        """The task that is next in line; None if there is none left."""
        with self._lock:
            if self._fresh:
                return self._fresh[0]
            return self._busy[0][1] if self._busy else None

    def take(self) -> Task | None:
        """The next task, to be measured now; None if none is left, or those left are not due yet."""
        with self._lock:
            if self._fresh:
                return self._fresh.popleft()
            if self._busy and self._busy[0][0] <= time.monotonic():
                return self._busy.popleft()[1]
        return None

    def put_back(self, task: Task) -> None:
        """Another process is measuring this run: look again later whether it has."""
        with self._lock:
            self._busy.append((time.monotonic() + AGAIN_S, task))
