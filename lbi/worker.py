"""Executes a unit: one child process per run, one after another.

    python -m lbi.worker UNIT.json

The worker never touches the device. It starts a child, watches it, judges how it
ended, and publishes the result; so a child that is killed, hangs or leaks takes
nothing with it. What a child did not live to say is read from how it died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi import environment, reference
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.files import BadFile, read_json, write_json
from lbi.places import compile_cache
from lbi.process import child_environment
from lbi.store import HEARTBEAT_S, SCHEMA, AlreadyRunning, Attempt, Result, Store
from lbi.typed import plain

POLL_S = 0.1


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
    """A change worth showing: `kind` is reference, start, phase, wait or end."""

    kind: str
    task: Task
    text: str = ""
    result: Result | None = None


class Stop:
    """Asks a worker to stop: politely once, at once the second time."""

    def __init__(self) -> None:
        self.requests = 0

    def request(self) -> None:
        self.requests += 1

    @property
    def wanted(self) -> bool:
        return self.requests > 0

    @property
    def now(self) -> bool:
        return self.requests > 1


Report = Callable[[Event], None]


def run_unit(tasks: Sequence[Task], store: Store, report: Report, stop: Stop, since: float) -> None:
    """Measure the tasks in turn until done or stopped.

    A run that another live process is measuring is left to it and awaited at the end, so that
    no run is measured twice; results published after `since` (seconds since the epoch, when
    the plan was made) count as done.
    """
    waiting = list(tasks)
    description = environment.describe()
    failed_references: dict[str, str] = {}
    while waiting and not stop.wanted:
        later = []
        for task in waiting:
            if stop.wanted:
                return
            try:
                _run_task(task, store, report, stop, since, description, failed_references)
            except AlreadyRunning as busy:
                report(Event("wait", task, busy.owner))
                later.append(task)
        if later and len(later) == len(waiting):
            time.sleep(1.0)
        waiting = later


def _run_task(
    task: Task,
    store: Store,
    report: Report,
    stop: Stop,
    since: float,
    description: dict[str, Any],
    failed_references: dict[str, str],
) -> None:
    references = reference.folders(store.root, task.config, task.env_id)
    request = {
        "config": plain(task.config),
        "env_id": task.env_id,
        "devices": str(store.root / "devices"),
        "device_name": _device_name(task.config, description),
        "references": {name: str(folder) for name, folder in references.items()},
    }
    attempt = store.claim(task.run_id, task.env_id, request)
    published = store.result(task.run_id, task.env_id)
    if published is not None and published.finished > since:
        store.release(attempt)
        report(Event("end", task, "measured by another process", published))
        return
    started = time.perf_counter()
    write_json(attempt.folder / "env.json", {"schema": SCHEMA, **description})
    key = str(references)
    problem = failed_references.get(key) or _ensure_reference(task, references, attempt, report, stop)
    if problem:
        # Not tried again for every cell of the unit: it would fail again, and cost the same again.
        failed_references[key] = problem
    request["reference_problem"] = problem
    write_json(attempt.folder / "config.json", {"schema": SCHEMA, **request})
    report(Event("start", task))
    ended = _Child(["lbi.run", str(attempt.folder)], task, attempt, stop).wait(
        lambda phase: report(Event("phase", task, phase))
    )
    status, reason = _verdict(attempt, ended, task.config)
    store.publish(attempt, status, reason, time.perf_counter() - started)
    report(Event("end", task, "", store.result(task.run_id, task.env_id)))


def _device_name(config: LbiConfig, description: dict[str, Any]) -> str:
    if config.engine.device == "cuda" and description["gpus"]:
        return str(description["gpus"][0]["name"])
    return str(description["cpu"])


def _ensure_reference(
    task: Task, references: dict[str, Path], attempt: Attempt, report: Report, stop: Stop
) -> str | None:
    """Have the unquantized model's outputs computed if they are missing; why not, if that failed."""
    wanted = [references["greedy"]] + ([references["logits"]] if task.config.quality.enabled else [])
    if all(folder.exists() for folder in wanted) or stop.wanted:
        return None
    report(Event("reference", task, "reference"))
    folder = attempt.folder / "reference"
    folder.mkdir()
    request = {name: str(path) for name, path in references.items()}
    write_json(folder / "request.json", {"schema": SCHEMA, "config": plain(task.config), **request})
    ended = _Child(["lbi.reference", str(folder)], task, attempt, stop).wait(lambda phase: None)
    if all(path.exists() for path in wanted):
        return None
    return f"the unquantized model could not be run: {ended.describe()} ({_last_line(attempt.folder / 'log.txt')})"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. `returncode` is negative for a signal, as in subprocess."""

    returncode: int
    timed_out: bool
    stopped: bool
    oom_killed: bool

    def describe(self) -> str:
        if self.timed_out:
            return "took too long"
        if self.returncode < 0:
            return f"killed by {_signal_name(-self.returncode)}"
        return f"exit code {self.returncode}"


class _Child:
    """One child process in a session of its own, its output in the attempt's log."""

    def __init__(self, module: list[str], task: Task, attempt: Attempt, stop: Stop) -> None:
        self.task, self.attempt, self.stop = task, attempt, stop
        self.ooms = _oom_kills()
        environment_variables = child_environment(task.config, compile_cache(task.env_id))
        with (attempt.folder / "log.txt").open("a") as log:
            # Its own session: Ctrl-C reaches the worker alone, which then decides.
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_variables,
                start_new_session=True,
            )

    def wait(self, on_phase: Callable[[str], None]) -> Ended:
        """Watch until it ends, is stopped, or runs out of time."""
        resources = self.task.config.resources
        deadline = time.monotonic() + resources.run_timeout_s
        kill_at, beat_at, phase = float("inf"), 0.0, ""
        timed_out = stopped = False
        try:
            while self.process.poll() is None:
                now = time.monotonic()
                if now >= beat_at:
                    (self.attempt.folder / "heartbeat").touch()
                    beat_at = now + HEARTBEAT_S
                if kill_at == float("inf") and (self.stop.wanted or now >= deadline):
                    stopped, timed_out = self.stop.wanted, not self.stop.wanted
                    self._signal(signal.SIGTERM)
                    kill_at = now + resources.stop_grace_s
                if now >= kill_at or self.stop.now:
                    self._signal(signal.SIGKILL)
                current = _phase(self.attempt.folder)
                if current != phase:
                    phase = current
                    on_phase(phase)
                time.sleep(POLL_S)
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
        return Ended(self.process.returncode, timed_out, stopped, _oom_kills() > self.ooms)

    def _signal(self, number: int) -> None:
        """To the whole session: a compiler's helpers must not outlive the run."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def _verdict(attempt: Attempt, ended: Ended, config: LbiConfig) -> tuple[str, str]:
    """Status and reason: the child's own word if it lived to give it, else what its death says."""
    try:
        said = read_json(attempt.folder / "verdict.json", SCHEMA)
    except BadFile:
        said = None
    if said is not None:
        return said["status"], said["reason"]
    if ended.stopped:
        return "cancelled", "stopped on request"
    if ended.timed_out:
        return "timeout", f"took more than resources.run_timeout_s={config.resources.run_timeout_s:g} s"
    phase = _phase(attempt.folder) or "start"
    if ended.returncode == -signal.SIGKILL and ended.oom_killed:
        return "oom", f"killed by the kernel for lack of memory, in phase {phase}"
    return "crash", f"{ended.describe()} in phase {phase}; see {attempt.folder / 'log.txt'}"


