"""Executes a unit: one child process per run, one after another; or one for runs of one model, see sharing.py.

    python -m lbi.worker UNIT.json

The worker never touches the device. It starts a child, watches it, judges how it
ended, and publishes the result; so a child that is killed, hangs or leaks takes
nothing with it. What a child did not live to say is read from how it died.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lbi import reference, tracing
from lbi.account import Account
from lbi.ahead import Ahead
from lbi.children import LIVES_ON, NOTHING, POLL_S, Child, Ended, Started, Starter, Stop, phase_of
from lbi.claims import claimed
from lbi.config import LbiConfig
from lbi.endings import goes_on, last_line, spoilt_by, verdict
from lbi.errors import InputError
from lbi.files import write_json
from lbi.places import compile_cache
from lbi.race import rivals
from lbi.share_key import PROCESS
from lbi.sharing import OWN_WORD, Isolation, Sharing
from lbi.slots import Slot, device_name
from lbi.store import SCHEMA, UNFINISHED, AlreadyRunning, Attempt, Result, Store, node_name
from lbi.task_queue import TaskQueue
from lbi.turns import Turns
from lbi.typed import plain


@dataclass(frozen=True, slots=True)
class Task:
    """One run that is to be measured: the cell's number in its plan, its identity and its config."""

    cell: int
    name: str
    run_id: str
    env_id: str
    config: LbiConfig


@dataclass(frozen=True, slots=True)
class Event:
    """A change worth showing in slot number `slot`: `kind` is reference, start, phase, wait or end.

    A note is about no task in particular.
    """

    kind: str
    task: Task
    text: str = ""
    result: Result | None = None
    slot: int = 0


