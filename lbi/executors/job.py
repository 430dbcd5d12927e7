"""What a job does wherever jobs are counted: finds its unit by its number, runs it, and sends the results home.

    python -m lbi.executors.job [--index N] [--units FOLDER | --parcel FILE]

The number is --index, else SLURM's, SkyPilot's or Kubernetes' count of this job, else 0. The
units are in $LBI_UNITS or in a file, as a parcel, on machines that share no folder with the sweep; or
in the folder of unit files that a submission made. Exit codes: 0 every run has a result that
is on its way home, 1 some have not, 2 this job cannot do what it was asked to.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbi import environment, homing, sites, snapshot
from lbi.children import Stop
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.executors.local import batches, run_batch
from lbi.files import write_json_lines
from lbi.homing import ByLog, ByWandb, Home
from lbi.identity import digest
from lbi.model_files import inspect
from lbi.parcel import Damaged, unpack
from lbi.schedule import Unit
from lbi.slots import Slot
from lbi.store import SCHEMA, AlreadyRunning, Store, job_name, node_name
from lbi.sweep_folder import note_environment, read_plan
from lbi.task_queue import TaskQueue
from lbi.typed import build
from lbi.unit_file import UnitFile
from lbi.worker import Event, Task, Work, log_line, run_slot

COUNTED_BY = ("SLURM_ARRAY_TASK_ID", "SKYPILOT_JOB_RANK", "JOB_COMPLETION_INDEX")
"""Variables in which SLURM, SkyPilot and Kubernetes tell a job its number."""

TERM_GRACE_S = 1.0
"""After SIGTERM a machine that is taken away may live for a few seconds: a child gets this long."""


@dataclass(frozen=True, slots=True)
class Parcelled:
    """A unit that came in a parcel, with all that a machine without the sweep's folder needs to know.

    `cells` are the plan's rows of its tasks; `weights` are fingerprints by run_id, where the plan knew them.
    """

    unit: UnitFile
    name: str
    code: str
    weights: Mapping[str, str]
    cells: Sequence[Mapping[str, Any]]
    home: str
    limit_kb: float


class TermStop(Stop):
    """Asked by SIGTERM: the machine is taken away, or the job was cancelled."""

    def on_term(self, number: int, frame: object) -> None:
        self.request()
        timer = threading.Timer(TERM_GRACE_S, self.request)
        timer.daemon = True
        timer.start()

    def why(self) -> tuple[str, str]:
        return "preempted", f"job {job_name() or ''} was told to end on {node_name()}"


def index(given: int | None) -> int:
    """This job's number among its likes. Raises `InputError` for a variable that holds none."""
    if given is not None:
        return given
    for name in COUNTED_BY:
        value = os.environ.get(name)
        if value:
            if not value.isdigit():
                raise InputError(name, value, "is not a job's number", "Give --index N")
            return int(value)
    return 0


def parcelled(text: str, number: int) -> Parcelled:
    """The unit of that number. Raises `InputError` where there is none, or the parcel is damaged."""
    try:
        content = unpack(text)
    except Damaged as damaged:
        raise InputError("LBI_UNITS", None, str(damaged), "Submit the sweep again") from damaged
    if content.get("schema") != SCHEMA:
        raise InputError("LBI_UNITS", None, f"has schema {content.get('schema')!r}, this lbi reads {SCHEMA}")
    units = content["units"]
    if not 0 <= number < len(units):
        raise InputError("index", number, f"there are {len(units)} units", f"0 to {len(units) - 1}")
    chosen = units[number]
    tasks = [
        Task(row["cell"], row["name"], row["run_id"], row["env_id"], build(LbiConfig, row["config"]))
        for row in chosen["tasks"]
    ]
    root = Path(os.environ.get("LBI_STORE") or Path.home() / "lbi_store")
    # Times are this machine's own: the clock of whoever planned may be another one.
    unit = UnitFile(tasks, root, time.time(), content["sweep"], {}, content["git"])
    return Parcelled(
        unit,
        chosen["name"],
        content["code"],
        content["weights"],
        chosen["cells"],
        content["home"],
        float(content["limit_kb"]),
    )


