"""The default model's real weights: that they are read right, and that quantizing them costs what it should.

Random weights cannot show a wrong rope permutation or a swapped scale: with them every figure stays plausible.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model

BRIEF = ["-m", "tracker=none", "measure=quick", "workload=custom", "workload.new_tokens=12"]
SHORT = ["quality.tokens=512", "quality.window=256"]


@pytest.mark.slow
def test_the_model_speaks_and_fewer_bits_cost_it_more(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    rows: dict[str, dict[str, str]] = {}
    for name, cells in {
        "eight": ["quantizer=none,int8_wo"],
        "three": ["quantizer=intx_sim", "quantizer.bits=3"],
    }.items():
        ran = run_lbi(*BRIEF, *SHORT, *cells, f"sweep.name={name}", timeout=300)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        with (tmp_path / "store" / "sweeps" / name / "results.csv").open() as file:
            rows |= {row["quantizer"]: row for row in csv.DictReader(file)}
    text = json.loads((Path(rows["none"]["folder"]) / "text.json").read_text())["text"]
    assert "Paris" in text
    assert 1 < float(rows["none"]["ppl"]) < 40
    assert float(rows["int8_wo"]["ppl_ratio"]) == pytest.approx(1, abs=0.01)
    assert 0 < float(rows["int8_wo"]["mean_kld"]) < 0.02
    assert float(rows["intx_sim"]["mean_kld"]) > 10 * float(rows["int8_wo"]["mean_kld"])
