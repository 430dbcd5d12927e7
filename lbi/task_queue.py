"""The tasks that several slots take in turn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lbi.share_key import together

if TYPE_CHECKING:
    from lbi.worker import Task

AGAIN_S = 1.0
"""A run that another process was measuring is looked at again after this time."""


class TaskQueue:
    """Gives out tasks in order, each to one slot. What another process has comes back after all others.

    A task whose graph, or whose loaded model, another slot has in hand waits while there are others: it would
    compile, or load, a second time.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._lock = threading.Lock()
        self._fresh = deque(tasks)
        self._busy: deque[tuple[float, Task]] = deque()
        self._in_hand: dict[str, str] = {}

    def next(self) -> Task | None:
        """The task that is next in line; None if there is none left."""
        with self._lock:
            if self._fresh:
                return self._fresh[0]
            return self._busy[0][1] if self._busy else None

    def waiting(self) -> list[Task]:
        """The tasks that nobody has taken, in line."""
        with self._lock:
            return list(self._fresh)

    def take(self) -> Task | None:
        """The next task, to be measured now; None if none is left, or those left are not due yet."""
        with self._lock:
            if self._fresh:
                return self._take_fresh()
            if self._busy and self._busy[0][0] <= time.monotonic():
                return self._busy.popleft()[1]
        return None

    def take_like(self, wanted: Callable[[Task], bool]) -> Task | None:
        """The next task that nobody has taken and that is as `wanted`, to be measured now; None if there is none."""
        with self._lock:
            number = next((number for number, task in enumerate(self._fresh) if wanted(task)), None)
            return None if number is None else self._hand_out(number)

    def put_back(self, task: Task) -> None:
        """Another process is measuring this run: look again later whether it has."""
        with self._lock:
            self._busy.append((time.monotonic() + AGAIN_S, task))

    def done(self, task: Task) -> None:
        """A slot has ended with this task, and its graph is there for others."""
        with self._lock:
            self._in_hand.pop(task.run_id, None)

    def _take_fresh(self) -> Task:
        in_hand = set(self._in_hand.values())
        free = (number for number, task in enumerate(self._fresh) if together(task.config) not in in_hand)
        return self._hand_out(next(free, 0))

    def _hand_out(self, number: int) -> Task:
        task = self._fresh[number]
        del self._fresh[number]
        key = together(task.config)
        if key is not None:
            self._in_hand[task.run_id] = key
        return task