def execute(parcel: Parcelled) -> int:
    """Run the unit; its exit code. Results that an earlier start of this job left here are sent again."""
    unit = parcel.unit
    store = Store.open(unit.store, write=True)
    _plan(store, unit.sweep, parcel.cells)
    home = _home(parcel, store)
    refusal = refused(parcel)
    if refusal:
        homing.refuse(refusal)
        return 2
    if isinstance(home, ByWandb):
        _fetch(parcel, store)
    stop = TermStop()
    signal.signal(signal.SIGTERM, stop.on_term)
    started = f"job {job_name() or parcel.name} on {node_name()}"
    print(f"{started}: {len(unit.tasks)} runs, results come home by {parcel.home}", flush=True)
    tasks = placed(unit, store, again=False)
    _run(parcel, tasks, store, home, stop)
    keys = {device: environment.identify(device) for device in {task.config.engine.device for task in unit.tasks}}
    results = [store.result(task.run_id, keys[task.config.engine.device]) for task in unit.tasks]
    sent = [home.send(result) for result in results if result] if isinstance(home, ByWandb) else []
    return 0 if all(result is not None and result.status != "preempted" for result in results) and all(sent) else 1


def _run(parcel: Parcelled, tasks: list[Task], store: Store, home: Home, stop: Stop) -> None:
    known = {task.run_id for task in tasks}
    for task in parcel.unit.tasks:
        result = store.result(task.run_id, environment.identify(task.config.engine.device))
        if task.run_id not in known and result is not None:
            print(f"cell {task.cell} {task.name}: measured here before", flush=True)
            home.send(result)

    def report(event: Event) -> None:
        if event.kind == "start":
            homing.begun(event.task.run_id)
        log_line(event)
        if event.kind == "end" and event.result is not None:
            home.send(event.result)

    recorded = {"git": parcel.unit.git, "host": node_name()}
    for batch in batches([Unit(parcel.name, tuple(tasks))]):
        work = Work(
            TaskQueue(batch), store, report, stop, parcel.unit.since, recorded=recorded, sweep=parcel.unit.sweep
        )
        if stop.wanted:
            return
        if batch[0].config.engine.device == "cuda":
            run_batch(batch, work)
        else:
            # The whole machine, which is what the env_id says.
            run_slot(work, Slot())


def refused(parcel: Parcelled) -> str:
    """Why this machine's results would not be those that were planned; empty if they would."""
    here = snapshot.identity()
    if parcel.code != here:
        return (
            f"this machine has other code of lbi ({here}) than the sweep was planned with ({parcel.code}); "
            "plan it again with the code that is in the image, or have the machines set up anew"
        )
    checked: dict[str, str] = {}
    for task in parcel.unit.tasks:
        expected = parcel.weights.get(task.run_id)
        if expected is None:
            continue
        key = repr(task.config.model)
        if key not in checked:
            try:
                checked[key] = inspect(task.config.model).fingerprint or ""
            except InputError as error:
                return f"{task.name}: {error}"
        if checked[key] and checked[key] != expected:
            return f"{task.name}: the weights here ({checked[key]}) are not those of the plan ({expected})"
    return ""


def changed(unit: UnitFile) -> str:
    """How the packages differ from those that the sweep was planned for; empty if they do not."""
    if any(task.config.resources.container for task in unit.tasks):
        return ""
    here = environment.packages()
    names = sorted(set(here) | set(unit.packages))
    differing = [
        f"{name} {unit.packages.get(name, 'absent')} -> {here.get(name, 'absent')}"
        for name in names
        if here.get(name) != unit.packages.get(name)
    ]
    if not differing:
        return ""
    return f"the packages on {node_name()} are not those of the plan ({', '.join(differing)}); plan again"


