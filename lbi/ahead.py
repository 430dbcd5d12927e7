"""Compiles the graphs of a slot's next runs side by side, before the first of those runs is measured.

Tracing a graph and lowering it keeps one core busy for a minute, and the GPU and all other cores idle: on a GPU
that is most of what a sweep of compiled cells costs. So when the first cell comes up whose graph no cache has,
processes that load, quantize, compile, warm up and measure nothing do that for it and for the graphs
behind it, at the same time. What they make is kept as any run's is (kept_graphs.py), and each cell finds its own.
Nothing is measured meanwhile, and nothing that has to be timed to be chosen is compiled so. A process that fails costs
its time and nothing else: the cell compiles for itself. On an H200 the kernels of a step take what they take when each
cell compiles for itself (docs/log.md); on two CPU cores it spares nothing, and is not done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbi import environment
from lbi.children import Child, Starter, Stop, end_session
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.files import write_json
from lbi.graph_key import graph_key
from lbi.kept_graphs import KeptGraphs
from lbi.model_files import inspect
from lbi.places import compile_cache
from lbi.quantizers.options import parts
from lbi.slots import Slot
from lbi.store import SCHEMA, process_name

if TYPE_CHECKING:
    from lbi.worker import Task

MOST = 8
"""Graphs compiled at once, however many cores there are."""

CORES_EACH = 4
"""Cores that a compile makes use of: one traces and lowers, the others are inductor's workers."""

ROOM = 1.5
"""Memory that a process takes on a GPU, in sizes of the unquantized weights: these, quantized ones, and a cache."""


@dataclass(frozen=True, slots=True)
class Share:
    """What compiling ahead took for one graph: `seconds` of the slot, which its first cell is charged with.

    `new_server`: processes were forked from a server that imported the libraries in these seconds.
    """

    seconds: float
    new_server: bool = False


class Ahead:
    """What one slot has compiled ahead. `request` makes the request of a run's process, as the worker does."""

    def __init__(self, slot: Slot, starter: Starter, store: Path, request: Callable[[Task], dict[str, Any]]) -> None:
        self.slot, self.starter, self.store, self.request = slot, starter, store, request
        self._shares: dict[str, Share] = {}
        self._tried: set[str] = set()
        self._new_server = False

    def due(self, task: Task, queued: Iterable[Task]) -> list[Task]:
        """The task and some behind it, one of each graph, that are to be compiled at once now; none if it would be one.

        A slot beside others compiles nothing ahead: the others' tasks keep the machine busy.
        """
        if self.slot.of > 1 or not self._is_cold(task):
            return []
        most, found = at_once(task, self.slot), {_name(task): task}
        for other in queued:
            if len(found) < most and _name(other) not in found and self._is_cold(other):
                found[_name(other)] = other
        return list(found.values()) if len(found) > 1 else []

    def compile(self, tasks: list[Task], stop: Stop) -> None:
        """Compile the tasks' graphs at the same time, and remember what that took."""
        self._tried.update(map(_name, tasks))
        self._new_server, began = False, time.perf_counter()
        # Without room on the disk there is no process; each cell compiles for itself then, and says what it meets.
        with suppress(OSError), ExitStack() as opened:
            children = [self._start(task, len(tasks) - 1, stop, opened) for task in tasks]
            for child in children:
                child.wait(lambda phase: None)
        share = Share((time.perf_counter() - began) / len(tasks), self._new_server)
        self._shares |= {_name(task): share for task in tasks}

    def share(self, task: Task) -> Share | None:
        """What the task's account is to be charged with: its graph's share, for the first that asks."""
        return self._shares.pop(_name(task), None)

    def _is_cold(self, task: Task) -> bool:
        """Whether the task's graph is in no cache that its run may use."""
        if task.config.resources.compile_cache == "off" or _name(task) in self._tried or times(task.config):
            return False
        graphs = KeptGraphs.of(task.config, compile_cache(task.env_id), self.store / "compile_caches" / task.env_id)
        return graphs is not None and not graphs.known()

    def _start(self, task: Task, beside: int, stop: Stop, opened: ExitStack) -> Child:
        """A process that compiles `beside` others and measures nothing; closing `opened` ends it, folder and all."""
        folder = compile_cache(task.env_id) / "ahead" / f"{process_name()}-{graph_key(task.config)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        opened.callback(shutil.rmtree, folder, ignore_errors=True)
        request = {**self.request(task), "until": "compiled", "beside": beside}
        write_json(folder / "config.json", {"schema": SCHEMA, **request})
        started = self.starter.start("lbi.run", folder, folder / "log.txt", task.config, compile_cache(task.env_id))
        opened.callback(_end, started.process)
        self._new_server = self._new_server or started.new_server
        return Child(started.process, folder, task.config.resources, stop)


def times(config: LbiConfig) -> bool:
    """Whether kernels or layers of a cell are chosen by timing them, which wants the device alone."""
    named = [config.quantizer, *parts(config.quantizer)]
    by_quantizer = any(one.family in ("gemlite", "autoquant") or one.backend == "gemlite" for one in named)
    return by_quantizer or config.compiler.coordinate_descent or "max-autotune" in (config.compiler.mode or "")


def _end(process: Any) -> None:
    """End a process that was not waited for to its end."""
    if process.poll() is None:
        end_session(process)


def at_once(task: Task, slot: Slot) -> int:
    """Graphs that are compiled at the same time: `resources.compile_ahead`, or what cores and GPU memory allow."""
    asked = task.config.resources.compile_ahead
    if asked is not None:
        return asked
    card = slot.card or next(iter(environment.gpus()), {})
    memory = card.get("memory_bytes")
    size = _weight_bytes(task)
    if task.config.engine.device != "cuda" or not memory or not size:
        return 1
    return max(1, min(MOST, environment.cores() // CORES_EACH, int(memory / (ROOM * size))))


def _weight_bytes(task: Task) -> float | None:
    """Bytes of the unquantized weights; None if unknown."""
    try:
        parameters = inspect(task.config.model).parameters()
    except InputError:
        return None
    return parameters * (4 if task.config.model.dtype == "float32" else 2) if parameters else None


def _name(task: Task) -> str:
    """A graph as its caches know it."""
    return f"{task.env_id} {graph_key(task.config)}"
