"""Executes a unit: one child process per run, one after another.

    python -m lbi.worker UNIT.json

The worker never touches the device. It starts a child, watches it, judges how it
ended, and publishes the result; so a child that is killed, hangs or leaks takes
nothing with it. What a child did not live to say is read from how it died.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi import environment, reference
from lbi.children import Child, Ended, Starter, Stop, phase_of
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.files import BadFile, read_json, write_json
from lbi.places import compile_cache
from lbi.store import SCHEMA, UNFINISHED, AlreadyRunning, Attempt, Result, Store
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
    """A change worth showing: `kind` is reference, start, phase, wait or end; note is about no task in particular."""

    kind: str
    task: Task
    text: str = ""
    result: Result | None = None


Report = Callable[[Event], None]


def run_unit(
    tasks: Sequence[Task],
    store: Store,
    report: Report,
    stop: Stop,
    since: float,
    description: dict[str, Any] | None = None,
) -> None:
    """Measure the tasks in turn until done or stopped.

    A run that another live process is measuring is left to it and awaited at the end, so that
    no run is measured twice; results published after `since` (seconds since the epoch, when
    the plan was made) count as done. `description` is `environment.describe()`, if it is known.
    """
    with Starter() as starter:
        bench = _Bench(store, report, stop, since, starter, description or environment.describe())
        waiting = list(tasks)
        while waiting and not stop.wanted:
            busy = []
            for task in waiting:
                if stop.wanted:
                    return
                try:
                    bench.run(task)
                except AlreadyRunning as running:
                    report(Event("wait", task, running.owner))
                    busy.append(task)
            if len(busy) == len(waiting):
                time.sleep(1.0)
            waiting = busy


class _Bench:
    """What the runs of one unit have in common."""

    def __init__(
        self,
        store: Store,
        report: Report,
        stop: Stop,
        since: float,
        starter: Starter,
        description: dict[str, Any],
    ) -> None:
        self.store, self.report, self.stop = store, report, stop
        self.since, self.starter, self.description = since, starter, description
        self.failed_references: dict[str, str] = {}

    def run(self, task: Task) -> None:
        """Claim, measure and publish one run. Raises `AlreadyRunning` if another process has it."""
        references = reference.folders(self.store.root, task.config, task.env_id)
        request = {
            "config": plain(task.config),
            "env_id": task.env_id,
            "devices": str(self.store.root / "devices"),
            "device_name": _device_name(task.config, self.description),
            "references": {name: str(folder) for name, folder in references.items()},
        }
        attempt = self.store.claim(task.run_id, task.env_id, request)
        published = self.store.result(task.run_id, task.env_id)
        if published is not None and published.finished > self.since and published.status not in UNFINISHED:
            self.store.release(attempt)
            self.report(Event("end", task, "measured by another process", published))
            return
        if self.stop.of(task.run_id).wanted:
            self.store.publish(attempt, *self.stop.of(task.run_id).why(), 0.0)
            self.report(Event("end", task, "", self.store.result(task.run_id, task.env_id)))
            return
        started = time.perf_counter()
        write_json(attempt.folder / "env.json", {"schema": SCHEMA, **self.description})
        request["reference_problem"] = self._reference_problem(task, references, attempt)
        write_json(attempt.folder / "config.json", {"schema": SCHEMA, **request})
        self.report(Event("start", task))
        ended = self._child("lbi.run", attempt.folder, task, attempt)
        status, reason = _verdict(attempt, ended, task.config, self.stop.of(task.run_id))
        self.store.publish(attempt, status, reason, time.perf_counter() - started)
        self.report(Event("end", task, "", self.store.result(task.run_id, task.env_id)))

    def _child(self, module: str, folder: Path, task: Task, attempt: Attempt) -> Ended:
        started = self.starter.start(
            module, folder, attempt.folder / "log.txt", task.config, compile_cache(task.env_id)
        )
        child = Child(started.process, attempt.folder, task.config.resources, self.stop.of(task.run_id))
        process = {"schema": SCHEMA, "pid": started.process.pid, "started": started.how}
        write_json(folder / "process.json", process)
        ended = child.wait(lambda phase: self.report(Event("phase", task, phase)))
        write_json(folder / "process.json", {**process, "ended": ended.describe()})
        return ended

    def _reference_problem(self, task: Task, references: dict[str, Path], attempt: Attempt) -> str | None:
        """Have the unquantized model's outputs computed if they are missing; why not, if that failed."""
        wanted = [references["greedy"]] + ([references["logits"]] if task.config.quality.enabled else [])
        if all(folder.exists() for folder in wanted) or self.stop.wanted:
            return None
        key = str(wanted)
        if key in self.failed_references:
            # Not tried again for every cell of the unit: it would fail again, and cost the same again.
            return self.failed_references[key]
        self.report(Event("reference", task))
        folder = attempt.folder / "reference"
        folder.mkdir()
        request = {name: str(path) for name, path in references.items()}
        write_json(folder / "request.json", {"schema": SCHEMA, "config": plain(task.config), **request})
        ended = self._child("lbi.reference", folder, task, attempt)
        if all(path.exists() for path in wanted):
            return None
        last = _last_line(attempt.folder / "log.txt")
        self.failed_references[key] = f"the unquantized model could not be run: {ended.describe()} ({last})"
        return self.failed_references[key]


