"""Runs units on this machine, one run after another, so that timings don't disturb each other."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lbi.children import Stop
from lbi.schedule import Unit
from lbi.store import Store
from lbi.worker import Report, run_unit


class LocalExecutor:
    """One slot: this process is the worker."""

    pack = False

    def forecast(self, units: Sequence[Unit], store: Store) -> str:
        """Nothing beyond the estimate of the runs themselves."""
        return ""

    def execute(self, units: Sequence[Unit], store: Store, report: Report, since: float) -> Stop:
        """Run all units. Ctrl-C stops after ending the current run cleanly, a second one at once.

        Returns whether, and how hard, it was asked to stop.
        """
        stop = Stop()
        with stopping_on_signals(stop):
            for unit in units:
                run_unit(unit.tasks, store, report, stop, since)
        return stop


@contextmanager
def stopping_on_signals(stop: Stop) -> Iterator[None]:
    """While open, SIGINT and SIGTERM ask `stop` instead of raising in the middle of something."""
    last = 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal last
        # A terminal may deliver one key press twice.
        if time.monotonic() - last > 0.3:
            stop.request()
        last = time.monotonic()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
