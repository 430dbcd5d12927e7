"""Workloads: what a prompt is made of, how long it is, and what happens where a model has fewer positions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from lbi import steps
from lbi.errors import Unsupported
from lbi.long_text import rounds
from lbi.models import load
from lbi.plan import Plan
from lbi.prompts import fit_tokens, read_text
from lbi.verdicts import PRUNED, RUN

MakePlan = Callable[..., Plan]


def test_rounds_have_every_paragraph_once_and_no_two_of_one_order() -> None:
    names = [f"p{index}" for index in range(26)]
    made = rounds("\n\n".join(names), 12).split("\n\n")
    assert [part.split(". ")[0] for part in made] == [str(number) for number in range(1, 12 * 26 + 1)]
    orders = [tuple(part.split(". ")[1] for part in made[start : start + 26]) for start in range(0, len(made), 26)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len(set(orders)) == len(orders)
    # Neighbours differ as well: a round is not the last one, turned.
    pairs = [frozenset(pairwise(order)) for order in orders]
    assert len(set(pairs)) == len(pairs)
    assert rounds("only one", 3) == "1. only one\n\n2. only one\n\n3. only one"


def test_a_rounds_text_that_is_not_shipped_is_named() -> None:
    with pytest.raises(Unsupported, match=r"text:nope: there is no such text; there are: .*json_extract"):
        read_text("rounds:nope")


@pytest.mark.parametrize(
    ("workload", "tokens"),
    [("code_edit", 468), ("json_extract", 305), ("long_2k", 2048), ("long_8k", 8000), ("long_32k", 32000)],
)
def test_prompts_are_as_long_as_their_options_say(plan: MakePlan, workload: str, tokens: int) -> None:
    config = plan(f"workload={workload}", "sweep.prune=false", model="smollm2_135m").cells[0].config
    assert config is not None
    encode = encoder(config)
    text = encode(read_text(config.workload.prompt))
    prompt = fit_tokens(text, config.workload.prompt_tokens)
    assert len(prompt) == tokens
    assert len(text) >= tokens, "the prompt would repeat word for word"


_ENCODERS: dict[str, Any] = {}


def encoder(config: Any) -> Any:
    if config.model.name not in _ENCODERS:
        _ENCODERS[config.model.name] = load(config.model, config.engine).encode
    return _ENCODERS[config.model.name]


def test_a_model_with_fewer_positions_is_not_asked(plan: MakePlan) -> None:
    made = plan("workload=long_2k,long_8k,long_32k", model="smollm2_135m")
    assert [cell.verdict for cell in made.cells] == [RUN, RUN, PRUNED]
    assert (made.cells[2].rule, made.cells[2].reason) == (
        "fits_context",
        "32064 tokens do not fit the model's context of 8192",
    )


def test_a_prompt_of_its_own_length_is_counted_at_the_run(plan: MakePlan) -> None:
    cell, forced = (plan("workload=code_edit", f"sweep.prune={prune}").cells[0].config for prune in ("true", "false"))
    assert cell is not None
    assert forced is not None
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    steps.check_context(cell, model, 384)
    with pytest.raises(Unsupported, match=r"385 \+ 128 tokens do not fit the model's context of 512"):
        steps.check_context(cell, model, 385)
    steps.check_context(forced, model, 385)


@pytest.mark.parametrize("length", [10, 255, 300, 5000])
def test_a_prompt_may_be_longer_than_a_files_name(length: int) -> None:
    assert read_text("a" * length) == "a" * length
