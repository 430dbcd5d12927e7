"""benchmarks/trace_check.py: a result's numbers held against each other, on results as a GPU's are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "trace_check.py"


@pytest.fixture(scope="module")
def trace_check() -> Any:
    spec = importlib.util.spec_from_file_location("trace_check", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules["trace_check"] = module
    spec.loader.exec_module(module)
    return module


TOKENS, STEP_S = 101, 0.02
"""A generation of 2 s after a first token at 0.1 s: 1.2 GB a token are 60 GB/s, 250 W make 5.198 J a token."""

TIMELINE = {
    "ms_per_token": 20.0,
    "kinds_ms": {"products": 15.0, "norms": 2.0},
    "waiting_ms": 2.5,
    "between_ms": 0.5,
    "idle_share": 0.15,
    "launches_per_token": 160.0,
    "in_graphs": 1.0,
}


def result(folder: Path, batch: int = 1, **changes: Any) -> dict[str, Any]:
    """Files of a result, and its row."""
    seconds = 0.1 + STEP_S * (TOKENS - 1)
    moments = [{"token": token, "seconds": 0.1 + STEP_S * token} for token in range(TOKENS)]
    good = [{**row, "repetition": 0, "void": ""} for row in [*moments, {"token": -1, "seconds": seconds}]]
    # A void sample, ten times as slow, must not count.
    void = [{**row, "seconds": 10 * row["seconds"], "repetition": 1, "void": "too hot"} for row in good]
    pq.write_table(pa.Table.from_pylist(good + void), folder / "samples.parquet")
    effective = {"timeline": TIMELINE, "peaks": {"read_bytes_per_s": 100e9}, "clocks": {"power_at_end_w": 250.0}}
    (folder / "effective.json").write_text(json.dumps({**effective, **changes.pop("effective", {})}))
    (folder / "config.json").write_text(json.dumps({"config": {"workload": {"batch": batch}}}))
    row = {"tpot_s": STEP_S, "bytes_per_token": 1.2e9, "mbu_measured": 0.6, "missing": {}}
    return row | {"energy_j_per_token": 250.0 * seconds / TOKENS / batch} | changes


def test_numbers_that_agree(trace_check: Any, tmp_path: Path) -> None:
    found = trace_check.check(result(tmp_path), tmp_path)
    assert (found.judged, found.out) == (3, 0)
    said = "\n".join(found.lines)
    assert "breakdown / profiled step: 1.000" in said
    assert "launches per token: 160.0, 100% of them by CUDA graphs" in said
    assert "60.0 GB/s of 100.0, MBU 60.0%" in said
    assert "250 W by the counter, 250 W by NVML" in said


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mbu_measured": 0.7}, "MBU recomputed / recorded: 0.857"),
        ({"energy_j_per_token": 4.0}, "energy / (power x time)"),
        ({"effective": {"timeline": {**TIMELINE, "between_ms": 3.0}}}, "breakdown / profiled step: 1.125"),
    ],
)
def test_a_number_that_does_not_fit_is_named(
    trace_check: Any, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    found = trace_check.check(result(tmp_path, **changes), tmp_path)
    assert found.out == 1
    assert any(what in line and "OUT OF" in line for line in found.lines)


def test_a_batch_shares_time_bytes_and_energy(trace_check: Any, tmp_path: Path) -> None:
    row = result(tmp_path, batch=4, bytes_per_token=0.3e9)
    assert trace_check.check(row, tmp_path).out == 0


def test_what_is_missing_is_said(trace_check: Any, tmp_path: Path) -> None:
    row = result(tmp_path, energy_j_per_token=None, effective={"timeline": {}, "peaks": {}})
    row["missing"] = {"energy_j_per_token": "no counter here"}
    found = trace_check.check(row, tmp_path)
    assert found.judged == 0
    assert [line.split(":")[0] for line in found.lines] == ["no breakdown", "no MBU", "no energy"]
    assert "no counter here" in found.lines[2]
