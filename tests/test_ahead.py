"""Graphs that no cache has are compiled side by side, before the first of their cells is measured, and paid for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lbi import ahead, children, environment, kept_graphs
from lbi.ahead import Ahead, at_once
from lbi.children import Started, Stop
from lbi.config import LbiConfig
from lbi.graph_key import graph_key
from lbi.places import compile_cache
from lbi.plan import Plan
from lbi.schedule import make_units
from lbi.slots import Slot
from lbi.store import Store
from lbi.worker import Event, Task, run_unit

MakePlan = Callable[..., Plan]
COMPILED = ("cache=static", "compiler=inductor", "quality=off", "resources.compile_ahead=2")

CHILD = """
import json, os, sys, time
from pathlib import Path
folder, hall, key, cache, how = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
request = json.loads((folder / "config.json").read_text())
def write(name, **content):
    (folder / f".{name}").write_text(json.dumps({"schema": 1, **content}))
    (folder / f".{name}").replace(folder / name)
if request.get("until") == "compiled":
    (hall / key).touch()
    end = time.monotonic() + 60
    while len(list(hall.iterdir())) < 2:
        if time.monotonic() > end:
            sys.exit("nobody else is compiling")
        time.sleep(0.01)
    if how == "hangs":
        time.sleep(600)
    if how == "dies":
        os.kill(os.getpid(), 9)
    (Path(cache) / "graphs").mkdir(parents=True, exist_ok=True)
    (Path(cache) / "graphs" / f"{key}.json").write_text(json.dumps({"schema": 1, "phase_s": 40.0}))
else:
    write("metrics.json", metrics={"decode_tok_s": 10.0, "tpot_s": 0.1}, missing={})
    write("verdict.json", status="ok", reason="", phases_s={"compile": 0.01}, cost={"compile": "warm"})
"""
"""A stand-in for lbi.run. One that compiles waits until another does, too: side by side or not at all."""


def tasks_of(plan: Plan) -> list[Task]:
    return [task for unit in make_units(plan.cells) for task in unit.tasks]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What was started, in order: `.runs` of (what for, graph); `.how` those end that compile."""
    monkeypatch.setenv("LBI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hall").mkdir()
    (tmp_path / "child.py").write_text(CHILD)
    seen = SimpleNamespace(runs=[], how="", processes=[])

    def start(
        self: Any, module: str, folder: Path, log: Path, config: LbiConfig, caches: Path, own: Any = ()
    ) -> Started:
        key = str(graph_key(config))
        request = json.loads((folder / "config.json").read_text()) if module == "lbi.run" else {}
        seen.runs.append((request.get("until", module), key))
        arguments = ["child.py", str(folder), "hall", key, str(caches), seen.how]
        command = [sys.executable, *arguments] if module == "lbi.run" else ["true"]
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
        seen.processes.append(process)
        return Started(process, "a stand-in")

    monkeypatch.setattr(children.Starter, "start", start)
    return seen


def measure(tasks: list[Task], store: Store, stop: Stop | None = None) -> list[Event]:
    events: list[Event] = []
    run_unit(tasks, store, events.append, stop or Stop(), time.time())
    return events


def costs(tasks: list[Task], store: Store) -> list[dict[str, Any]]:
    found = [store.result(task.run_id, task.env_id) for task in tasks]
    return [json.loads((result.folder.parent / "status.json").read_text()) for result in found if result]


def test_graphs_are_compiled_side_by_side_and_their_first_cells_bear_it(
    plan: MakePlan, store: Store, started: Any
) -> None:
    tasks = tasks_of(plan(*COMPILED, "quantizer=none,int8_wo", "decoding=greedy,sampling"))
    began = time.perf_counter()
    events = measure(tasks, store)
    took = time.perf_counter() - began
    keys = [str(graph_key(task.config)) for task in tasks]
    assert [run for run in started.runs if run[0] == "compiled"] == [("compiled", keys[0]), ("compiled", keys[2])]
    assert [what for what, _ in started.runs[:2]] == ["compiled", "compiled"]
    assert [what for what, _ in started.runs].count("lbi.run") == 4
    assert any("2 graphs are being compiled side by side" in event.text for event in events)
    kept = compile_cache(tasks[0].env_id) / "graphs"
    assert {file.stem for file in kept.iterdir()} == set(keys)
    told = costs(tasks, store)
    shares = [status["cost"]["phases_s"].get("compile ahead", 0.0) for status in told]
    assert shares[0] == shares[2] > 0.0
    assert shares[1] == shares[3] == 0.0
    assert sum(status["seconds"] for status in told) == pytest.approx(took, abs=0.5)
    for status in told:
        assert sum(status["cost"]["phases_s"].values()) == pytest.approx(status["seconds"], abs=0.01)
    assert not list(compile_cache(tasks[0].env_id).glob("ahead/*"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("resources.compile_ahead=1",),
        ("resources.compile_ahead=null",),
        ("resources.compile_cache=off",),
        # What is chosen by timing it wants the device alone.
        ("compiler=inductor_max_autotune",),
        ("compiler.coordinate_descent=true",),
    ],
)
def test_a_cell_compiles_for_itself(plan: MakePlan, store: Store, started: Any, overrides: tuple[str, ...]) -> None:
    given = [one for one in COMPILED if one.split("=")[0] not in {other.split("=")[0] for other in overrides}]
    tasks = tasks_of(plan(*given, "quantizer=none,int8_wo", *overrides))
    assert len(tasks) == 2
    measure(tasks, store)
    assert not [what for what, _ in started.runs if what == "compiled"]


