"""AutoQuant's choice: made once for cells that run their layers alike, never passed off as a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import environment, kept_choices, kept_weights
from lbi.config import LbiConfig
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.quantizers import assign, autoquant
from lbi.quantizers.options import PLAIN, option

SAMPLE = [1, 2, 3]


@pytest.fixture
def cell(plan: Callable[..., Plan]) -> LbiConfig:
    config = plan("quantizer=autoquant", "quantizer.candidates=[int8_pack,hqq4]", "engine.device=cpu").cells[0].config
    assert config is not None
    return config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the real choice was asked for, which is answered with int8 for the first layer of two."""
    asked: list[str] = []

    def choose(model: Any, config: LbiConfig, assignment: assign.Assignment, sample: list[int]) -> Any:
        asked.append(config.compiler.name)
        first, second = (name for name in assignment if name.endswith("down_proj"))
        chosen = {first: "int8_pack", second: "none"}
        evidence = {"by_shape": [{"by_layer": chosen, "timed_us": {"none": 2.0, "int8_pack": 1.0}}]}
        return assignment | {first: option("int8_pack"), second: PLAIN}, evidence

    monkeypatch.setattr(autoquant, "choose", choose)
    return asked


def chosen(cell: LbiConfig, folder: Path) -> tuple[assign.Assignment, dict[str, Any], Phases]:
    with torch.no_grad():
        model = load(cell.model, cell.engine).model
    phases = Phases(folder)
    assignment = assign.by_name(model, cell.quantizer)
    return *kept_choices.choose(cell, model, assignment, SAMPLE, folder / "quantized", phases), phases


def test_a_choice_is_made_once_and_says_whose_its_times_are(cell: LbiConfig, asked: list[str], tmp_path: Path) -> None:
    first, evidence, phases = chosen(cell, tmp_path)
    assert evidence["from"] == "this run"
    assert "choose" in phases.seconds
    other = replace(cell, workload=replace(cell.workload, new_tokens=9), cache=replace(cell.cache, kind="static"))
    second, kept, phases = chosen(other, tmp_path)
    assert len(asked) == 1
    assert second == first
    assert kept["from"].startswith("an earlier run (20")
    assert kept["choose_s"] == evidence["choose_s"]
    assert kept["by_shape"] == evidence["by_shape"]
    assert "choose" not in phases.seconds


def test_another_way_to_run_or_another_machine_chooses_anew(
    cell: LbiConfig, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(cell, tmp_path)
    versions, cores = environment.packages(), environment.cores()
    chosen(replace(cell, compiler=replace(cell.compiler, name="inductor", backend="inductor")), tmp_path)
    chosen(replace(cell, quantizer=replace(cell.quantizer, max_error=0.5)), tmp_path)
    chosen(replace(cell, model=replace(cell.model, seed=5)), tmp_path)
    for target, name, value in (
        (environment, "packages", {**versions, "torch": "0"}),
        (environment, "cores", cores + 1),
        (kept_weights, "sources", "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda value=value: value)
            chosen(cell, tmp_path)
    assert len(asked) == 7
    chosen(cell, tmp_path)
    assert len(asked) == 7


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 1, "evidence": {"by_shape": [1]}}'])
def test_a_damaged_choice_is_made_anew(content: str, cell: LbiConfig, asked: list[str], tmp_path: Path) -> None:
    chosen(cell, tmp_path)
    (file,) = (tmp_path / "choices").iterdir()
    file.write_text(content)
    assert chosen(cell, tmp_path)[1]["from"] == "this run"
    assert chosen(cell, tmp_path)[1]["from"].startswith("an earlier run")
    assert len(asked) == 2


def test_a_choice_that_cannot_be_kept_is_one_all_the_same(
    cell: LbiConfig, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_choices, "write_json", full)
    assert chosen(cell, tmp_path)[1]["from"] == "this run, not kept: No space left on device"
    off = replace(cell, store=replace(cell.store, quantized_gb=0.0))
    assert chosen(off, tmp_path)[1]["from"] == "this run, not kept: store.quantized_gb=0"
    assert len(asked) == 2
