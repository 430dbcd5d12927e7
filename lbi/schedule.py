"""Turns the cells that are to run into units, and says how long they should take.

A unit is what one job executes in turn: runs of one model with the same resources,
the baseline first, so that every later row can be compared while the sweep runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lbi.config import LbiConfig
from lbi.files import write_json
from lbi.plan import Cell
from lbi.store import SCHEMA, Store
from lbi.sweep_folder import read_plan
from lbi.typed import plain
from lbi.verdicts import PRUNED
from lbi.worker import Task

PRIOR_S = {("cpu", "eager"): 20.0, ("cpu", "inductor"): 80.0, ("cuda", "eager"): 40.0, ("cuda", "inductor"): 120.0}
"""Seconds a run is guessed to take where the store has no history: SmolLM2 on two cores, an 8B model on a GPU."""


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


def make_units(cells: Sequence[Cell]) -> list[Unit]:
    """Units of the cells that are to run, one for each model and resource class."""
    groups: dict[str, list[Task]] = {}
    for cell in sorted(cells, key=lambda cell: (_plainness(cell.config), cell.index)):
        if cell.config is None:
            continue
        key = repr((cell.config.model, cell.config.resources))
        groups.setdefault(key, []).append(Task(cell.index, cell.name, cell.run_id, cell.env_id, cell.config))
    return [Unit(f"unit-{index}", tuple(tasks)) for index, tasks in enumerate(groups.values())]


def save_units(units: Sequence[Unit], store: Store, sweep: str, since: float) -> None:
    """Write each unit where any worker can take it from: sweeps/<name>/units/<unit>.json."""
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
        content = {"schema": SCHEMA, "store": str(store.root), "since": since, "tasks": tasks}
        write_json(store.sweep_folder(sweep) / "units" / f"{unit.name}.json", content)


def estimate(cells: Sequence[Cell], store: Store) -> Estimate:
    """How long the runs should take, by what like runs took before.

    A like run has the same model, quantizer and compiler; where the store has none,
    `PRIOR_S` is the guess.
    """
    history = _history(store)
    seconds, guessed = 0.0, 0
    for cell in cells:
        if cell.config is None:
            continue
        known = history.get(_kind(cell.config))
        guessed += known is None
        prior = PRIOR_S[cell.config.engine.device, cell.config.compiler.backend]
        seconds += median(known) if known else prior
    return Estimate(seconds, len(cells), guessed)


def _plainness(config: LbiConfig | None) -> tuple[bool, bool, bool]:
    """Sorts the baseline before everything else, and compiled cells last."""
    if config is None:
        return (True, True, True)
    return (
        config.quantizer.family != "none",
        config.compiler.backend != "eager",
        config.cache.kind != "dynamic",
    )


def _kind(config: LbiConfig) -> tuple[str, ...]:
    return (config.model.name, config.quantizer.name, config.compiler.name, config.workload.name)


def _history(store: Store) -> dict[tuple[str, ...], list[float]]:
    """Seconds of earlier good runs by kind, from the plans and results of every sweep in the store."""
    history: dict[tuple[str, ...], list[float]] = {}
    for sweep in store.sweeps():
        for row in read_plan(store, sweep):
            if row["verdict"] == PRUNED or not row["choices"]:
                continue
            result = store.result(row["run_id"], row["env_id"])
            if result is not None and result.ok:
                kind = tuple(row["choices"][group] for group in ("model", "quantizer", "compiler", "workload"))
                history.setdefault(kind, []).append(result.seconds)
    return history
