"""Real runs that share a process find what isolated ones find, and the model between them is as it was."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import shared_model
from lbi.children import Stop
from lbi.cost_model import CostModel
from lbi.engines import make
from lbi.models import load
from lbi.plan import Plan
from lbi.process import PeakMemory, Phases
from lbi.record import Record
from lbi.schedule import make_units
from lbi.shared_model import Shared, Snapshot
from lbi.store import Store
from lbi.worker import Event, Task, run_unit

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import isolation_ab
from isolation_ab import Found, judge

GRID = ("engine=loop", "quantizer=int8_wo", "cache=sliding,static_int8,static", "decoding=greedy,sampling")

BRIEF = ("measure=quick", "tracker=none", "workload.new_tokens=16", "resources.shared_quality=false")

EXACT = (
    "mean_kld",
    "top1_agreement",
    "bits_per_weight",
    "weight_bytes",
    "bytes_per_token",
    "kv_bytes",
    "first_divergence",
)


def measured(
    plan: Callable[..., Plan], store: Store, *overrides: str, on: Callable[[Event], None] = print
) -> list[Task]:
    """Tasks of a grid, once they have been measured into the store."""
    unit = [task for found in make_units(plan(*overrides, *BRIEF).cells) for task in found.tasks]
    run_unit(unit, store, on, Stop(), time.time())
    return unit


def read(store: Store, task: Task, name: str) -> dict[str, Any]:
    result = store.result(task.run_id, task.env_id)
    assert result is not None, task.name
    assert result.ok, result.reason
    found: dict[str, Any] = json.loads((result.folder / name).read_text())
    return found


@pytest.mark.slow
def test_shared_runs_find_what_isolated_ones_find(plan: Callable[..., Plan], store: Store) -> None:
    """Three caches with attention functions of their own, drawn and greedy tokens, one quantized model."""
    other = Store.open(store.root.with_name("isolated"), write=True)
    shared = measured(plan, store, *GRID, "resources.isolation=shared_load")
    isolated = measured(plan, other, *GRID)
    assert [task.run_id for task in shared] == [task.run_id for task in isolated]
    assert len({read(store, task, "process.json")["pid"] for task in shared}) == 1
    for mine, theirs in zip(shared, isolated, strict=True):
        assert read(store, mine, "text.json")["tokens"] == read(other, theirs, "text.json")["tokens"], mine.name
        found, known = (
            read(where, task, "metrics.json")["metrics"] for where, task in ((store, mine), (other, theirs))
        )
        assert {name: found.get(name) for name in EXACT} == {name: known.get(name) for name in EXACT}, mine.name
        assert read(store, mine, "effective.json")["weights"] == read(other, theirs, "effective.json")["weights"]
        assert read(other, theirs, "effective.json")["isolation"] == {"how": "process"}
    check_what_is_told(store, shared)


def check_what_is_told(store: Store, shared: list[Task]) -> None:
    """The first run has loaded and quantized; the others say that they have not, and show no zeros for it."""
    first, *later = shared
    took = read(store, first, "metrics.json")["metrics"]
    for task in later:
        found, effective = read(store, task, "metrics.json"), read(store, task, "effective.json")
        for name in ("load_s", "quantize_s"):
            assert found["metrics"][name] == took[name] > 0
        assert effective["quantized"].startswith(f"shared with {first.run_id} (")
        assert effective["isolation"]["after"][0] == first.run_id
        cost = store.result(task.run_id, task.env_id).cost  # type: ignore[union-attr]
        assert (cost["isolation"], cost["shared_from"]) == ("shared_load", first.run_id)
        assert cost["shared_load_s"] >= took["load_s"] + took["quantize_s"] - 1e-6
        assert "quantize" not in cost["phases_s"]
    own = store.result(first.run_id, first.env_id).cost  # type: ignore[union-attr]
    assert "shared_from" not in own
    assert own["phases_s"]["quantize"] > 0


@pytest.mark.slow
def test_a_real_process_killed_in_mid_group_takes_only_its_run(plan: Callable[..., Plan], store: Store) -> None:
    def kill(event: Event) -> None:
        if event.kind == "phase" and event.text == "measure" and event.task.config.decoding.kind == "sampling":
            folder = store.running(event.task.run_id, event.task.env_id)
            assert folder is not None
            os.kill(json.loads((folder / "process.json").read_text())["pid"], signal.SIGKILL)

    grid = ("cache=dynamic,static", "decoding=greedy,sampling", "quality=off", "measure.cooldown_s=1")
    unit = measured(plan, store, *grid, "resources.isolation=shared_load", on=kill)
    found = {task.name: store.result(task.run_id, task.env_id) for task in unit}
    assert [result.status if result else None for result in found.values()].count("crash") == 2
    greedy = [task for task in unit if task.config.decoding.kind == "greedy"]
    assert all(read(store, task, "metrics.json")["metrics"]["decode_tok_s"] > 0 for task in greedy)
    # Of the group's first two runs one was killed in the shared process; the two after it had their own.
    assert read(store, unit[0], "process.json")["isolation"]["how"] == "shared_load"
    last = store.result(unit[3].run_id, unit[3].env_id)
    assert last is not None
    assert json.loads((last.folder / "process.json").read_text())["isolation"]["how"] == "process"


@pytest.mark.by_hand
def test_compiled_runs_that_share_compile_as_if_they_were_alone(plan: Callable[..., Plan], store: Store) -> None:
    unit = measured(
        plan, store, "engine=loop", "cache=static", "compiler=inductor", "decoding=greedy,sampling", "quality=off",
        "resources.isolation=shared_load", "resources.compile_cache=off",
    )  # fmt: skip
    for task in unit:
        compiled = read(store, task, "effective.json")["compiler"]
        assert (compiled["graphs"], compiled["compile_cache"]) == (1, "cold")
    found = read(store, unit[1], "metrics.json")
    assert found["metrics"]["compile_s"] is None
    assert "need not start anew" in found["missing"]["compile_s"]
    assert read(store, unit[1], "effective.json")["isolation"]["compile_s"] > 0


@pytest.mark.slow
def test_a_graph_serves_runs_that_differ_in_how_tokens_are_chosen(plan: Callable[..., Plan], store: Store) -> None:
    """Each cache has its own graph, which the drawn tokens' run finds in memory; both ways give the same tokens."""
    other = Store.open(store.root.with_name("isolated"), write=True)
    grid = ("decoding=greedy,sampling", "cache=static,dynamic", "compiler=inductor", "compiler.dynamic=true")
    shared = measured(plan, store, *grid, "quality=off", "resources.isolation=shared_load")
    isolated = measured(plan, other, *grid, "quality=off")
    assert [task.name for task in shared] == [task.name for task in isolated]
    starts, graph_of = [], []
    for mine, theirs in zip(shared, isolated, strict=True):
        assert read(store, mine, "text.json")["tokens"] == read(other, theirs, "text.json")["tokens"], mine.name
        effective = read(store, mine, "effective.json")
        starts.append(effective["compiler"]["compile_cache"])
        graph_of.append(effective["isolation"].get("graph_of"))
        assert read(other, theirs, "effective.json")["compiler"]["compile_cache"] != "held"
        assert (effective["compiler"]["graphs"] == 0) == (starts[-1] == "held")
    assert [task.config.cache.kind for task in shared] == ["dynamic", "dynamic", "static", "static"]
    # The node may have the graphs from other tests.
    assert [start == "held" for start in starts] == [False, True, False, True]
    assert graph_of == [None, shared[0].run_id, None, shared[2].run_id]
    cost = store.result(shared[1].run_id, shared[1].env_id).cost  # type: ignore[union-attr]
    assert cost["compile_cold_s"] > cost["phases_s"]["compile"] > 0.0
    assert len({read(store, task, "process.json")["pid"] for task in shared}) == 1


