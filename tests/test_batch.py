"""workload.batch: each sequence is what it would be alone, and no speed is taken for another."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop_engine import SHAPES

from lbi import identity
from lbi.config import LbiConfig
from lbi.engines import make
from lbi.errors import Unsupported
from lbi.models import load
from lbi.plan import Plan
from lbi.verdicts import PRUNED, RUN

MakePlan = Callable[..., Plan]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def config(plan: MakePlan, *overrides: str, arch: dict[str, Any] | None = None) -> LbiConfig:
    common = ["model.dtype=float32", "engine=loop", "cache=static", "sweep.prune=false"]
    found = plan(*common, *overrides).cells[0].config
    assert found is not None
    return replace(found, model=replace(found.model, arch=arch)) if arch else found


@pytest.mark.parametrize("name", ["gqa3-80", "gqa8-128-tied-llama3", "no-rope", "window"])
@pytest.mark.slow
def test_every_sequence_has_the_tokens_that_it_has_alone(plan: MakePlan, name: str) -> None:
    one, five = (config(plan, f"workload.batch={count}", arch=SHAPES[name]) for count in (1, 5))
    model = load(one.model, one.engine).model
    prompt = [(7 * index) % 300 for index in range(11)]
    wanted = make(one, model, slots=60).generate(prompt, 30, seed=0, inspect=True)
    engine = make(five, model, slots=60)
    for _ in range(2):
        found = engine.generate(prompt, 30, seed=0, inspect=True)
        assert found.batch == (wanted.tokens,) * 5
        assert found.tokens == wanted.tokens
        assert found.logits.shape == wanted.logits.shape
        assert float((found.logits - wanted.logits).abs().max() / wanted.logits.abs().max()) < 1e-4
        assert found.cache["bytes"] == 5 * wanted.cache["bytes"]
        assert found.timing.sequences == 5
    assert wanted.batch == ()


def test_sequences_do_not_see_each_other(plan: MakePlan) -> None:
    """Equal prompts could not show it, so here the first new token is another in each."""
    cell = config(plan, "workload.batch=4", arch=SHAPES["gqa3-80"])
    model = load(cell.model, cell.engine).model
    engine: Any = make(cell, model, slots=40)
    prompt, starts = [5, 6, 7, 8], [11, 12, 13, 14]
    buffers, steps = engine._buffers(), engine._ready({9})[9]
    engine._prefill(torch.tensor(prompt))
    buffers.token[:, 0] = torch.tensor(starts)
    steps()
    for row, start in enumerate(starts):
        text = [*prompt, start]
        for _ in range(9):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert buffers.tokens[row, len(prompt) + 1 : len(text)].tolist() == text[len(prompt) + 1 :]
    assert len({tuple(text) for text in buffers.tokens[:, 5:14].tolist()}) > 1


@pytest.mark.by_hand
def test_a_compiled_step_has_all_sequences(plan: MakePlan) -> None:
    one, three = (config(plan, f"workload.batch={count}", "compiler=inductor") for count in (1, 3))
    model = load(one.model, one.engine).model
    wanted = make(one, model, slots=40).generate([1, 2, 3], 12, seed=0).tokens
    engine = make(three, model, slots=40)
    engine.compile()
    assert engine.generate([1, 2, 3], 12, seed=0).batch == (wanted,) * 3


def test_a_batch_of_one_is_no_new_measurement(plan: MakePlan) -> None:
    loops = ["engine=loop", "cache=static"]
    made = plan(*loops, "workload.batch=1,2,8").cells
    assert [cell.verdict for cell in made] == [RUN] * 3
    assert len({cell.run_id for cell in made}) == 3
    first = made[0].config
    assert first is not None
    assert "batch" not in identity.canonical_workload(first.workload)
    assert made[0].run_id == plan(*loops).cells[0].run_id
    assert [cell.choices["workload"].partition(" ")[2] for cell in made] == ["", "batch=2", "batch=8"]
    assert [cell.name for cell in made] == [cell.choices["workload"] for cell in made]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["engine=hf"], "engine=hf decodes one sequence"),
        (["engine=fused", "cache=static"], "engine=fused decodes one sequence"),
        (["engine=loop", "cache=static", "decoding=sampling"], "sampling is for one sequence"),
        (["engine=loop", "cache=static", "decoding=speculative_lookup"], "speculative_lookup is for one sequence"),
        (["engine=loop", "cache=static_int8"], "cache=static_int8 holds one sequence"),
        (["engine=loop", "cache=sliding"], "cache=sliding holds one sequence"),
    ],
)
@pytest.mark.slow
def test_what_has_room_for_one_sequence_is_pruned_and_refused(plan: MakePlan, overrides: list[str], part: str) -> None:
    cell = plan(*overrides, "workload.batch=2").cells[0]
    assert (cell.verdict, cell.rule) == (PRUNED, "batch_has_room")
    assert part in cell.reason
    unruled = plan(*overrides, "workload.batch=2", "sweep.prune=false").cells[0].config
    assert unruled is not None
    with pytest.raises(Unsupported, match=part):
        make(unruled, None, slots=40)


@pytest.mark.slow
def test_a_run_tells_the_speed_of_one_from_that_of_all(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    ran = run_lbi(
        *["-m", "model=tiny_random", "model.dtype=float32", "engine=loop", "cache=static", "tracker=none"],
        *["workload.batch=1,4", "measure=brief", "workload.new_tokens=12", "sweep.name=batches", "quality=off"],
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    folder = tmp_path / "store" / "sweeps" / "batches"
    with (folder / "results.csv").open() as file:
        one, four = csv.DictReader(file)
    assert one["decode_tok_s_aggregate"] == ""
    assert float(four["decode_tok_s_aggregate"]) == pytest.approx(4 * float(four["decode_tok_s"]))
    assert float(four["kv_bytes"]) == 4 * float(one["kv_bytes"])
    assert float(one["bytes_per_token"]) / 4 < float(four["bytes_per_token"]) < float(one["bytes_per_token"])
    effective = json.loads((Path(four["folder"]) / "effective.json").read_text())
    assert effective["lossless"]["verdict"] == "equal"
    assert effective["batch"] == {"sequences": 4, "same_tokens_as_the_first": 4}
    assert ran.stdout.count("decode tok/s a sequence") == 1
    assert "tok/s all together" in ran.stdout
    page = (folder / "report.html").read_text()
    assert page.count("decode tok/s all together") >= 1
