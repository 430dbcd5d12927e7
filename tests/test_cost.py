"""What a run cost is measured, kept, summed up and learnt from; a mechanism's saving is what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbi.account import Account
from lbi.children import Started
from lbi.collect import rows
from lbi.cost import OWN, PHASES, SHARED, summed
from lbi.cost_keys import Kinds
from lbi.cost_model import PAID_BY_THE_FIRST, PRIOR_S, CostModel
from lbi.files import read_json, write_json
from lbi.graph_key import held_key
from lbi.plan import Plan
from lbi.report import cost_section
from lbi.schedule import Durations, estimate, make_units
from lbi.spending import Saving, spending
from lbi.store import SCHEMA, Store
from lbi.sweep_folder import write_plan
from lbi.worker import Task

MakePlan = Callable[..., Plan]


def tasks_of(plan: Plan) -> list[Task]:
    return [task for unit in make_units(plan.cells) for task in unit.tasks]


def cost_of_run(task: Task, **changes: Any) -> dict[str, Any]:
    """What a run's account says, with round numbers."""
    spent = {"start": 0.1, "load": 2.0, "quantize": 1.0, "warm up": 4.0, "measure": 10.0, "quality": 6.0, "other": 0.5}
    phases = {**spent, **changes.pop("phases_s", {})}
    facts = {"forked": True, "server_import_s": 5.0, "new_server": False, "reference": "kept", "quality": OWN}
    facts |= {"lane": "here 0", "device": "cpu", "gpus": 0, "samples": task.config.measure.repetitions}
    phases = {name: seconds for name, seconds in phases.items() if seconds is not None}
    return {"phases_s": phases, **facts, "kind": Kinds().of(task.config), **changes}


def publish(store: Store, task: Task, cost: dict[str, Any] | None, seconds: float | None = None) -> None:
    attempt = store.claim(task.run_id, task.env_id, {})
    write_json(attempt.folder / "metrics.json", {"schema": SCHEMA, "metrics": {"decode_tok_s": 1.0}, "missing": {}})
    took = seconds if seconds is not None else sum(cost["phases_s"].values()) if cost else 1.0
    store.publish(attempt, "ok", "", took, cost)


def test_the_parts_of_a_run_add_up_to_its_seconds() -> None:
    found = summed({"load": 1.0, "choose": 2.0, "quantize": 3.0, "audit": 0.5, "no such step": 4.0}, total=20.0)
    assert found == {"load": 1.0, "quantize": 5.5, "other": 13.5}
    assert summed({"load": 3.0}, total=2.5) == {"load": 3.0}


def test_every_step_of_a_run_belongs_to_a_phase() -> None:
    """A step that is added without a phase would be told as `other`."""
    import re

    folder = Path(__file__).parent.parent / "lbi"
    named = {
        step for file in folder.glob("*.py") for step in re.findall(r"with phases\(\"([^\"]+)\"", file.read_text())
    }
    assert "measure" in named
    assert named | {"compile", "warm up"} <= {step for steps in PHASES.values() for step in steps}


