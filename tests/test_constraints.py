"""The table of what cannot be combined is up to date, and what it refuses does fail where a CPU can show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbi import constraints, environment, rules, run
from lbi.compilers import CompilerState
from lbi.process import Phases
from lbi.record import Record

ROOT = Path(__file__).parent.parent

ENDS = {"unsupported", "not_applied", "crash", "numerics"}
"""How a cell may end that a rule refuses; `oom` or a timeout would prove nothing."""

WIDE = 1.0
"""A lead of a logit that no rounding in float32 or bfloat16 turns, in nats: such a token is another text's."""


def test_every_rule_has_an_example_that_it_refuses() -> None:
    assert {rule.name for rule in rules.RULES} == set(constraints.EXAMPLES)
    for name in constraints.EXAMPLES:
        assert constraints.reason(name), name


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    if environment.gpus():
        pytest.skip("the page is made on a machine without a GPU")
    said = (ROOT / "docs" / "constraints.md").read_text()
    assert said == constraints.text(), "python -m lbi.constraints > docs/constraints.md"


TRIED = [name for name, example in constraints.EXAMPLES.items() if example.proof == constraints.TRIED]


@pytest.mark.by_hand
@pytest.mark.parametrize("name", TRIED)
def test_what_is_refused_fails_or_is_silently_wrong(name: str, tmp_path: Path) -> None:
    """When this fails the cell ran: the library has mended what the rule rests on, or it never was so."""
    status, record = outcome(constraints.EXAMPLES[name].overrides, tmp_path)
    found = record.effective.get("lossless", {})
    other_tokens = float(found.get("logit_gap", 0.0)) > WIDE
    assert status in ENDS or other_tokens, f"{name}: ended {status}; the rule says {constraints.reason(name)}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_that_keeps_the_wrong_rope_is_no_tie(dtype: str, tmp_path: Path) -> None:
    """Both plain ways differ there by more than ten, for one pass has the long factors from the first token on."""
    overrides = (*constraints.EXAMPLES["loop_needs_fixed_rope"].overrides, f"model.dtype={dtype}")
    assert outcome(overrides, tmp_path)[0] == "numerics"


@pytest.mark.by_hand
def test_what_no_rule_refuses_ends_with_a_number(tmp_path: Path) -> None:
    """The same way of trying, on cells that can run: the trials above do not fail for a reason of their own."""
    for overrides in ((), ("engine=loop", "cache=static"), ("engine=loop", "cache=sliding", "cache.window=16")):
        status, record = outcome(overrides, tmp_path)
        assert status == "ok"
        assert {row["repetition"] for row in record.samples if not row["void"]} == {0, 1}
        assert float(record.effective.get("lossless", {}).get("logit_gap", 0.0)) < WIDE


def outcome(overrides: tuple[str, ...], folder: Path) -> tuple[str, Record]:
    """How a run without rules ends, and what it found: the steps of lbi/run.py, in this process."""
    brief = ("quality=off", "tracker=none", "measure=brief", "measure.repetitions=2", "measure.void_budget=1")
    config = constraints.config_of((*overrides, *brief, "sweep.prune=false"), "cpu")
    request: dict[str, Any] = {
        "devices": str(folder),
        "quantized": str(folder / "quantized"),
        "env_id": "trial",
        "run_id": "trial",
        "device_name": "",
        "references": {kind: str(folder / kind) for kind in ("logits", "greedy", "quality")},
        "reference_problem": None,
    }
    record, before = Record(folder, Phases(folder)), CompilerState.take()
    try:
        run._run(config, request, record, record.phases)
    except Exception as error:
        return run._classify(error)[0], record
    finally:
        before.restore()
    return "ok", record