@pytest.fixture
def model(plan: Callable[..., Plan]) -> Any:
    config = plan().cells[0].config
    assert config is not None
    return load(config.model, config.engine).model


def test_what_engines_do_to_a_model_is_undone(plan: Callable[..., Plan], model: Any) -> None:
    before = Snapshot.of(model)
    attention, generation = model.config._attn_implementation, model.generation_config
    for cache in ("static_int8", "sliding"):
        config = plan("engine=loop", f"cache={cache}").cells[0].config
        assert config is not None
        make(config, model, slots=32).generate([1, 2, 3], 4, seed=0)
        assert model.config._attn_implementation != attention
        before.restore()
        assert model.config._attn_implementation == attention
    config = plan("compiler=inductor").cells[0].config
    assert config is not None
    make(config, model, slots=32).compile()
    model.lm_head.forward = lambda inputs: inputs
    model.model.layers[0].register_buffer("more", torch.zeros(1))
    model.model.layers[0].mlp = torch.nn.Identity()
    before.restore()
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert "more" not in dict(model.model.layers[0].named_buffers())
    assert model.generation_config is generation
    assert before.difference() == ""
    assert model(torch.tensor([[1, 2]])).logits.shape[1] == 2


def test_a_weight_that_was_written_to_is_found(model: Any) -> None:
    before = Snapshot.of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before.restore()
    assert before.difference().endswith("was written to")