def test_an_account_joins_what_the_child_said_with_what_the_worker_timed(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = tasks_of(plan())
    said = {"status": "ok", "reason": "", "phases_s": {"load": 1.0}, "cost": {"cpu_s": 3.0, "compile": "warm"}}
    write_json(tmp_path / "verdict.json", {"schema": SCHEMA, **said})
    account = Account()
    account.seconds["start"] = 2.0
    account.note_started(Started(None, "forked", 5.0, True))  # type: ignore[arg-type]
    made = tmp_path / "logits-1"
    made.mkdir()
    account.note_reference(7.0, [made, tmp_path / "never-made"])
    account.note_started(Started(None, "forked", 5.0, False))  # type: ignore[arg-type]
    cost = account.cost(task, tmp_path, 10.0, "here 0")
    assert cost["phases_s"] == {"start": 2.0, "reference": 5.0, "load": 1.0, "other": 2.0}
    assert (cost["compile"], cost["cpu_s"], cost["reference"]) == ("warm", 3.0, "computed")
    # The server was begun for the reference's process: the run has paid for its imports.
    assert cost["new_server"] is True
    assert (read_json(made / "cost.json") or {})["seconds"] == 5.0
    later = Account()
    later.note_kept([made, tmp_path / "unknown"])
    assert (later.facts["reference"], later.facts["reference_s"]) == ("kept", 5.0)


def test_a_killed_run_has_its_time_told_too(plan: MakePlan, tmp_path: Path) -> None:
    (task,) = tasks_of(plan())
    assert Account().cost(task, tmp_path, 4.0, "here 0")["phases_s"] == {"other": 4.0}


def sweep_of(store: Store, made: Plan, planned: float = 0.0) -> list[dict[str, Any]]:
    header = {"command": "lbi", "planned": planned, "baseline": None, "max_kld": 0.05, "notes": {}, "problems": []}
    write_plan(store, "tried", made, header)
    return rows(store, "tried")


def test_savings_are_what_was_recorded(plan: MakePlan, store: Store) -> None:
    made = plan("workload.new_tokens=8,9,10,11")
    first, second, third, fourth = tasks_of(made)
    publish(store, first, cost_of_run(first, new_server=True, reference="computed", phases_s={"start": 5.5}))
    shared = {"quality": SHARED, "quality_pass_s": 6.0, "phases_s": {"quality": 0.5}, "reference_s": 3.0}
    publish(store, second, cost_of_run(second, **shared))
    warm = {"compile": "warm", "compile_cold_s": 40.0, "phases_s": {"compile": 5.0, "warm up": None}}
    publish(store, third, cost_of_run(third, **warm))
    publish(store, fourth, None)
    table = sweep_of(store, made)
    found = spending(table, planned=0.0)
    assert (found.cells, found.untold, found.earlier) == (3, 1, 0)
    assert sum(phase.seconds for phase in found.phases) == pytest.approx(found.seconds)
    assert {saving.what: (saving.cells, saving.seconds, saving.unknown) for saving in found.savings} == {
        "imports forked": (2, 10.0, 0),
        "quality passes shared": (1, 5.5, 0),
        # The third run's reference has no seconds: it is not guessed to be the second's.
        "references kept": (1, 3.0, 1),
        "compiles found in a cache": (1, 35.0, 0),
    }
    assert spending(table, planned=4e9).savings[-1] == Saving(
        "results reused", "what a result took, for each that was there before the plan", 4, found.seconds + 1.0, 0
    )


def test_the_report_and_the_terminal_say_where_the_time_went(plan: MakePlan, store: Store) -> None:
    made = plan()
    (task,) = tasks_of(made)
    publish(store, task, cost_of_run(task, device="cuda", gpus=1, cpu_s=12.0, phases_s={"measure": 3600.0}))
    table = sweep_of(store, made)
    html = cost_section.section(table, {"planned": 0.0})
    (phase,) = [line for line in html.split("<tr>") if line.startswith('<th scope="row">measure')]
    assert "<td>60.0 min</td><td>100%</td><td>1</td><td>1.000</td>" in phase
    (total, spared) = cost_section.lines(table, {"planned": 0.0})
    assert "1.004 GPU hours" in total
    assert "imports forked 5.00 s 1 cells" in spared
    assert cost_section.lines([row | {"cost": {}} for row in table], {"planned": 0.0}) == []


def test_a_graph_that_an_earlier_cell_compiles_is_warm_for_the_next(plan: MakePlan) -> None:
    made = plan("engine=hf", "cache=static", "compiler=inductor", "decoding=greedy,sampling", "quality=off")
    greedy, sampling = tasks_of(made)
    spent = {"quality": None, "warm up": None}
    cold = cost_of_run(greedy, compile="cold", phases_s={**spent, "compile": 40.0})
    warm = cost_of_run(sampling, compile="warm", phases_s={**spent, "compile": 6.0})
    del cold["quality"], warm["quality"]
    model = CostModel([("elsewhere", cold), ("elsewhere", warm)])
    paid = model.paid()
    (first, guess), (second, _) = (model.seconds(task.config, task.env_id, paid) for task in (greedy, sampling))
    assert not guess
    assert first - second == pytest.approx(34.0 + 0.0, abs=0.2)
    here = CostModel([(greedy.env_id, cold), (greedy.env_id, warm)])
    assert here.seconds(greedy.config, greedy.env_id, here.paid())[0] == pytest.approx(second, abs=0.2)


def test_a_graph_in_memory_is_learnt_and_spared_apart_from_one_in_a_cache(plan: MakePlan, store: Store) -> None:
    grid = ("engine=hf", "cache=static", "compiler=inductor", "quality=off", "resources.isolation=shared_load")
    made = plan(*grid, "decoding=greedy,sampling")
    greedy, sampling = tasks_of(made)
    spent = {"quality": None, "warm up": None}
    shared = {"shared_from": greedy.run_id, "compile_cold_s": 40.0}
    cold = cost_of_run(greedy, compile="cold", phases_s={**spent, "compile": 40.0})
    held = cost_of_run(sampling, compile="held", **shared, phases_s={**spent, "compile": 2.0})
    del cold["quality"], held["quality"]
    publish(store, greedy, cold)
    publish(store, sampling, held)
    (saving,) = [one for one in spending(sweep_of(store, made), 0.0).savings if one.what.startswith("compiles")]
    assert (saving.cells, saving.seconds) == (1, 38.0)
    model = CostModel([("elsewhere", cold), ("elsewhere", held)])
    paid = model.paid()
    first, second = (model.seconds(task.config, task.env_id, paid)[0] for task in (greedy, sampling))
    # The second neither compiles nor loads, quantizes or imports.
    assert first - second == pytest.approx(
        38.0 + sum(cold["phases_s"].get(part, 0.0) for part in PAID_BY_THE_FIRST), abs=1.0
    )
    alone = plan(*grid[:-1], "decoding=greedy,sampling")
    paid = model.paid()
    again = [model.seconds(task.config, task.env_id, paid)[0] for task in tasks_of(alone)]
    assert again[1] > second + 30.0


def test_runs_of_one_graph_follow_each_other_in_their_process(plan: MakePlan) -> None:
    grid = ("engine=hf", "decoding=greedy,sampling", "cache=static,dynamic", "resources.isolation=shared_load")
    compiled = plan(*grid, "compiler=inductor")
    kinds = [(task.config.cache.kind, task.config.decoding.kind) for task in tasks_of(compiled)]
    assert kinds == [(cache, how) for cache in ("dynamic", "static") for how in ("greedy", "sampling")]
    keys = [held_key(task.config) for task in tasks_of(compiled)]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize(
    "override",
    [
        "compiler=eager",
        "compiler.prefill=true",
        "compiler.mode=reduce-overhead",
        "+compiler.options={triton: {cudagraphs: true}}",
        "resources.compile_cache=off",
        "engine=loop",
    ],
)
def test_a_graph_that_is_not_the_whole_of_what_a_process_holds_is_not_held(plan: MakePlan, override: str) -> None:
    grid = ("engine=hf", "compiler=inductor", "cache=static")
    (plain,) = tasks_of(plan(*grid))
    assert held_key(plain.config) is not None
    cells = [cell for cell in plan(*grid, override).cells if cell.config is not None]
    assert [held_key(cell.config) for cell in cells if cell.config is not None] == [None]


@pytest.mark.parametrize(
    "override", ["workload.new_tokens=9", "workload.batch=2", "cache=dynamic", "quantizer=int8_wo"]
)
def test_a_run_with_other_shapes_or_weights_holds_another_graph(plan: MakePlan, override: str) -> None:
    grid = ("engine=hf", "compiler=inductor", "cache=static")
    found = [held_key(cell.config) for one in (grid, (*grid, override)) for cell in plan(*one).cells if cell.config]
    assert len(set(found)) == 2


def test_what_was_compiled_ahead_is_a_cold_compile_and_not_spared(plan: MakePlan, store: Store) -> None:
    made = plan("engine=hf", "cache=static", "compiler=inductor", "decoding=greedy,sampling", "quality=off")
    greedy, sampling = tasks_of(made)
    spent = {"quality": None, "warm up": None}
    given = {"compile": "warm", "compile_cold_s": 60.0}
    first = cost_of_run(greedy, **given, phases_s={**spent, "compile ahead": 30.0, "compile": 6.0})
    second = cost_of_run(sampling, **given, phases_s={**spent, "compile": 6.0})
    del first["quality"], second["quality"]
    publish(store, greedy, first)
    publish(store, sampling, second)
    (saving,) = [one for one in spending(sweep_of(store, made), 0.0).savings if one.what.startswith("compiles")]
    assert (saving.cells, saving.seconds) == (2, (60.0 - 36.0) + (60.0 - 6.0))
    model = CostModel([("elsewhere", first), ("elsewhere", second)])
    paid = model.paid()
    cold, warm = (model.seconds(task.config, task.env_id, paid)[0] for task in (greedy, sampling))
    assert cold - warm == pytest.approx(30.0, abs=0.2)


def test_an_added_quantizer_is_estimated_by_its_like_and_the_rest_by_itself(plan: MakePlan, store: Store) -> None:
    known = tasks_of(plan("quantizer=none,int8_wo"))
    for task in known:
        publish(store, task, cost_of_run(task))
    cells = plan("quantizer=none,int8_wo,hqq4", "measure.repetitions=10").cells
    found = estimate(make_units(cells), store)
    assert (found.runs, found.guessed) == (3, 0)
    # Twice the samples take 20 s; a pass is for the new quantizer alone; the rest is as before.
    once = 2.0 + 1.0 + 4.0 + 20.0 + 0.5
    assert found.seconds == pytest.approx(3 * once + 6.0 + 0.1, abs=0.5)


def test_without_history_it_is_a_guess_and_an_unreadable_kind_teaches_nothing(plan: MakePlan, store: Store) -> None:
    (task,) = tasks_of(plan("cache=static", "compiler=inductor"))
    publish(store, task, cost_of_run(task, kind={"device": "cpu"}))
    assert Durations(store).of([task]) == [(PRIOR_S["cpu", "inductor"], True)]


def test_an_unknown_compile_is_guessed_beside_what_is_known(plan: MakePlan, store: Store) -> None:
    (plain,) = tasks_of(plan("cache=static"))
    publish(store, plain, cost_of_run(plain))
    (task,) = tasks_of(plan("cache=static", "compiler=inductor"))
    ((seconds, guess),) = Durations(store).of([task])
    assert guess
    assert seconds > PRIOR_S["cpu", "inductor"] - PRIOR_S["cpu", "eager"] + 10.0


def test_what_depends_on_a_section_alone_is_worked_out_once(plan: MakePlan) -> None:
    """A plan of 10,000 cells has few sections; the second time none is read."""
    kinds = Kinds()
    made = plan("quantizer=none,int8_wo", "workload.new_tokens=8,9")
    first = [kinds.of(task.config) for task in tasks_of(made)]
    known = dict(kinds._known)
    assert [kinds.of(task.config) for task in tasks_of(made)] == first
    assert kinds._known == known
    changed = replace(tasks_of(made)[0].config, measure=replace(tasks_of(made)[0].config.measure, repetitions=9))
    assert kinds.of(changed) == {**first[0], "repetitions": 9}
