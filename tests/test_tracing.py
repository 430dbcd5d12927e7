"""Traces beside a result: which are taken, by which process, and what is said of those that cannot be had."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lbi import compile_trace, memory_snapshot, run, steps, trace_pass, tracing, worker
from lbi.children import Started, Starter, Stop
from lbi.config import LbiConfig
from lbi.plan import Plan
from lbi.process import Phases
from lbi.record import Record
from lbi.report import inside
from lbi.schedule import Durations, make_units
from lbi.store import SCHEMA, Store
from lbi.trackers.wandb_files import attachments
from lbi.typed import plain
from lbi.worker import Task, run_unit


@pytest.fixture
def config(plan: Callable[..., Plan]) -> Callable[..., LbiConfig]:
    """The config of one cell on the tiny model; `device` stands for the GPU that is not here."""

    def made(*arguments: str, device: str = "cpu") -> LbiConfig:
        (cell,) = plan(*arguments).cells
        assert cell.config is not None
        return replace(cell.config, engine=replace(cell.config.engine, device=device))

    return made


@pytest.mark.parametrize(
    ("arguments", "device", "apart", "cannot"),
    [
        (["trace=off"], "cuda", (), {}),
        (["trace=kernels"], "cuda", (), {}),
        (["trace=kernels", "trace.blocking=true"], "cuda", ("kernels",), {}),
        (["trace=kernels", "trace.blocking=true"], "cpu", (), {}),
        (["trace=memory"], "cuda", ("memory",), {}),
        (["trace=memory"], "cpu", (), {"memory": "on a GPU alone"}),
        (["trace=compile"], "cpu", (), {"compile": "compiler=eager compiles nothing"}),
        (["trace=compile", "compiler=inductor", "cache=static"], "cpu", ("compile",), {}),
        (["trace=all", "compiler=inductor", "cache=static"], "cuda", ("memory", "compile"), {}),
    ],
)
def test_what_takes_which_trace(
    config: Callable[..., LbiConfig], arguments: list[str], device: str, apart: tuple[str, ...], cannot: dict[str, str]
) -> None:
    made = config(*arguments, device=device)
    assert tracing.apart(made, "ok") == apart
    said = tracing.in_the_run(made)
    assert set(said) == set(cannot)
    assert all(part in said[trace]["missing"] for trace, part in cannot.items())


def test_a_run_that_failed_is_traced_for_what_its_failure_leaves(config: Callable[..., LbiConfig]) -> None:
    made = config("trace=all", "trace.blocking=true", "compiler=inductor", "cache=static", device="cuda")
    assert tracing.apart(made, "oom") == ("memory",)
    assert tracing.apart(made, "not_applied") == ("compile",)
    assert tracing.apart(made, "timeout") == ()
    assert tracing.apart(made, "ok") == ("kernels", "memory", "compile")


def test_torch_finds_in_its_environment_what_it_reads_at_its_import(tmp_path: Path) -> None:
    found = tracing.variables(("kernels", "compile"), tmp_path)
    assert found["CUDA_LAUNCH_BLOCKING"] == "1"
    assert found["TORCH_TRACE"] == str(tmp_path / "trace" / "compile")
    assert tracing.variables(("memory",), tmp_path) == {}


class Fake:
    """An engine of which a trace asks only that it generates."""

    tokens_at_once = 1

    def __init__(self) -> None:
        self.asked: list[int] = []

    @contextmanager
    def marking(self, mark: Callable[[int], Any]) -> Iterator[None]:
        self.mark = mark
        yield

    def generate(self, prompt: list[int], new_tokens: int, seed: int, inspect: bool = False) -> Any:
        self.asked.append(new_tokens)
        with self.mark(1) if hasattr(self, "mark") else nullcontext():
            torch.ones(4).sum()
        return SimpleNamespace(cache={"bytes": 1, "class": "DynamicCache", "dtype": "bfloat16"})


def test_the_run_itself_says_what_it_could_not_take(config: Callable[..., LbiConfig], tmp_path: Path) -> None:
    record = Record(tmp_path, Phases(tmp_path))
    engine: Any = Fake()
    steps.trace(config("trace=all", "trace.blocking=true"), engine, [1, 2], record, record.phases)
    traces = record.effective["traces"]
    assert set(traces) == {"kernels", "memory", "compile"}
    assert (tmp_path / traces["kernels"]["file"]).stat().st_size > 100
    events = json.loads(gzip.decompress((tmp_path / traces["kernels"]["file"]).read_bytes()))["traceEvents"]
    assert "lbi: decode step" in {event["name"] for event in events}
    assert "no launch to wait for" in traces["kernels"]["note"]
    assert tracing.lacking({"traces": traces}) == (
        "no memory trace: torch keeps the history of allocations on a GPU alone; "
        "no compile trace: compiler=eager compiles nothing"
    )
    listed = inside.traces({"traces": traces})
    assert any(text.startswith("kernels: trace/trace.json.gz") for text in listed)
    assert "compile: none, compiler=eager compiles nothing" in listed


FRAMES = [
    {"filename": "??", "line": 0, "name": "at::empty"},
    {"filename": "/env/site-packages/torch/nn/modules/linear.py", "line": 9, "name": "forward"},
    {"filename": "/home/me/lbi/models.py", "line": 77, "name": "load"},
]


def snapshot() -> dict[str, Any]:
    """As torch.cuda.memory._snapshot() gives it."""
    blocks = [
        {"state": "active_allocated", "size": 1024, "frames": FRAMES},
        {"state": "active_allocated", "size": 2048, "frames": FRAMES},
        {"state": "active_pending_free", "size": 512, "frames": []},
        {"state": "inactive", "size": 4096, "frames": FRAMES},
    ]
    return {"segments": [{"total_size": 8192, "blocks": blocks}, {"total_size": 2048, "blocks": []}]}


def test_a_snapshot_says_who_holds_how_much() -> None:
    found = memory_snapshot.summarize(snapshot())
    assert (found["allocated_bytes"], found["reserved_bytes"]) == (3584, 10240)
    assert found["largest"] == [
        {"where": "lbi/models.py:77 load", "bytes": 3072, "blocks": 2},
        {"where": "no Python line is known", "bytes": 512, "blocks": 1},
    ]


class Card:
    """Stands in for torch's side of a GPU: the allocator's history and whoever waits for it to run out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.history: list[Any] = []
        self.out_of_memory: Callable[..., None] = lambda *_: None
        memory = torch.cuda.memory
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4000)
        monkeypatch.setattr(memory, "_snapshot", snapshot)
        monkeypatch.setattr(memory, "_dump_snapshot", lambda file: Path(file).write_text("of torch"))
        monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: self.history.append(enabled))
        monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", self._attach, raising=False)

    def _attach(self, observer: Callable[..., None]) -> None:
        self.out_of_memory = observer


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture
def attempt(tmp_path: Path, config: Callable[..., LbiConfig], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The folder of an attempt whose run is over, with a second process about to begin."""
    monkeypatch.setattr(trace_pass, "die_with_parent", lambda: None)
    monkeypatch.setattr(trace_pass, "prepare", lambda config: None)

    def made(*traces: str) -> Path:
        folder = tmp_path / "attempt-1" / "trace"
        folder.mkdir(parents=True)
        request = {"schema": SCHEMA, "config": plain(config("trace=memory", "workload.new_tokens=9"))}
        (folder.parent / "config.json").write_text(json.dumps(request))
        (folder / "request.json").write_text(json.dumps({"schema": SCHEMA, "traces": traces}))
        return folder

    return made


def traces(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder.parent / "effective.json").read_text())["traces"])


def ready(engine: Fake) -> Any:
    return lambda *_, **__: SimpleNamespace(engine=engine, prompt=[1, 2])


def test_memory_is_recorded_from_loading_to_the_last_token(
    attempt: Callable[..., Path], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, engine = attempt("memory"), Fake()
    (folder.parent / "effective.json").write_text(json.dumps({"schema": SCHEMA, "threads": 2}))
    monkeypatch.setattr(run, "make_ready", ready(engine))
    trace_pass.main(folder)
    found = traces(folder)["memory"]
    assert found["taken"] == "after a generation"
    assert found["peak_bytes"] == 4000
    assert (folder.parent / found["file"]).read_text() == "of torch"
    assert card.history == ["all", None]
    assert engine.asked[-1] == 9
    # What the run itself found is still there.
    assert json.loads((folder.parent / "effective.json").read_text())["threads"] == 2


def test_memory_that_runs_out_is_kept_as_it_was_at_that_moment(
    attempt: Callable[..., Path], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_ready(*_: Any, **__: Any) -> None:
        card.out_of_memory(0, 1, 2, 3)
        raise MemoryError("tried to allocate 20 GiB")

    folder = attempt("memory")
    monkeypatch.setattr(run, "make_ready", make_ready)
    trace_pass.main(folder)
    found = traces(folder)["memory"]
    assert found["taken"] == "at the allocation that failed"
    assert (folder / "memory_snapshot.pickle").exists()
    assert "tried to allocate 20 GiB" in found["failed"]


def test_a_pass_that_fails_says_so(attempt: Callable[..., Path], card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_ready(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such layer")

    folder = attempt("kernels", "memory", "compile")
    monkeypatch.setattr(run, "make_ready", make_ready)
    trace_pass.main(folder)
    found = traces(folder)
    assert found["kernels"]["missing"] == "the pass that takes it failed: RuntimeError: no such layer"
    assert found["memory"]["missing"] == found["kernels"]["missing"]
    assert found["compile"]["missing"] == "torch wrote no log under TORCH_TRACE"


@pytest.fixture
def unit(plan: Callable[..., Plan], config: Callable[..., LbiConfig]) -> list[worker.Task]:
    """One task for a GPU with everything traced that a second process takes."""
    cells = plan("quality=off", "trace=memory").cells
    (task,) = make_units(cells)[0].tasks
    return [replace(task, config=replace(task.config, engine=replace(task.config.engine, device="cuda")))]


def stand_in(monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> list[tuple[str, dict[str, str]]]:
    """Children that end at once: the run with `status`, the pass with exit code `code`; what was started."""
    started = []

    def start(self: Any, module: str, folder: Path, log: Path, config: Any, caches: Path, own: Any = ()) -> Started:
        import subprocess

        started.append((module, dict(own)))
        with log.open("a") as file:
            file.write("the last line\n")
        if module == "lbi.run":
            numbers = {"metrics": {"decode_tok_s": 1.0}, "missing": {}}
            (folder / "metrics.json").write_text(json.dumps({"schema": SCHEMA, **numbers}))
            said = {"schema": SCHEMA, "status": status, "reason": "", "phases_s": {}, "last_phase": ""}
            (folder / "verdict.json").write_text(json.dumps(said))
        ending = code if module == "lbi.trace_pass" else 0
        command = [sys.executable, "-c", f"raise SystemExit({ending})"]
        return Started(subprocess.Popen(command, start_new_session=True), "a stand-in")

    monkeypatch.setattr(Starter, "start", start)
    return started


@pytest.mark.parametrize(("status", "passes"), [("ok", 1), ("oom", 1), ("numerics", 0)])
def test_the_worker_has_a_trace_taken_after_the_run_and_before_it_publishes(
    unit: list[worker.Task], store: Store, monkeypatch: pytest.MonkeyPatch, status: str, passes: int
) -> None:
    started = stand_in(monkeypatch, status, 0)
    run_unit(unit, store, lambda event: None, Stop(), 0.0)
    modules = [module for module, _ in started]
    assert modules[modules.index("lbi.run") :] == ["lbi.run"] + ["lbi.trace_pass"] * passes
    found = store.result(unit[0].run_id, unit[0].env_id)
    assert found is not None
    assert found.status == status
    assert (found.folder / "trace" / "request.json").exists() == bool(passes)


def test_a_trace_that_dies_leaves_the_result_as_it_was_and_is_named(
    unit: list[worker.Task], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "ok", 3)
    run_unit(unit, store, lambda event: None, Stop(), 0.0)
    found = store.result(unit[0].run_id, unit[0].env_id)
    assert found is not None
    assert found.ok
    said = tracing.lacking(store.read(found, "effective.json") or {})
    assert said == "no memory trace: the pass that takes it did not finish, exit code 3: the last line"


def test_a_finished_result_without_the_trace_says_how_to_have_it(plan: Callable[..., Plan], store: Store) -> None:
    (cell,) = plan("trace=kernels").cells
    attempt = store.claim(cell.run_id, cell.env_id, {})
    (attempt.folder / "metrics.json").write_text(json.dumps({"schema": SCHEMA, "metrics": {"decode_tok_s": 1.0}}))
    store.publish(attempt, "ok", "", 1.0)
    assert plan("trace=off").cells[0].reason == "ok"
    # A CPU has no memory trace to be missed.
    assert plan("trace=memory").cells[0].reason == "ok"
    (again,) = plan("trace=kernels").cells
    assert (again.verdict, again.reason) == ("DONE", "ok; it has no kernels trace, which sweep.mode=force takes")
    tracing.add(attempt.folder, {"kernels": {"file": "trace/trace.json.gz"}})
    assert plan("trace=kernels").cells[0].reason == "ok"


def test_a_second_process_is_part_of_the_estimate(config: Callable[..., LbiConfig], store: Store) -> None:
    def took(*arguments: str) -> tuple[float, bool]:
        ((seconds, guess),) = Durations(store).of([Task(0, "", "a" * 12, "e" * 12, config(*arguments, device="cuda"))])
        return seconds, guess

    assert took("trace=memory") == (2 * took()[0], True)


def test_what_a_second_process_took_goes_to_wandb_and_what_is_about_it_stays(tmp_path: Path) -> None:
    attempt = tmp_path / "attempt-1"
    for name in ("metrics.json", "trace/memory_snapshot.pickle", "trace/request.json", "trace/process.json"):
        (attempt / name).parent.mkdir(parents=True, exist_ok=True)
        (attempt / name).write_text("{}")
    made = attachments("abc", attempt, "all", 10.0, tmp_path / "scratch").made
    assert {item.name: [name for name, _ in item.files] for item in made} == {
        "result-abc": ["metrics.json"],
        "trace-abc": ["trace/memory_snapshot.pickle"],
    }


LOG = """\
V1129 07:09:00.735000 83 torch/_logging/structured.py:28] {"str": ["/somewhere/a.py", 1]}
V1129 07:09:00.782000 83 torch/_dynamo/output_graph.py:28] {"dynamo_output_graph": {"sizes": {}}, "frame_id": 0}
\tclass GraphModule(torch.nn.Module): # ] {"dynamo_output_graph": {}}
V1129 07:09:01.9 83 torch/_inductor/graph.py:9] {"inductor_output_code": {"filename": "x"}, "has_payload": "1"}
V1129 07:09:02.1 83 torch/_dynamo/x.py:9] {"artifact": {"name": "recompile_reasons", "encoding": "json"}}
V1129 07:09:02.2 83 torch/_dynamo/x.py:9] {"cut off
"""


def test_the_compilers_log_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "trace" / "compile"
    folder.mkdir(parents=True)
    (folder / "dedicated_log_torch_trace_x.log").write_text(LOG)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compile_trace.read(folder)
    assert found["file"] == "trace/compile/dedicated_log_torch_trace_x.log"
    assert (found["graphs"], found["made_by_inductor"], found["recompiled"]) == (1, 1, 1)
    assert "tlparse is not installed" in found["note"]


@pytest.mark.parametrize(("last", "pages", "said"), [("", True, ""), ("exit 3", False, "it does not know this log")])
def test_pages_by_tlparse_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, pages: bool, said: str
) -> None:
    folder = tmp_path / "trace" / "compile"
    folder.mkdir(parents=True)
    (folder / "a.log").write_text(LOG)
    program = tmp_path / "bin" / "tlparse"
    program.parent.mkdir()
    making = 'mkdir -p "$3" && echo "$1" > "$3/index.html"' if pages else "echo it does not know this log >&2"
    program.write_text(f"#!/bin/sh\n{making}\n{last}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    found = compile_trace.read(folder)
    assert (found.get("pages") == "trace/compile/pages/index.html") == pages
    assert said in found.get("note", "")


@pytest.mark.by_hand
def test_what_inductor_made_of_a_real_step(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    """Compiled a second time, with its caches off, so that the log is whole."""
    ran = run_lbi(
        *["model=tiny_random", "tracker=none", "measure=brief", "quality=off", "workload.new_tokens=6"],
        *["compiler=inductor", "cache=static", "trace=compile"],
        timeout=400,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (file,) = (tmp_path / "store").glob("runs/*/*/attempt-1/effective.json")
    found = json.loads(file.read_text())["traces"]["compile"]
    assert (found["graphs"], found["made_by_inductor"]) == (1, 1)
    log = (file.parent / found["file"]).read_text()
    assert "inductor_output_code" in log
    assert json.loads((file.parent / "trace" / "process.json").read_text())["started"].startswith("started anew")
