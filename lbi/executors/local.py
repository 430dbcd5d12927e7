"""Runs units on this machine: a run at a time on each GPU, or on each share of the cores."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from lbi.children import Stop
from lbi.schedule import Unit
from lbi.slots import slots_for
from lbi.store import Store
from lbi.task_queue import TaskQueue
from lbi.worker import Report, Task, Work, run_slot


class LocalExecutor:
    """This process is the worker, with a thread for each slot."""

    pack = False
    here = True

    def __init__(self, sweep: str = "") -> None:
        self.sweep = sweep

    def forecast(self, units: Sequence[Unit], store: Store) -> str:
        """Nothing beyond the estimate of the runs themselves."""
        return ""

    def execute(self, units: Sequence[Unit], store: Store, report: Report, since: float) -> Stop:
        """Run all units. Ctrl-C stops after ending the current runs cleanly, a second one at once.

        `report` is called from several threads. Returns whether, and how hard, it was asked to stop.
        """
        stop = Stop()
        with stopping_on_signals(stop):
            for tasks in batches(units):
                if not stop.wanted:
                    run_batch(tasks, Work(TaskQueue(tasks), store, report, stop, since, sweep=self.sweep))
        return stop


def batches(units: Sequence[Unit]) -> list[list[Task]]:
    """The units' tasks in order, apart where they need other slots.

    One batch after another: a run on the CPU beside runs on GPUs would not have the machine its
    env_id names.
    """
    found: dict[tuple[object, ...], list[Task]] = {}
    for task in (task for unit in units for task in unit.tasks):
        device, resources = task.config.engine.device, task.config.resources
        kind = (device, resources.slots) if device == "cpu" else (device, resources.gpus, resources.foreign)
        found.setdefault(kind, []).append(task)
    return list(found.values())


def run_batch(tasks: Sequence[Task], work: Work) -> None:
    """Have each slot take tasks from the queue until it is empty, or stopped.

    An exception in one slot comes out when the others have done the rest.
    """
    slots = slots_for(tasks[0].config)[: len(tasks)]
    with ThreadPoolExecutor(len(slots), "slot") as threads:
        running = [threads.submit(run_slot, work, slot) for slot in slots]
    errors = [error for error in (slot.exception() for slot in running) if error is not None]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"In another slot: {type(other).__name__}: {other}")
        raise errors[0]


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
