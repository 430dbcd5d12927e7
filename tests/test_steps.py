"""What voids a sample, and what a measurement does about it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import gpu_clocks, gpu_processes, measuring
from lbi.engines import Generation
from lbi.errors import Disturbed, NotApplied
from lbi.metrics import Timing
from lbi.plan import Plan
from lbi.process import CpuWatch, Phases
from lbi.record import Record
from lbi.reuse import UNFINISHED


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
    return record, measuring.measure(config, FakeEngine(recompile_in), [1, 2], record, phases)


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


def clocks(reasons: int) -> dict[str, int]:
    return {"sm_mhz": 1980, "memory_mhz": 3201, "temperature_c": 45, "power_mw": 310000, "reasons": reasons}


def test_a_sample_of_a_gpu_that_is_too_hot_is_void(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two looks a sample: the second one's end is too hot, the third is at the power limit, which is no fault."""
    looks = iter(
        [
            {**clocks(0), "power_mw": 90000},
            clocks(1),
            clocks(0),
            {**clocks(0x20), "temperature_c": 91},
            clocks(4),
            clocks(4),
        ]
    )
    monkeypatch.setattr(gpu_clocks, "read", lambda: next(looks, clocks(0)))
    monkeypatch.setattr(measuring, "ClockWatch", lambda device: gpu_clocks.ClockWatch("cuda"))
    record, _ = measured(plan, tmp_path, set())
    assert record.metrics["void_samples"] == 1
    assert record.metrics["repetitions"] == 3
    reasons = {row["repetition"]: row["void"] for row in record.samples}
    assert reasons == {0: "", 1: "the GPU lowered its clocks: too hot", 2: "", 3: ""}
    assert record.effective["clocks"]["lowered"] == ["too hot", "power limit"]
    assert record.effective["clocks"]["temperature_c"] == 91
    assert record.effective["clocks"]["power_w"] == 310.0
    # Before the first sample the GPU was idle.
    assert record.effective["clocks"]["power_at_end_w"] == 310.0


def test_a_gpu_that_stays_too_hot_is_no_number_and_is_run_again(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_clocks, "read", lambda: clocks(0x40))
    monkeypatch.setattr(measuring, "ClockWatch", lambda device: gpu_clocks.ClockWatch("cuda"))
    with pytest.raises(Disturbed, match="5 of 5 samples were void: the GPU lowered its clocks: much too hot"):
        measured(plan, tmp_path, set())


def test_a_cpu_has_no_clocks_to_report(plan: Callable[..., Plan], tmp_path: Path) -> None:
    record, _ = measured(plan, tmp_path, set())
    assert "clocks" not in record.effective


@pytest.mark.parametrize(("target", "taken", "reached"), [(0.67, 3, True), (0.66, 7, False)])
def test_samples_are_taken_until_the_interval_is_narrow(
    plan: Callable[..., Plan], tmp_path: Path, target: float, taken: int, reached: bool
) -> None:
    """Calls take 1, 2, 3, ... s a token: half the interval is two thirds of the median after 3, and more later."""
    wide = ["measure.max_repetitions=7", f"measure.ci_target={target}"]
    record, _ = measured(plan, tmp_path, set(), *wide)
    assert record.metrics["repetitions"] == taken
    assert record.effective["ci_target"] == {"target": target, "reached": reached, "samples": taken}