@pytest.mark.parametrize(
    ("quantizer", "timed"),
    [
        (("quantizer=int8_wo",), False),
        (("quantizer=hqq4",), False),
        (("quantizer=gemlite_a16w4",), True),
        (("quantizer=autoquant",), True),
        (("quantizer=hqq4", "quantizer.backend=gemlite"), True),
        (("quantizer=mix", "quantizer.mix={down_proj:gemlite_a16w4,default:int8_wo}"), True),
    ],
)
def test_quantizers_that_time_their_kernels_want_the_device_alone(
    plan: MakePlan, quantizer: tuple[str, ...], timed: bool
) -> None:
    (cell,) = plan("cache=static", "compiler=inductor", *quantizer).cells
    assert cell.config is not None
    assert ahead.times(cell.config) == timed


def test_one_graph_and_graphs_of_a_cache_are_not_compiled_ahead(plan: MakePlan, store: Store, started: Any) -> None:
    one, other = tasks_of(plan(*COMPILED, "quantizer=none,int8_wo"))
    graphs = Ahead(Slot(), None, store.root, lambda task: {})  # type: ignore[arg-type]
    assert graphs.due(one, [other]) == [one, other]
    assert graphs.due(one, [one]) == []
    assert Ahead(Slot(0, of=2), None, store.root, lambda task: {}).due(one, [other]) == []  # type: ignore[arg-type]
    note = compile_cache(other.env_id) / "graphs" / f"{graph_key(other.config)}.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    assert graphs.due(one, [other]) == []
    archives = store.root / "compile_caches" / one.env_id
    kept = archives / kept_graphs.architecture() / str(graph_key(one.config))
    kept.mkdir(parents=True)
    (kept / "0.tar.gz").touch()
    note.unlink()
    assert graphs.due(one, [other]) == []


def test_a_process_that_dies_costs_its_time_and_is_not_tried_again(plan: MakePlan, store: Store, started: Any) -> None:
    started.how = "dies"
    tasks = tasks_of(plan(*COMPILED, "quantizer=none,int8_wo", "decoding=greedy,sampling"))
    measure(tasks, store)
    assert [status["status"] for status in costs(tasks, store)] == ["ok"] * 4
    assert [what for what, _ in started.runs].count("compiled") == 2


def test_a_stop_ends_what_is_being_compiled(plan: MakePlan, store: Store, started: Any, tmp_path: Path) -> None:
    started.how = "hangs"
    tasks = tasks_of(plan(*COMPILED, "quantizer=none,int8_wo"))
    stop = Stop()

    def report(event: Event) -> None:
        if event.kind == "wait":
            stop.request()

    run_unit(tasks, store, report, stop, time.time())
    assert [what for what, _ in started.runs] == ["compiled", "compiled"]
    assert all(process.poll() is not None for process in started.processes)
    assert [status["status"] for status in costs(tasks, store)] == ["cancelled"]


def test_without_room_for_their_folders_cells_compile_for_themselves(
    plan: MakePlan, store: Store, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ahead, "write_json", full)
    tasks = tasks_of(plan(*COMPILED, "quantizer=none,int8_wo"))
    measure(tasks, store)
    assert [status["status"] for status in costs(tasks, store)] == ["ok", "ok"]


def test_as_many_at_once_as_cores_and_memory_allow(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    cards: list[dict[str, Any]] = []
    monkeypatch.setattr(environment, "gpus", lambda: cards)
    monkeypatch.setattr(environment, "cores", lambda: 26)
    (task,) = tasks_of(
        plan("model=llama31_8b_random", "sweep.prune=false", "engine.device=cuda", "resources.compile_ahead=null")
    )
    assert at_once(task, Slot()) == 1
    # 8.03 billion weights of two bytes, one and a half times: 24.1 GB each.
    cards.append({"memory_bytes": 80e9})
    assert at_once(task, Slot()) == 3
    assert at_once(task, Slot(card={"memory_bytes": 192e9, "uuid": "x"})) == 6
    monkeypatch.setattr(environment, "cores", lambda: 9)
    assert at_once(task, Slot()) == 2


def test_what_was_timed_beside_others_is_not_kept(plan: MakePlan, tmp_path: Path) -> None:
    (task,) = tasks_of(plan(*COMPILED))
    for beside, kept in ((2, {"kernel.py"}), (0, {"kernel.py", "kernel.best_config"})):
        graphs = kept_graphs.KeptGraphs.of(task.config, tmp_path / "node", tmp_path / "store")
        assert graphs is not None
        graphs.beside = beside
        graphs.open()
        for name in ("kernel.py", "kernel.best_config"):
            (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / name).write_text("made")
        graphs.close("cold", 1.0, 1.0)
        assert graphs.cold()["beside"] == beside
        assert {file.name for file in (tmp_path / "node" / "inductor").iterdir()} == kept


@pytest.mark.slow
def test_a_real_graph_is_warm_for_its_first_cell(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    sweep = ["model=tiny_random", "quantizer=none,int8_wo", "compiler=inductor", "cache=static", "measure=brief"]
    sweep += ["quality=off", "workload.new_tokens=8", "tracker=none", "sweep.name=s", "resources.compile_ahead=2"]
    ran = run_lbi("-m", *sweep, timeout=600, LBI_CACHE=str(tmp_path / "cache"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    effective = [json.loads(file.read_text()) for file in tmp_path.glob("store/runs/*/*/attempt-1/effective.json")]
    assert [found["compiler"]["compile_cache"] for found in effective] == ["warm", "warm"]
    assert all(found["graph"]["cold_compile_s"] > 0 for found in effective)
    assert [found["graph"]["cold_compile_beside"] for found in effective] == [1, 1]
    assert "compile ahead" in ran.stdout
