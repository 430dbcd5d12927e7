"""One at a time for each thing that several slots would otherwise make at once, and no second try of what failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

POLL_S = 1.0


class Turns:
    """Locks by name, shared by the slots of one driver. `failed` says of what was tried why there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self.failed: dict[str, str] = {}

    @contextmanager
    def of(self, names: Sequence[str], while_waiting: Callable[[], object]) -> Iterator[None]:
        """Have all of `names` to oneself while open; `while_waiting` is called every second before that."""
        with ExitStack() as held:
            # In one order for everybody, so that no two wait for each other.
            for name in sorted(names):
                with self._lock:
                    lock = self._locks.setdefault(name, threading.Lock())
                while not lock.acquire(timeout=POLL_S):
                    while_waiting()
                held.callback(lock.release)
            yield
