"""What voids a sample, and what a measurement does about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import steps
from lbi.engines import Generation
from lbi.errors import NotApplied
from lbi.metrics import Timing
from lbi.plan import Plan
from lbi.process import CpuWatch, PeakMemory, Phases
from lbi.record import Record


class FakeEngine:
    """Generates on a synthetic clock; compiles something anew in the calls it is told to."""

    def __init__(self, recompile_in: set[int]) -> None:
        self.calls, self.recompile_in = 0, recompile_in

    def generate(self, prompt: list[int], new_tokens: int, *, seed: int, inspect: bool = False) -> Generation:
        if self.calls in self.recompile_in:
            # dynamo remembers what it has compiled, across tests too.
            torch._dynamo.reset()
            shape = self.calls + 2
            torch.compile(lambda x: x + shape, backend="eager", dynamic=False)(torch.ones(shape))
        self.calls += 1
        times = tuple(1.0 + self.calls * (index + 1) for index in range(new_tokens))
        return Generation([self.calls] * new_tokens, Timing(0.0, times, times[-1], len(prompt)))

    def forward(self, tokens: list[int]) -> Any:
        raise NotImplementedError


def measured(
    plan: Callable[..., Plan], folder: Path, recompile_in: set[int], *overrides: str
) -> tuple[Record, list[int]]:
    config = plan("measure.repetitions=3", "measure.void_budget=2", "workload.new_tokens=4", *overrides).cells[0].config
    assert config is not None
    phases = Phases(folder)
    record = Record(folder, phases)
    return record, steps.measure(config, FakeEngine(recompile_in), [1, 2], record, phases)


def test_a_sample_with_a_recompile_is_void_and_repeated(plan: Callable[..., Plan], tmp_path: Path) -> None:
    record, tokens = measured(plan, tmp_path, {0, 2})
    assert record.metrics["void_samples"] == 2
    assert record.metrics["repetitions"] == 3
    # Calls 2, 4 and 5 are valid, at 2, 4 and 5 s a token.
    assert record.metrics["tpot_s"] == 4.0
    assert tokens == [2, 2, 2, 2]
    assert {row["repetition"] for row in record.samples if row["void"]} == {0, 2}
    assert len(record.samples) == 5 * 5


def test_too_many_void_samples_are_no_number(plan: Callable[..., Plan], tmp_path: Path) -> None:
    with pytest.raises(NotApplied, match="3 of 5 samples were void: recompiled"):
        measured(plan, tmp_path, {0, 2, 3})


def test_what_is_not_measured_says_why(plan: Callable[..., Plan], tmp_path: Path) -> None:
    record, _ = measured(plan, tmp_path, set())
    assert record.missing["compile_s"] == "nothing is compiled"
    if record.metrics.get("energy_j_per_token") is None:
        assert record.missing["energy_j_per_token"]


def test_peak_memory_is_the_peak_of_its_own_stretch() -> None:
    block = bytearray(200 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    del block
    with PeakMemory("cpu") as before:
        pass
    with PeakMemory("cpu") as during:
        held = bytearray(100 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert before.bytes is not None
    assert during.bytes is not None
    assert (90 << 20) < during.bytes - before.bytes < (150 << 20)


def test_other_processes_cpu_time_is_noticed() -> None:
    import subprocess
    import sys
    import time

    burn = "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", burn])
    time.sleep(0.3)
    with CpuWatch() as watch:
        time.sleep(0.8)
    # Waited for after the watch is closed: what an ended child used would count as our own.
    other.wait()
    assert watch.foreign_share is not None
    assert watch.foreign_share > 0.1
