"""Bytes per token before anything runs are those that a run then finds in its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import prediction, roofline, steps
from lbi.model_files import inspect
from lbi.models import load
from lbi.plan import Plan
from lbi.prediction import Bound
from lbi.process import Phases
from lbi.record import Record

MIX = "quantizer=mix quantizer.mix={down_proj:int8_wo,default:int4_wo} quantizer.skip=[k_proj]"


@pytest.mark.parametrize(
    "overrides",
    [
        "quantizer=none", "quantizer=int8_wo", "quantizer=int4_wo quantizer.group_size=64", "quantizer=hqq4",
        "quantizer=native_w4", "quantizer=int8_wo quantizer.lm_head=int8 quantizer.embeddings=int8", MIX,
        "quantizer=none model.arch.tie_word_embeddings=true", "quantizer=int8_wo model.dtype=float32",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_bytes_are_those_that_a_run_finds(plan: Callable[..., Plan], tmp_path: Path, overrides: str) -> None:
    config = plan(*overrides.split(), "workload.prompt_tokens=20", "workload.new_tokens=12").cells[0].config
    assert config is not None
    found = prediction.bound("it", config, inspect(config.model), None)
    phases = Phases(tmp_path)
    with torch.no_grad():
        model = load(config.model, config.engine).model
        layers = steps.quantize(config, model, [1, 2, 3], tmp_path / "tuning.json", Record(tmp_path, phases), phases)
        slot = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 32 * model.dtype.itemsize
        assert found.bytes_per_token == pytest.approx(roofline.bytes_per_step(model, layers, slot * 26), rel=1e-3)


def test_what_cannot_be_known_says_why(plan: Callable[..., Plan]) -> None:
    def of(*overrides: str) -> Bound:
        config: Any = plan(*overrides, "sweep.prune=false").cells[0].config
        return prediction.bound("it", config, inspect(config.model), None)

    assert of("quantizer=autoquant", "quantizer.candidates=[int8_wo]", "quantizer.max_error=0.1").why
    assert "prompt's length" in of("quantizer=none", "workload.prompt_tokens=null").why
    config: Any = plan("quantizer=none").cells[0].config
    refused = prediction.bound("it", config, inspect(config.model), "needs a GPU")
    assert (refused.bytes_per_token, refused.why) == (None, "needs a GPU")


def test_the_table_has_the_speed_that_each_bandwidth_allows() -> None:
    bounds = [Bound("none", 200e6), Bound("int8_wo", 100e6), Bound("fp8_da", None, "needs a GPU")]
    lines = list(prediction.table(bounds, {"measured": 10e9, "data sheet": 20e9}))
    assert lines[1].split() == ["int8_wo", "100.00", "100", "tok/s", "200", "tok/s"]
    assert lines[2].split() == ["none", "200.00", "50", "tok/s", "100", "tok/s"]
    assert lines[-1].split() == ["fp8_da", "needs", "a", "GPU"]
