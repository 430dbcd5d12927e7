"""Turns the cells that are to run into units, and says how long they should take.

A unit is what one job executes in turn: runs of one model with the same resources,
the baseline first, so that every later row can be compared while the sweep runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lbi import environment, tracing
from lbi.config import LbiConfig
from lbi.cost_model import CostModel
from lbi.files import write_json
from lbi.graph_key import graph_key, held_key
from lbi.share_key import together
from lbi.store import SCHEMA, Store
from lbi.typed import plain
from lbi.worker import Task

if TYPE_CHECKING:
    from lbi.plan import Cell


@dataclass(frozen=True, slots=True)
class Unit:
    """Tasks that one job executes in turn."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds for all runs of a plan; `guessed` of its `runs` have no history to go by."""

    seconds: float
    runs: int
    guessed: int


def make_units(cells: Sequence[Cell], pack: bool = False) -> list[Unit]:
    """Units of the cells that are to run, one for each model and resource class.

    With `pack` a unit has at most `resources.runs_per_job` runs, for jobs that work side by side.
    """
    tasks = _with_their_graphs(
        [
            Task(cell.index, cell.name, cell.run_id, cell.env_id, cell.config)
            for cell in sorted(cells, key=lambda cell: (_plainness(cell.config), cell.index))
            if cell.config is not None
        ]
    )
    groups = make_packs(tasks) if pack else _groups(tasks)
    return [Unit(f"unit-{index}", tuple(group)) for index, group in enumerate(groups)]


def make_packs(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks in the units of jobs: one model and resource class each, no more than `resources.runs_per_job`."""
    return [pack for group in _groups(tasks) for pack in _packs(group)]


def _groups(tasks: Sequence[Task]) -> list[list[Task]]:
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        key = repr((task.config.model, task.config.engine.device, task.config.resources))
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _with_their_graphs(tasks: Sequence[Task]) -> list[Task]:
    """The tasks in their order, but each directly after those before it that share its graph, or its loaded model.

    Among those of one loaded model, one after another are those of one graph, which their process may hold.
    """
    return [task for shared in _by(together, tasks) for graph in _by(graph_of, shared) for task in graph]


def graph_of(config: LbiConfig) -> str | None:
    """What a process may hold for runs that follow each other, else the graph that they find in a cache."""
    return held_key(config) or graph_key(config)


def _by(key: Callable[[LbiConfig], str | None], tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that have a key in common together; one that has none is alone."""
    groups: dict[str | int, list[Task]] = {}
    for number, task in enumerate(tasks):
        groups.setdefault(key(task.config) or number, []).append(task)
    return list(groups.values())


def _packs(tasks: list[Task]) -> list[list[Task]]:
    """As few packs as `resources.runs_per_job` allows, as even as can be, and cells of one graph in one of them.

    What compiles nothing is dealt out last and like cards, so that every pack begins with plain settings. A
    graph is torn only where the packs could not be even without.
    """
    count = math.ceil(len(tasks) / tasks[0].config.resources.runs_per_job)
    share = math.ceil(len(tasks) / count)
    packs: list[list[Task]] = [[] for _ in range(count)]
    for graph in sorted(_by(together, tasks), key=len, reverse=True):
        left = graph
        while left:
            emptiest = min(packs, key=len)
            room = share - len(emptiest)
            emptiest += left[:room]
            left = left[room:]
    order = {id(task): number for number, task in enumerate(tasks)}
    return [sorted(pack, key=lambda task: order[id(task)]) for pack in packs]


def save_units(units: Sequence[Unit], store: Store, sweep: str, since: float, folder: Path) -> None:
    """Write each unit where any worker can take it from: <folder>/<unit>.json."""
    shared = {
        "schema": SCHEMA,
        "store": str(store.root),
        "since": since,
        "sweep": sweep,
        "packages": environment.packages(),
        "git": environment.git_state(),
    }
    for unit in units:
        tasks = [
            {
                "cell": task.cell,
                "name": task.name,
                "run_id": task.run_id,
                "env_id": task.env_id,
                "config": plain(task.config),
            }
            for task in unit.tasks
        ]
        write_json(folder / f"{unit.name}.json", {**shared, "tasks": tasks})


class Durations:
    """How long runs should take, by what the store's runs took (`CostModel`)."""

    def __init__(self, store: Store) -> None:
        self._model = CostModel(store.costs())

    def of(self, tasks: Sequence[Task]) -> list[tuple[float, bool]]:
        """Seconds for each of some runs, one after the other, and whether that is a guess.

        What the store has and what an earlier one of them pays for (a graph, a quality pass, a reference) is not
        paid again.
        """
        paid = self._model.paid()
        return [_with_traces(task.config, *self._model.seconds(task.config, task.env_id, paid)) for task in tasks]


def _with_traces(config: LbiConfig, once: float, guess: bool) -> tuple[float, bool]:
    """A second process that takes traces does again what a run does, but measuring."""
    twice = bool(tracing.apart(config, "ok"))
    return once * (1 + twice), guess or twice


def estimate(units: Sequence[Unit], store: Store) -> Estimate:
    """How long the runs should take, one after another."""
    found = Durations(store).of([task for unit in units for task in unit.tasks])
    return Estimate(sum(seconds for seconds, _ in found), len(found), sum(guess for _, guess in found))


def _plainness(config: LbiConfig | None) -> tuple[bool, bool, bool]:
    """Sorts the baseline before everything else, and compiled cells last."""
    if config is None:
        return (True, True, True)
    return (
        config.quantizer.family != "none",
        config.compiler.backend != "eager",
        config.cache.kind != "dynamic",
    )
