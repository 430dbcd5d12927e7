"""A decode step replayed as a CUDA graph gives the tokens of the same step launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lbi.engines.hf import HfEngine
from lbi.models import load
from lbi.plan import Plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def tokens(plan: Callable[..., Plan], compiler: str, prompts: list[list[int]]) -> tuple[list[list[int]], Any]:
    """What the engine generates after each prompt, one after another, and its graph."""
    config = plan(f"compiler={compiler}", "cache=static", "engine.device=cuda").cells[0].config
    assert config is not None
    engine = HfEngine(load(config.model, config.engine).model, config, slots=64)
    if compiler != "eager":
        engine.compile()
    return [engine.generate(prompt, 20, seed=0).tokens for prompt in prompts], engine.graphed


@pytest.mark.parametrize("compiler", ["cudagraph", "cudagraph_linears"])
def test_a_replayed_step_gives_the_same_tokens(plan: Callable[..., Plan], compiler: str) -> None:
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5], [1, 2, 3]]
    wanted, _ = tokens(plan, "eager", prompts)
    found, graphed = tokens(plan, compiler, prompts)
    assert found == wanted
    assert graphed.graphs == 1
    assert graphed.replays == 3 * 19