def test_a_target_that_is_not_set_leaves_a_run_its_id(plan: Callable[..., Plan]) -> None:
    ids = {plan(*more).cells[0].run_id for more in ([], ["measure.ci_target=null"])}
    assert len(ids) == 1
    assert plan("measure.ci_target=0.01").cells[0].run_id not in ids


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Measure as on a GPU of which NVML gives, look by look, these processes beside this one."""

    def measure(
        plan: Callable[..., Plan], folder: Path, looks: list[set[int]], foreign: str, *recompile_in: int
    ) -> Record:
        answers = iter(looks)
        monkeypatch.setattr(gpu_processes, "current_gpu", lambda: "GPU-1")
        monkeypatch.setattr(gpu_processes, "listed", lambda uuid: {os.getpid(), *next(answers, set())})
        monkeypatch.setattr(measuring, "ForeignWatch", lambda device: gpu_processes.ForeignWatch("cuda"))
        return measured(plan, folder, set(recompile_in), f"resources.foreign={foreign}")[0]

    return measure


STRANGER = {2**22 + 1}
"""A number beyond Linux's largest, so that no process of ours has it."""


@pytest.mark.parametrize("foreign", ["void", "wait"])
def test_a_sample_beside_a_stranger_on_the_gpu_is_void(
    plan: Callable[..., Plan], tmp_path: Path, neighbours: Any, foreign: str
) -> None:
    # Two looks a sample: a stranger at the end of the first and at the start of the third.
    record = neighbours(plan, tmp_path, [set(), STRANGER, set(), set(), STRANGER], foreign)
    assert record.metrics["void_samples"] == 2
    assert record.metrics["repetitions"] == 3
    reasons = {row["repetition"]: row["void"] for row in record.samples}
    assert reasons == {0: "process 4194305 on the GPU", 1: "", 2: "process 4194305 on the GPU", 3: "", 4: ""}
    assert record.effective["foreign_gpu"] == "seen"


def test_a_stranger_that_is_to_be_ignored_is_recorded(
    plan: Callable[..., Plan], tmp_path: Path, neighbours: Any
) -> None:
    record = neighbours(plan, tmp_path, [STRANGER] * 6, "ignore")
    assert record.metrics["void_samples"] == 0
    assert record.effective["foreign_gpu_detail"] == "process 4194305"


def test_strangers_that_stay_are_no_result_and_recompiles_that_stay_are(
    plan: Callable[..., Plan], tmp_path: Path, neighbours: Any
) -> None:
    with pytest.raises(Disturbed, match="5 of 5 samples were void: process 4194305 on the GPU while timed") as caught:
        neighbours(plan, tmp_path, [STRANGER] * 10, "void")
    assert caught.value.status in UNFINISHED
    with pytest.raises(Disturbed):
        neighbours(plan, tmp_path, [STRANGER] * 2, "void", 1, 2)
    with pytest.raises(NotApplied, match="recompiled"):
        neighbours(plan, tmp_path, [STRANGER] * 2, "void", 1, 2, 3)


def test_what_is_not_measured_says_why(plan: Callable[..., Plan], tmp_path: Path) -> None:
    record, _ = measured(plan, tmp_path, set())
    assert record.missing["compile_s"] == "nothing is compiled"
    if record.metrics.get("energy_j_per_token") is None:
        assert record.missing["energy_j_per_token"]


OWN_STRETCH = """
from lbi.process import PeakMemory
block = bytearray(200 << 20)
block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
del block
with PeakMemory("cpu") as before:
    pass
with PeakMemory("cpu") as during:
    held = bytearray(100 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
print(during.bytes - before.bytes)
"""


def test_peak_memory_is_the_peak_of_its_own_stretch() -> None:
    """In a process of its own: what other tests have freed may be taken again without the resident set growing."""
    done = subprocess.run([sys.executable, "-c", OWN_STRETCH], capture_output=True, text=True, check=True)
    assert (90 << 20) < int(done.stdout) < (150 << 20)


def test_other_processes_cpu_time_is_noticed() -> None:
    burn = "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", burn])
    time.sleep(0.3)
    with CpuWatch() as watch:
        time.sleep(0.8)
    # Waited for after the watch is closed: what an ended child used would count as our own.
    other.wait()
    assert watch.foreign_share is not None
    # One process in all of the machine's time, at least a part of the while.
    assert watch.foreign_share > 0.2 / (os.cpu_count() or 1)