def test_a_layer_that_became_another_is_found(model: Any) -> None:
    before = Snapshot.of(model)

    class Other(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Other
    assert before.difference() == "lm_head has become a Other"


def test_settings_of_the_process_are_put_back() -> None:
    before = shared_model.Settings.take()
    # What they are at the moment: torchao sets them for the process, in whichever test was first to use it.
    limit, tuning = torch._dynamo.config.recompile_limit, torch._inductor.config.coordinate_descent_tuning
    torch._dynamo.config.recompile_limit = limit + 1
    torch._inductor.config.coordinate_descent_tuning = not tuning
    before.restore()
    assert torch._dynamo.config.recompile_limit == limit
    assert torch._inductor.config.coordinate_descent_tuning == tuning
    torch._dynamo.utils.counters["stats"]["unique_graphs"] += 3
    shared_model.forget_counts()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert Shared().put_back() == ""


@pytest.mark.parametrize(
    ("reset", "left", "told"),
    [(True, 0, True), (True, 5, True), (True, 50, False), (True, None, False), (False, 0, False)],
)
def test_a_peak_that_may_be_another_runs_is_not_told(tmp_path: Path, reset: bool, left: int | None, told: bool) -> None:
    from lbi import measuring

    peak, record = PeakMemory("cpu"), Record(tmp_path, Phases(tmp_path))
    peak.bytes, peak.reset = 1000, reset
    record.effective["isolation"] = {"after": ["a"], "left_bytes": left}
    measuring._note_memory(peak, record)
    assert record.metrics["peak_memory_bytes"] == (1000.0 if told else None)
    assert ("peak_memory_bytes" in record.missing) is not told
    assert record.effective["isolation"]["peak_with_left_bytes"] == 1000


def test_an_estimate_counts_one_load_a_group(plan: Callable[..., Plan]) -> None:
    def seconds(how: str) -> list[float]:
        cells = plan("decoding=greedy,sampling", f"resources.isolation={how}").cells
        model = CostModel([("env", known(cells[0].config, shared)) for shared in (False, True)])
        paid = model.paid()
        return [round(model.seconds(cell.config, "env", paid)[0], 3) for cell in cells if cell.config]

    alone, shared = seconds("process"), seconds("shared_load")
    assert shared[1] == pytest.approx(alone[1] - 30.0)


def known(config: Any, shared: bool) -> dict[str, Any]:
    """A run's cost: what used another's model must not teach that a load takes nothing."""
    from lbi.cost_keys import Kinds

    phases = {"measure": 4.0, "warm up": 1.0, **({} if shared else {"load": 10.0, "quantize": 20.0})}
    return {"phases_s": phases, "kind": Kinds().of(config), **({"shared_from": "a"} if shared else {})}


def one(speed: float, **changes: Any) -> Found:
    values: dict[str, Any] = {
        "name": "cell", "run_id": "b", "env_id": "e", "status": "ok", "after": ("a",), "kld": 0.1, "tokens": (1, 2),
        "speeds": dict.fromkeys(isolation_ab.SPEEDS, speed), "seconds": 1.0,
    }  # fmt: skip
    return Found(**values | changes)


@pytest.mark.parametrize(
    ("shared", "agrees"),
    [
        ([one(100.0 + step) for step in range(6)], True),
        ([one(90.0 + step) for step in range(6)], False),
        ([one(80.0 + 8 * step) for step in range(6)], None),
        ([one(100.0, tokens=(1, 3))] * 6, False),
        ([one(100.0, kld=0.2)] * 6, False),
        ([one(100.0, status="oom")] * 6, False),
    ],
)
def test_the_benchmark_refuses_what_differs_beyond_noise(shared: list[Found], agrees: bool | None) -> None:
    found = judge([one(100.0 + step) for step in range(6)], shared)
    assert found.agrees is agrees, found.why
    pairs = isolation_ab.pairs([found])
    assert [(pair.before, pair.run, pair.agrees) for pair in pairs] == ([] if agrees is None else [("a", "b", agrees)])
