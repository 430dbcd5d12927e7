"""A driver without torch or GPUs: units whose children are stand-ins, run by the real executor."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbi import children
from lbi.children import Started, Stop
from lbi.config import LbiConfig
from lbi.executors.local import LocalExecutor
from lbi.plan import Plan
from lbi.process import child_environment
from lbi.schedule import Unit, make_units
from lbi.store import Store
from lbi.worker import Event, Task

CHILD = Path(__file__).parent / "child.py"

UUIDS = [f"GPU-{number}0000000-1" for number in range(4)]
CARDS = [
    {"name": "Fake H200", "uuid": uuid, "driver": "1", "memory_bytes": 1, "compute_capability": "9.0"} for uuid in UUIDS
]


def make_driver_units(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Unit]]:
    """A maker of units whose children follow the given scripts, in order of the grid."""
    scripts: dict[str, str] = {}

    def start(self: Any, module: str, folder: Path, log: Path, config: LbiConfig, caches: Path) -> Started:
        script = scripts["reference"] if module == "lbi.reference" else scripts[config.workload.name]
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", str(CHILD), str(folder), script],
                stdout=output,
                stderr=output,
                env=child_environment(config, caches, self.slot.variables()),
                start_new_session=True,
            )
        return Started(process, "a stand-in")

    monkeypatch.setattr(children.Starter, "start", start)

    def made(*arguments: str, script: str | list[str] = "place", count: int = 8, reference: str = "none") -> list[Unit]:
        lengths = ",".join(str(8 + number) for number in range(count))
        found = make_units(
            plan("engine.device=cuda", f"workload.new_tokens={lengths}", "quality=off", *arguments).cells
        )
        per_cell = [script] * 99 if isinstance(script, str) else script
        named = []
        for unit in found:
            tasks = []
            for task in unit.tasks:
                name = f"cell{task.cell}"
                scripts[name] = per_cell[task.cell]
                workload = replace(task.config.workload, name=name)
                tasks.append(replace(task, config=replace(task.config, workload=workload)))
            named.append(Unit(unit.name, tuple(tasks)))
        scripts["reference"] = reference
        return named

    return made


def tasks_of(units: list[Unit]) -> list[Task]:
    return [task for unit in units for task in unit.tasks]


def execute(
    units: list[Unit], store: Store, on_event: Callable[[list[Event]], object] = lambda events: None
) -> tuple[list[Event], Stop]:
    events: list[Event] = []
    # Slots report from their own threads: whoever looks is to see its own event last.
    one_at_a_time = threading.Lock()

    def report(event: Event) -> None:
        with one_at_a_time:
            events.append(event)
            on_event(events)

    return events, LocalExecutor().execute(units, store, report, time.time())


def interrupts(kind: str, count: int, *delays: float) -> Callable[[list[Event]], None]:
    """Ctrl-C at the given event of a kind, after each of the delays. A child is up at its phase's event."""

    def look(events: list[Event]) -> None:
        if events[-1].kind == kind and [event.kind for event in events].count(kind) == count:
            for delay in delays:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

    return look


def places(units: list[Unit], store: Store) -> list[dict[str, Any]]:
    """What each task's child saw, in the tasks' order."""
    found = []
    for task in tasks_of(units):
        result = store.result(task.run_id, task.env_id)
        assert result is not None
        assert result.ok, result
        place, env, config = (
            json.loads((result.folder / name).read_text()) for name in ("place.json", "env.json", "config.json")
        )
        found.append({**place, "env": env, **{name: config[name] for name in ("slot", "reference_problem")}})
    return found


def assert_one_at_a_time(seen: list[dict[str, Any]]) -> None:
    on_gpu = defaultdict(list)
    for place in seen:
        on_gpu[place["CUDA_VISIBLE_DEVICES"]].append((place["began"], place["ended"]))
    for stretches in on_gpu.values():
        stretches.sort()
        for (_, ended), (began, _) in itertools.pairwise(stretches):
            assert ended <= began


def at_once(seen: list[dict[str, Any]]) -> int:
    """How many children ran at the same time, at most."""
    return max(sum(one["began"] <= other["began"] < one["ended"] for one in seen) for other in seen)


def statuses(units: list[Unit], store: Store) -> list[str | None]:
    results = [store.result(task.run_id, task.env_id) for task in tasks_of(units)]
    return [result.status if result else None for result in results]