def _phase(folder: Path) -> str:
    try:
        return str((read_json(folder / "progress.json") or {}).get("phase", ""))
    except BadFile:
        return ""


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    return lines[-1].strip() if lines else "empty log"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_kills() -> int:
    """Processes the kernel has killed for memory so far, on the whole machine or in the control group."""
    total = 0
    for name, key in (("/proc/vmstat", "oom_kill "), ("/sys/fs/cgroup/memory.events", "oom_kill ")):
        try:
            lines = Path(name).read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(key))
    return total


def load_unit(file: Path) -> tuple[list[Task], Path, float]:
    """Tasks, store folder and plan time from a unit file. Raises `InputError` for a file that is none."""
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
    return tasks, Path(unit["store"]), float(unit["since"])


def main(arguments: Sequence[str]) -> int:
    """Execute the unit in a file, a line of output per change."""
    try:
        tasks, root, since = load_unit(Path(arguments[0]))
        store = Store.open(root, write=True)
    except InputError as error:
        print(f"lbi.worker: {error}", file=sys.stderr)
        return 2
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    signal.signal(signal.SIGINT, lambda *_: stop.request())

    def report(event: Event) -> None:
        ending = f"{event.result.status} {event.result.reason}" if event.result else event.text
        print(f"cell {event.task.cell} {event.task.name}: {event.kind} {ending}".rstrip(), flush=True)

    run_unit(tasks, store, report, stop, since)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