Report = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What the slots of one driver have in common: tasks of `sweep`, where its name is known.

    Results published after `since` (seconds since the epoch, when the plan was made) count as done.
    `recorded` goes into env.json in place of what the slot itself would say.
    """

    queue: TaskQueue
    store: Store
    report: Report
    stop: Stop
    since: float
    turns: Turns = field(default_factory=Turns)
    recorded: Mapping[str, Any] = field(default_factory=dict)
    sweep: str = ""


def run_unit(
    tasks: Sequence[Task], store: Store, report: Report, stop: Stop, since: float, slot: Slot | None = None
) -> None:
    """Measure the tasks in turn until done or stopped, see `Work`."""
    run_slot(Work(TaskQueue(tasks), store, report, stop, since), slot or Slot())


def run_slot(work: Work, slot: Slot) -> None:
    """Measure tasks of the queue in one slot until none is left, or stopped.

    A run that another live process is measuring is left to it and awaited at the end, so that
    no run is measured twice.
    """
    with slot.occupied(), Starter(slot) as starter:
        bench = _Bench(work, slot, starter)
        while not work.stop.wanted and work.queue.next() is not None:
            if not bench.run_next():
                time.sleep(POLL_S)


class _Bench:
    """What the runs of one slot have in common."""

    def __init__(self, work: Work, slot: Slot, starter: Starter) -> None:
        self.work, self.slot, self.starter = work, slot, starter
        self.store, self.stop = work.store, work.stop
        self.description = {**slot.describe(), **work.recorded}
        self.owners: dict[str, str] = {}
        self.account = Account()
        self.sharing = Sharing(work.store.root)
        self.ahead = Ahead(slot, starter, work.store.root, self._request_to_compile)

    def run_next(self) -> bool:
        """Wait for the slot's GPU, then measure the next task; False where there was none to measure yet.

        The GPU comes first: a task that was taken and waits could have been measured in another slot,
        and a run that is claimed and waits would pass for lost on other machines.
        """
        upcoming = self.work.queue.next()
        if upcoming is None:
            return False
        with self.slot.held(
            upcoming.config.resources.foreign,
            give_up=lambda: self.stop.wanted or self.work.queue.next() is None,
            on_wait=lambda reason: self.report("wait", upcoming, reason),
        ) as ready:
            task = self.work.queue.take() if ready else None
            if task is None:
                return False
            try:
                # While the GPU is held: a process that runs share must not be on it when another driver comes.
                while task is not None:
                    self._compile_ahead(task)
                    self._run_or_leave(task)
                    again = self.sharing.lives and not self.stop.wanted
                    task = self.work.queue.take_like(self.sharing.takes) if again else None
            finally:
                self.sharing.end()
        return True

    def _compile_ahead(self, task: Task) -> None:
        """Compile the task's graph side by side with others, if no cache has them."""
        due = self.ahead.due(task, self.work.queue.waiting())
        if due and not self.stop.wanted:
            # Many models at once need the memory that an idle shared process has.
            self.sharing.end()
            self.report("wait", task, f"{len(due)} graphs are being compiled side by side")
            self.ahead.compile(due, self.stop)

    def _run_or_leave(self, task: Task) -> None:
        """Measure a run, or leave it for later if another process has it."""
        try:
            self.run(task)
        except AlreadyRunning as running:
            if self.owners.get(task.run_id) != running.owner:
                self.report("wait", task, f"{running.owner} is measuring it")
            self.owners[task.run_id] = running.owner
            self.work.queue.put_back(task)
        finally:
            self.work.queue.done(task)

    def report(self, kind: str, task: Task, text: str = "", result: Result | None = None) -> None:
        self.work.report(Event(kind, task, text, result, self.slot.number))

    def run(self, task: Task) -> None:
        """Claim, measure and publish one run. Raises `AlreadyRunning` if another process has it."""
        references = reference.folders(self.store.root, task.config, task.env_id)
        request = self._request(task, references)
        attempt = self.store.claim(task.run_id, task.env_id, request)
        published = self.store.result(task.run_id, task.env_id)
        if published is not None and published.finished > self.work.since and published.status not in UNFINISHED:
            self.store.release(attempt)
            self.report("end", task, "measured by another process", published)
            return
        if self.stop.of(task.run_id).wanted:
            self.store.publish(attempt, *self.stop.of(task.run_id).why(), 0.0)
            self.report("end", task, "", self.store.result(task.run_id, task.env_id))
            return
        started, self.account = time.perf_counter(), Account()
        started -= self.account.note_ahead(self.ahead.share(task))
        if not task.config.resources.shared_references:
            references |= {name: attempt.folder / "references" / name for name in ("logits", "greedy")}
            request["references"] = {name: str(folder) for name, folder in references.items()}
        write_json(attempt.folder / "env.json", {"schema": SCHEMA, **self.description})
        request["reference_problem"] = self._reference_problem(task, references, attempt)
        isolation = self.sharing.of(task)
        request["isolation"] = isolation.record()
        request["rivals"] = rivals(self.store, self.work.sweep, task.config, task.run_id, task.env_id)
        write_json(attempt.folder / "config.json", {"schema": SCHEMA, **request})
        self.report("start", task)
        ending = self._measure(task, attempt, isolation)
        self._trace(task, attempt, ending[0])
        # What this run alone was compared with; the logits of a text are hundreds of megabytes.
        shutil.rmtree(attempt.folder / "references", ignore_errors=True)
        self._publish(task, attempt, isolation, ending, time.perf_counter() - started)

    def _publish(
        self, task: Task, attempt: Attempt, isolation: Isolation, how: tuple[str, str], seconds: float
    ) -> None:
        """Publish how a run ended; one whose process did others before may have to be measured again, alone, first."""
        status, reason = how
        cost = self.account.cost(task, attempt.folder, seconds, f"{node_name()} {self.slot.number}")
        why = ""
        if isolation.after and status in OWN_WORD:
            why = f"{status} after other runs of its process ({reason}); measured again in one of its own"
        elif isolation.after and status == "crash" and not phase_of(attempt.folder):
            why = "the process that it was given to ended before it began; measured again in one of its own"
        if why:
            self.store.publish(attempt, "lost", why, seconds, cost)
            self.report("wait", task, why)
            self.run(task)
            return
        self.store.publish(attempt, status, reason, seconds, cost)
        self.report("end", task, "", self.store.result(task.run_id, task.env_id))

    def _request(self, task: Task, references: Mapping[str, Path]) -> dict[str, Any]:
        """What the process of a run reads in its config.json."""
        return {
            "config": plain(task.config),
            "run_id": task.run_id,
            "env_id": task.env_id,
            "devices": str(self.store.root / "devices"),
            "quantized": str(self.store.root / "quantized"),
            "compile_cache": str(compile_cache(task.env_id)),
            "kept_graphs": str(self.store.root / "compile_caches" / task.env_id),
            "device_name": device_name(task.config, self.description),
            "references": {name: str(folder) for name, folder in references.items()},
            "slot": self.slot.record(),
        }

    def _request_to_compile(self, task: Task) -> dict[str, Any]:
        """What a process reads that compiles the run's graph and measures nothing."""
        references = reference.folders(self.store.root, task.config, task.env_id)
        return {**self._request(task, references), "isolation": {}}

    def _measure(self, task: Task, attempt: Attempt, isolation: Isolation) -> tuple[str, str]:
        """Have a process of its own measure the run, or the one that it shares; status and reason."""
        stop, said = self.stop.of(task.run_id), {"isolation": isolation.record()}
        if isolation.how == PROCESS:
            return verdict(attempt, self._child("lbi.run", attempt.folder, task, attempt, said=said), task.config, stop)
        log, caches = attempt.folder / "log.txt", compile_cache(task.env_id)
        start = partial(self.starter.start, "lbi.shared_run", attempt.folder, log, task.config, caches)
        with self.account.timing("start"):
            started = self.sharing.give(attempt.folder) if isolation.after else self.sharing.begin(task, start)
        self.account.note_started(started)
        ended = self._watch(started, attempt.folder, task, attempt, said, done=lambda: goes_on(attempt.folder))
        status, reason = verdict(attempt, ended or LIVES_ON, task.config, stop)
        self.sharing.note(task, ended, status, spoilt_by(attempt.folder))
        return status, reason

    def _trace(self, task: Task, attempt: Attempt, status: str) -> None:
        """Have a second process take the traces that the run's own could not. They change nothing in the result."""
        traces = tracing.apart(task.config, status)
        if not traces or self.stop.of(task.run_id).wanted:
            return
        folder = attempt.folder / tracing.FOLDER
        folder.mkdir(exist_ok=True)
        write_json(folder / "request.json", {"schema": SCHEMA, "traces": list(traces)})
        own = tracing.variables(traces, attempt.folder)
        with self.account.timing("trace pass"):
            ended = self._child("lbi.trace_pass", folder, task, attempt, own)
        if ended.returncode or ended.timed_out:
            why = f"the pass that takes it did not finish, {ended.describe()}: {last_line(attempt.folder / 'log.txt')}"
            tracing.add(attempt.folder, {trace: {"missing": why} for trace in traces})

    def _child(
        self,
        module: str,
        folder: Path,
        task: Task,
        attempt: Attempt,
        own: Mapping[str, str] = NOTHING,
        heartbeats: Sequence[Path] = (),
        said: Mapping[str, Any] = NOTHING,
    ) -> Ended:
        """Start a process that runs `module` on `folder`, and watch it; `said` is for its process.json."""
        log, caches = attempt.folder / "log.txt", compile_cache(task.env_id)
        if own:
            # A pass of its own after the run: all of it is the trace's, and it says nothing of how the run began.
            started = self.starter.start(module, folder, log, task.config, caches, own)
        else:
            with self.account.timing("start"):
                started = self.starter.start(module, folder, log, task.config, caches)
            self.account.note_started(started)
        return self._watch(started, folder, task, attempt, said, heartbeats) or LIVES_ON

    def _watch(
        self,
        started: Started,
        folder: Path,
        task: Task,
        attempt: Attempt,
        said: Mapping[str, Any],
        heartbeats: Sequence[Path] = (),
        done: Callable[[], bool] = lambda: False,
    ) -> Ended | None:
        """Watch a process until it ends, or until `done` says so of one that lives on: None."""
        child = Child(started.process, attempt.folder, task.config.resources, self.stop.of(task.run_id), heartbeats)
        process = {"schema": SCHEMA, "pid": started.process.pid, "started": started.how, **said}
        write_json(folder / "process.json", process)
        ended = child.wait(lambda phase: self.report("phase", task, phase), done)
        how = ended.describe() if ended else "not yet: it may do another run"
        write_json(folder / "process.json", {**process, "ended": how})
        return ended

    def _reference_problem(self, task: Task, references: dict[str, Path], attempt: Attempt) -> str | None:
        """Have the unquantized model's outputs computed if they are missing; why not, if that failed."""
        if reference.base_model(task.config) is None:
            return reference.NO_BASE
        wanted = [references["greedy"]] + ([references["logits"]] if task.config.quality.enabled else [])
        missing = [folder for folder in wanted if not folder.exists()]
        if not missing:
            self.account.note_kept(wanted)
        if not missing or self.stop.wanted:
            return None
        turns, key, heartbeat = self.work.turns, str(wanted), attempt.folder / "heartbeat"

        def settled() -> bool:
            return self.stop.wanted or all(folder.exists() for folder in wanted)

        # The slots of this driver first, which share what failed; then other drivers, on whichever host.
        with turns.of([str(folder) for folder in missing], while_waiting=heartbeat.touch):
            if settled():
                return None
            # Not tried again for every cell of the unit: it would fail again, and cost the same again.
            if key not in turns.failed:
                with claimed(missing, settled, self._waiting_for_reference(task, heartbeat)) as heartbeats:
                    if heartbeats is None:
                        return None
                    problem = self._compute_reference(task, references, attempt, heartbeats)
                if all(folder.exists() for folder in wanted):
                    return None
                turns.failed[key] = problem
            return turns.failed[key]

    def _waiting_for_reference(self, task: Task, heartbeat: Path) -> Callable[[str], None]:
        """Says once who is making a reference that this run waits for, and keeps the run's own heart beating."""
        said: set[str] = set()

        def waiting(owner: str) -> None:
            heartbeat.touch()
            if owner not in said:
                self.report("wait", task, f"{owner} is running the unquantized model")
            said.add(owner)

        return waiting

    def _compute_reference(
        self, task: Task, references: dict[str, Path], attempt: Attempt, heartbeats: Sequence[Path]
    ) -> str:
        """Run the unquantized model; how that ended. `heartbeats` tell other drivers that it is being done."""
        # Two models may be more than the memory takes, and a process that is idle is not known to stay so.
        self.sharing.end()
        self.report("reference", task)
        folder = attempt.folder / "reference"
        folder.mkdir()
        request = {name: str(path) for name, path in references.items()}
        write_json(folder / "request.json", {"schema": SCHEMA, "config": plain(task.config), **request})
        began = time.perf_counter()
        ended = self._child("lbi.reference", folder, task, attempt, heartbeats=heartbeats)
        self.account.note_reference(time.perf_counter() - began, list(references.values()))
        last = last_line(attempt.folder / "log.txt")
        return f"the unquantized model could not be run: {ended.describe()} ({last})"


def log_line(event: Event) -> None:
    """A line of output per change."""
    ending = f"{event.result.status} {event.result.reason}" if event.result else event.text
    print(f"cell {event.task.cell} {event.task.name}: {event.kind} {ending}".rstrip(), flush=True)


def main(arguments: Sequence[str]) -> int:
    """Execute the unit in a file, a line of output per change."""
    from lbi.unit_file import load_unit

    try:
        unit = load_unit(Path(arguments[0]))
        store = Store.open(unit.store, write=True)
    except InputError as error:
        print(f"lbi.worker: {error}", file=sys.stderr)
        return 2
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    signal.signal(signal.SIGINT, lambda *_: stop.request())

    run_unit(unit.tasks, store, log_line, stop, unit.since)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
