"""The unquantized model is computed once for all cells, units and sweeps that would compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lbi import reference
from lbi.plan import Plan

STORE = Path("store")


@pytest.fixture
def folders(plan: Callable[..., Plan]) -> Callable[..., set[str]]:
    """Names of the folders of one kind that the cells of a grid use."""

    def of(kind: str, *grid: str, env_id: str = "env") -> set[str]:
        configs = [cell.config for cell in plan(*grid).cells]
        return {reference.folders(STORE, config, env_id)[kind].name for config in configs if config is not None}

    return of


def test_cells_of_one_model_and_text_share_the_logits(folders: Callable[..., set[str]]) -> None:
    first = folders("logits", "sweep.name=one")
    grid = ["quantizer=none,int8_wo,hqq4", "compiler=eager,inductor", "cache=dynamic,static", "engine=hf,loop"]
    assert folders("logits", *grid, "workload.new_tokens=8,9", "measure=quick,brief", "sweep.name=two") == first
    assert folders("logits", "resources.run_timeout_s=9", "store.quantized_gb=1") == first
    assert len(folders("greedy", *grid)) == 1
    assert len(folders("greedy", "workload.new_tokens=8,9")) == 2


@pytest.mark.parametrize(
    "other", ["model.seed=1", "model.dtype=float32", "quality.tokens=64", "quality.window=64", "engine.attention=eager"]
)
def test_what_changes_the_logits_has_its_own(folders: Callable[..., set[str]], other: str) -> None:
    assert not folders("logits", other) & folders("logits")


def test_other_versions_or_another_device_have_their_own(folders: Callable[..., set[str]]) -> None:
    assert not folders("logits", env_id="other") & folders("logits")