def _device_name(config: LbiConfig, description: dict[str, Any]) -> str:
    if config.engine.device == "cuda" and description["gpus"]:
        return str(description["gpus"][0]["name"])
    return str(description["cpu"])


def _verdict(attempt: Attempt, ended: Ended, config: LbiConfig, stop: Stop) -> tuple[str, str]:
    """Status and reason: the child's own word if it lived to give it, else what its death says."""
    try:
        said = read_json(attempt.folder / "verdict.json", SCHEMA)
    except BadFile:
        said = None
    if said is not None:
        return said["status"], said["reason"]
    if ended.stopped:
        return stop.why()
    if ended.timed_out:
        return "timeout", f"took more than resources.run_timeout_s={config.resources.run_timeout_s:g} s"
    phase = phase_of(attempt.folder) or "start"
    if ended.returncode == -signal.SIGKILL and ended.oom_killed:
        return "oom", f"killed by the kernel for lack of memory, in phase {phase}"
    return "crash", f"{ended.describe()} in phase {phase}; see {attempt.folder / 'log.txt'}"


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    return lines[-1].strip() if lines else "empty log"


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A unit as a job finds it: its tasks, the store, when it was planned, and what it was planned for."""

    tasks: list[Task]
    store: Path
    since: float
    sweep: str
    packages: dict[str, str]
    git: dict[str, Any] | None


def load_unit(file: Path) -> UnitFile:
    """Read a unit file. Raises `InputError` for a file that is none."""
    from lbi.typed import build

    try:
        unit = read_json(file, SCHEMA)
    except BadFile as bad:
        raise InputError("unit", str(file), bad.reason) from bad
    if unit is None:
        raise InputError("unit", str(file), "there is no such file")
    tasks = [
        Task(row["cell"], row["name"], row["run_id"], row["env_id"], build(LbiConfig, row["config"]))
        for row in unit["tasks"]
    ]
    return UnitFile(tasks, Path(unit["store"]), float(unit["since"]), unit["sweep"], unit["packages"], unit["git"])


def log_line(event: Event) -> None:
    """A line of output per change."""
    ending = f"{event.result.status} {event.result.reason}" if event.result else event.text
    print(f"cell {event.task.cell} {event.task.name}: {event.kind} {ending}".rstrip(), flush=True)


def main(arguments: Sequence[str]) -> int:
    """Execute the unit in a file, a line of output per change."""
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