def placed(unit: UnitFile, store: Store, again: bool = True) -> list[Task]:
    """The tasks with the env_id of this node, less those that have a good result here already.

    With `again` a task that the plan expected in this very environment is run although it has one.
    """
    found = []
    keys = {device: environment.key(device) for device in {task.config.engine.device for task in unit.tasks}}
    classes = {sites.class_key(task.config): task.config for task in unit.tasks}
    for config in classes.values():
        key = keys[config.engine.device]
        sites.note(store, config, key, digest("env", key), time.time())
    for task in unit.tasks:
        env_id = digest("env", keys[task.config.engine.device])
        if env_id != task.env_id or not again:
            note_environment(store, unit.sweep, env_id)
            known = store.result(task.run_id, env_id)
            if known is not None and known.ok and task.config.sweep.mode != "force":
                continue
        found.append(replace(task, env_id=env_id))
    return found


def publish_all(tasks: Sequence[Task], store: Store, status: str, reason: str) -> None:
    """End every task so, without running it."""
    for task in tasks:
        try:
            attempt = store.claim(task.run_id, task.env_id, {})
        except AlreadyRunning:
            continue
        store.publish(attempt, status, reason, 0.0)
        log_line(Event("end", task, "", store.result(task.run_id, task.env_id)))


def _home(parcel: Parcelled, store: Store) -> Home:
    if parcel.home == "wandb":
        return ByWandb(store, parcel.unit.sweep, parcel.unit.tasks[0].config.tracker)
    return ByLog(parcel.limit_kb)


def _fetch(parcel: Parcelled, store: Store) -> None:
    """Have what earlier starts of this job, on other machines, have sent to W&B."""
    from lbi.trackers.wandb_collect import collect_runs

    names = [
        homing.name_of(task.run_id, environment.identify(task.config.engine.device))
        for task in parcel.unit.tasks
        if task.config.sweep.mode != "force"
    ]
    try:
        print(collect_runs(store, parcel.unit.sweep, parcel.unit.tasks[0].config.tracker, names), flush=True)
    except InputError as error:
        print(f"What W&B has already cannot be had, so it may be measured again: {error}", flush=True)


def _plan(store: Store, sweep: str, cells: Sequence[Mapping[str, Any]]) -> None:
    """The part of the sweep's plan that this machine has had to do with, for W&B's runs are made from a plan."""
    file = store.sweep_folder(sweep) / "plan.jsonl"
    known = {row["index"]: row for row in (read_plan(store, sweep) if file.exists() else [])}
    known |= {cell["index"]: dict(cell) for cell in cells}
    header = {"schema": SCHEMA, "sweep": sweep, "command": "part of a sweep", "planned": time.time()}
    write_json_lines(file, [header, *(known[number] for number in sorted(known))])


def main(arguments: Sequence[str]) -> int:
    """Find this job's unit and run it."""
    parser = argparse.ArgumentParser(prog="python -m lbi.executors.job")
    parser.add_argument("--index", type=int, help="this job's number; left out: as SLURM, SkyPilot or Kubernetes count")
    parser.add_argument("--units", help="folder of unit files; left out: $LBI_UNITS")
    parser.add_argument("--parcel", help="file with the parcel that $LBI_UNITS would hold")
    given = parser.parse_args(list(arguments))
    try:
        number = index(given.index)
        if given.units:
            from lbi.executors import slurm_job

            return slurm_job.run_file(Path(given.units) / f"unit-{number}.json")
        # Not for the processes that measure, whose variables it would fill.
        text = os.environ.pop("LBI_UNITS", "")
        if given.parcel:
            try:
                text = Path(given.parcel).read_text().strip()
            except OSError as error:
                raise InputError("--parcel", given.parcel, error.strerror or "cannot be read") from error
        if not text:
            raise InputError("LBI_UNITS", None, "is not set", "Give --units FOLDER, or submit with lbi_cloud")
        return execute(parcelled(text, number))
    except InputError as error:
        print(f"lbi.executors.job: {error}", file=sys.stderr, flush=True)
        homing.refuse(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
