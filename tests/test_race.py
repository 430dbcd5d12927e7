"""A cell that a result of its sweep beats on every axis beyond noise is given up early, and says so; no other is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_steps import FakeEngine

from lbi import measuring, race, scoring
from lbi.children import Stop
from lbi.collect import rows
from lbi.config import LbiConfig
from lbi.files import write_json
from lbi.plan import Plan
from lbi.process import Phases
from lbi.race import Race, Rival, Standing
from lbi.record import Record
from lbi.schedule import make_units
from lbi.slots import Slot
from lbi.store import SCHEMA, Store
from lbi.sweep_folder import write_plan
from lbi.task_queue import TaskQueue
from lbi.typed import plain
from lbi.worker import Work, run_slot

OWN = Standing(kld=0.1, kld_se=0.01, held_bytes=100.0)

RIVAL = {"run_id": "r", "slowest": 50.0, "kld": 0.01, "kld_se": 0.001, "held_bytes": 90.0}


@pytest.mark.parametrize(
    ("changes", "own", "fastest", "beaten"),
    [
        ({}, OWN, 40.0, True),
        ({}, OWN, 51.0, False),
        ({"held_bytes": 100.0}, OWN, 40.0, False),
        ({"kld": 0.085}, OWN, 40.0, False),
        ({"kld_se": 0.05}, OWN, 40.0, False),
        ({"kld": 0.0, "kld_se": 0.0}, Standing(9e-7, 0.0, 100.0), 40.0, False),
    ],
)
def test_beaten_is_what_is_behind_on_every_axis_beyond_noise(
    changes: dict[str, Any], own: Standing, fastest: float, beaten: bool
) -> None:
    assert Rival(**RIVAL | changes).beats(own, fastest) is beaten


def test_a_few_samples_come_first_and_the_best_rival_is_named() -> None:
    better = Rival(**RIVAL | {"run_id": "s", "kld": 0.001})
    found = Race(OWN, [Rival(**RIVAL), better])
    assert found.lost_to([30.0, 31.0]) is None
    assert found.lost_to([30.0, 31.0, 32.0]) == better
    assert found.lost_to([30.0, 31.0, 52.0]) is None
    assert Race(OWN, []).lost_to([1.0] * 9) is None


@pytest.fixture
def config(plan: Callable[..., Plan]) -> Callable[..., LbiConfig]:
    def made(*overrides: str) -> LbiConfig:
        (cell,) = plan("workload.new_tokens=4", "measure.void_budget=2", *overrides).cells
        assert cell.config is not None
        return cell.config

    return made


def measured(config: LbiConfig, folder: Path, found: Race | None, recompile_in: set[int] = frozenset()) -> Record:  # type: ignore[assignment]
    """Samples of 1, 1/2, 1/3, ... tok/s in turn."""
    record = Record(folder, Phases(folder))
    record.effective["race"] = {"rivals": 1}
    measuring.measure(config, FakeEngine(set(recompile_in)), [1, 2], record, record.phases, found)
    return record


def test_a_beaten_cell_is_not_repeated_and_says_so(config: Callable[..., LbiConfig], tmp_path: Path) -> None:
    found = Race(OWN, [Rival(**RIVAL)])
    record = measured(config("measure.repetitions=8"), tmp_path, found)
    assert record.metrics["repetitions"] == 3
    assert record.metrics["interval_coverage"] == 0.75
    assert record.effective["race"] == {"rivals": 1, "repetitions": 3, "raced_out_by": "r"}
    assert record.cost == {"samples": 3, "raced_out_by": "r", "repetitions": 3}


def test_a_void_sample_is_none_of_the_three(config: Callable[..., LbiConfig], tmp_path: Path) -> None:
    record = measured(config("measure.repetitions=8"), tmp_path, Race(OWN, [Rival(**RIVAL)]), {1})
    assert (record.metrics["repetitions"], record.metrics["void_samples"]) == (3, 1)


@pytest.mark.parametrize("found", [None, Race(OWN, [Rival(**RIVAL | {"slowest": 0.5})]), Race(OWN, [])])
def test_a_cell_that_is_not_beaten_has_all_its_samples(
    config: Callable[..., LbiConfig], tmp_path: Path, found: Race | None
) -> None:
    record = measured(config("measure.repetitions=5"), tmp_path, found)
    assert record.metrics["repetitions"] == 5
    assert "raced_out_by" not in record.cost
    if found is not None:
        assert record.effective["race"] == {"rivals": 1, "repetitions": 5, "raced_out_by": None}


def test_fewer_samples_than_three_are_no_race(config: Callable[..., LbiConfig], tmp_path: Path) -> None:
    record = measured(config("measure.repetitions=2"), tmp_path, Race(OWN, [Rival(**RIVAL)]))
    assert record.metrics["repetitions"] == 2


def test_racing_is_another_measurement_and_not_racing_is_none(plan: Callable[..., Plan]) -> None:
    ids = [plan(*more).cells[0].run_id for more in ([], ["measure.race=false"], ["measure.race=true"])]
    assert ids[0] == ids[1] != ids[2]


def publish(store: Store, config: LbiConfig, run_id: str, metrics: Mapping[str, float], **cost: Any) -> None:
    attempt = store.claim(run_id, "env", {"config": plain(config)})
    write_json(attempt.folder / "metrics.json", {"schema": SCHEMA, "metrics": dict(metrics)})
    store.publish(attempt, "ok", "", 1.0, {"phases_s": {}, **cost})


GOOD = {"decode_tok_s_lo": 50.0, "mean_kld": 0.01, "mean_kld_se": 0.001, "weight_bytes": 80.0, "kv_bytes": 10.0}


def test_rivals_are_good_results_of_like_cells_of_the_sweep(plan: Callable[..., Plan], store: Store) -> None:
    found = plan("quantizer=none,int8_wo,hqq4,hqq3", "workload.new_tokens=4,5", "measure.race=true")
    write_plan(store, "s", found, {})
    cells = [(cell.config, cell.run_id) for cell in found.cells if cell.config]
    like = [(config, run_id) for config, run_id in cells if config.workload.new_tokens == 4]
    (own, own_id), (first, first_id), (second, second_id), (third, third_id) = like
    publish(store, first, first_id, GOOD)
    publish(store, second, second_id, {name: value for name, value in GOOD.items() if name != "mean_kld"})
    publish(store, third, third_id, GOOD, raced_out_by="x")
    other = next((config, run_id) for config, run_id in cells if config.workload.new_tokens == 5)
    publish(store, *other, GOOD)
    assert race.rivals(store, "s", own, own_id, "env") == [RIVAL | {"run_id": first_id}]
    assert race.rivals(store, "s", first, first_id, "env") == []
    assert race.rivals(store, "", own, own_id, "env") == []
    assert race.rivals(store, "s", own, own_id, "elsewhere") == []


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("quality=off",), "quality=off"),
        (("compiler=inductor", "compiler.prefill=true"), "compiler.prefill"),
        (("engine=fused", "cache=static"), "engine=fused"),
    ],
)
def test_what_cannot_race_says_why(
    config: Callable[..., LbiConfig], tmp_path: Path, overrides: tuple[str, ...], why: str
) -> None:
    record = Record(tmp_path, Phases(tmp_path))
    cell = config("measure.race=true", *overrides)
    assert race.enter(cell, {"rivals": []}, FakeEngine(set()), [1], record, record.phases) is None  # type: ignore[arg-type]
    assert record.effective["race"]["why_not"].startswith(why)


def test_the_own_quality_comes_first_and_another_warm_up_after_it(
    config: Callable[..., LbiConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, engine = Record(tmp_path, Phases(tmp_path)), FakeEngine(set())

    def score(*_: Any) -> None:
        assert engine.calls == 0
        record.metrics |= {"mean_kld": 0.1, "mean_kld_se": 0.01}

    monkeypatch.setattr(scoring, "score_quality", score)
    record.metrics |= {"weight_bytes": 90.0, "kv_bytes": 10.0}
    found = race.enter(config("measure.race=true"), {"rivals": [RIVAL]}, engine, [1], record, record.phases)  # type: ignore[arg-type]
    assert found == Race(OWN, [Rival(**RIVAL)])
    assert engine.calls == 1
    assert record.effective["race"].keys() == {"rivals", "left_bytes"}
    record.metrics.pop("mean_kld")
    monkeypatch.setattr(scoring, "score_quality", lambda *_: None)
    assert race.enter(config("measure.race=true"), {"rivals": []}, engine, [1], record, record.phases) is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_real_run_that_is_beaten_ends_early_with_the_same_quality(plan: Callable[..., Plan], store: Store) -> None:
    brief = ("quantizer=none,int8_wo", "workload.new_tokens=8", "tracker=none", "measure.repetitions=6")
    found = plan("measure.race=true", *brief)
    write_plan(store, "s", found, {})
    base, cell = (cell for cell in found.cells if cell.config)
    unit = [task for group in make_units(found.cells) for task in group.tasks]
    # In place of the baseline a result that no cell could reach: faster than light, without weights.
    impossible = {**GOOD, "decode_tok_s_lo": 1e12, "mean_kld": 0.0, "mean_kld_se": 0.0, "weight_bytes": 1.0}
    own = next(task for task in unit if task.run_id == cell.run_id)
    attempt = store.claim(base.run_id, own.env_id, {"config": plain(base.config)})
    write_json(attempt.folder / "metrics.json", {"schema": SCHEMA, "metrics": impossible})
    store.publish(attempt, "ok", "", 1.0)
    plain_unit = [task for group in make_units(plan(*brief).cells) for task in group.tasks]
    reference = next(task for task in plain_unit if task.config.quantizer.name == "int8_wo")
    run_slot(Work(TaskQueue([own, reference]), store, print, Stop(), time.time(), sweep="s"), Slot())
    ours, theirs = (store.result(task.run_id, task.env_id) for task in (own, reference))
    assert ours is not None
    assert theirs is not None
    assert (ours.reason, theirs.reason) == ("", "")
    mine, other = (json.loads((result.folder / "metrics.json").read_text())["metrics"] for result in (ours, theirs))
    assert (mine["repetitions"], other["repetitions"]) == (3, 6)
    assert mine["mean_kld"] == other["mean_kld"] > 1e-6
    assert mine["first_divergence"] == other["first_divergence"]
    row = next(row for row in rows(store, "s") if row["run_id"] == own.run_id)
    assert row["raced_out_by"] == base.run_id
    assert "raced out after 3 samples" in row["flags"]
