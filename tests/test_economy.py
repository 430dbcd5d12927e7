"""The benchmark of economies finds a table that is not the same; its timings are not tested."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import economy

ROW = {
    "run_id": "a",
    "name": "none eager",
    "status": "ok",
    "bits_per_weight": "16.0",
    "weight_bytes": "100.0",
    "bytes_per_token": "90.0",
    "kv_bytes": "5.0",
    "quantized_fraction": "0.0",
    "mean_kld": "0.01",
    "top1_agreement": "0.98",
    "ppl_ratio": "1.001",
    **{f"{name}{end}": value for name in economy.SPEEDS for end, value in (("", "10"), ("_lo", "9"), ("_hi", "11"))},
}


def found(**changes: str) -> list[tuple[str, bool]]:
    return [(one.metric, one.noise) for one in economy.differences([ROW], [ROW | changes])]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"status": "crash"}, [("status", False)]),
        ({"bits_per_weight": "15.0"}, [("bits_per_weight", False)]),
        ({"mean_kld": "0.0109"}, []),
        ({"mean_kld": "0.0111"}, [("mean_kld", False)]),
        ({"mean_kld": ""}, [("mean_kld", False)]),
        ({"decode_tok_s_lo": "10.9", "decode_tok_s_hi": "14"}, []),
        ({"decode_tok_s_lo": "11.1", "decode_tok_s_hi": "14"}, [("decode_tok_s", True)]),
        ({"decode_tok_s_lo": "7", "decode_tok_s_hi": "8.9"}, [("decode_tok_s", True)]),
        ({"decode_tok_s_lo": "", "decode_tok_s_hi": ""}, []),
        ({"run_id": "b"}, [("run_id", False)]),
    ],
)
def test_tables_are_held_against_each_other(changes: dict[str, str], expected: list[tuple[str, bool]]) -> None:
    assert found(**changes) == expected


def test_each_side_switches_what_its_name_says() -> None:
    sides = economy.sides()
    assert (next(iter(sides)), next(reversed(sides))) == ("all off", "all on")
    assert len(sides) == len(economy.MECHANISMS) + 2
    for mechanism in economy.MECHANISMS:
        assert set(mechanism.on) <= set(sides["all on"])
        assert set(mechanism.off) <= set(sides["all off"])
        alone = sides[f"only {mechanism.name}"]
        assert set(mechanism.on) <= set(alone)
        assert sum(knob in sides["all on"] for knob in alone) == len(mechanism.on)


def test_sides_are_added_up_by_phase_and_put_beside_the_first() -> None:
    def status(seconds: float, **phases: float) -> dict[str, object]:
        return {"seconds": seconds, "cost": {"phases_s": phases, "cpu_s": 2.0, "gpus": 1}}

    off = economy.sums([status(40.0, compile=30.0, load=10.0), status(40.0, compile=40.0)], [{"foreign_cpu": "0.25"}])
    on = economy.sums([status(8.0, compile=5.0, load=3.0), status(2.0, load=2.0)], [{"foreign_cpu": ""}])
    assert (off.wall, off.cpu, off.gpu, off.foreign) == (80.0, 4.0, 80.0, 0.25)
    text = economy.table({"off": off, "on": on}).splitlines()
    assert text[1].split() == ["compile", "70.0", "5.0"]
    assert text[2].split() == ["load", "10.0", "5.0"]
    assert any(line.split()[-2:] == ["1.00", "8.00"] for line in text)
