"""What doctor says about other hardware, and about torchao's compiled extensions."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lbi import hardware, quantizers
from lbi.extensions import in_words
from lbi.model_files import inspect
from lbi.plan import Plan
from lbi.quantizers import Needs, aten


def runs_on(plan: Callable[..., Plan], *overrides: str) -> dict[str, bool]:
    config = plan(*overrides, "sweep.prune=false").cells[0].config
    assert config is not None
    return hardware.runs_on(config, inspect(config.model))


@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        ("rsr", ["CPU"]),
        ("int4_wo", ["CPU", "sm_80", "sm_89", "sm_90", "sm_100"]),
        ("gemlite_a16w8_fp8", ["sm_89", "sm_90", "sm_100"]),
        ("gemlite_a16w4_nvfp", ["sm_100"]),
        ("native_w4", ["CPU", "sm_80", "sm_89", "sm_90", "sm_100"]),
        ("native_fp8", ["CPU", "sm_89", "sm_90", "sm_100"]),
    ],
)
def test_options_run_on_their_kinds_of_hardware(plan: Callable[..., Plan], option: str, kinds: list[str]) -> None:
    found = runs_on(plan, f"quantizer={option}")
    assert list(found) == ["CPU", "sm_80", "sm_89", "sm_90", "sm_100"]
    assert [name for name, can in found.items() if can] == kinds


def test_what_needs_a_capability_says_yes_from_there_on(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is not installed here, and the missing GPU, are not what the table is about."""
    needs = Needs(devices=("cuda",), capability=8.9, because="fp8", packages=("cuda:a-package-that-nobody-has",))
    monkeypatch.setitem(aten.METHODS, "int8_pack", replace(aten.METHODS["int8_pack"], needs=needs))
    found = runs_on(plan, "quantizer=int8_pack")
    assert [name for name, can in found.items() if can] == ["sm_89", "sm_90", "sm_100"]
    assert "a-package-that-nobody-has" in hardware.kinds()["CPU"].packages
    assert set(quantizers.FAMILIES) >= {"aten", "torchao", "hqq"}


def test_the_table_has_a_line_an_option_and_fits_the_terminal() -> None:
    columns = dict.fromkeys(hardware.kinds(), True)
    lines = [
        hardware.Line("none", None, columns),
        hardware.Line("mxfp4", "needs sm_100 or newer " * 12, {**columns, "sm_80": False}),
    ]
    made = list(hardware.table(lines))
    assert made[0].split() == ["quantizer", "here", "CPU", "sm_80", "sm_89", "sm_90", "sm_100"]
    assert made[1].split() == ["none", *["yes"] * 6]
    assert made[2].split() == ["mxfp4", "no", "yes", "no", "yes", "yes", "yes"]
    assert made[4] == "Why not here:"
    assert " ".join(" ".join(made[5:]).split()).startswith("mxfp4 needs sm_100 or newer needs")
    assert max(map(len, made)) <= hardware.WIDTH - 2


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            {"loaded": ["a.so"], "failed": ["b.so"], "skipped": ""},
            "1 of 2 compiled extensions loaded; not loaded: b.so",
        ),
        ({"loaded": ["a.so"], "failed": [], "skipped": ""}, "1 of 1 compiled extensions loaded"),
        ({"loaded": [], "failed": [], "skipped": "Skipping"}, "compiled extensions: Skipping"),
        ({"loaded": [], "failed": [], "skipped": ""}, "installed without compiled extensions"),
    ],
)
def test_extensions_in_words(found: dict[str, Any], words: str) -> None:
    assert in_words(found) == words


@pytest.mark.slow
def test_doctor_prints_it_all(run_lbi: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_lbi("doctor", TORCHAO_FORCE_SKIP_LOADING_SO_FILES="1")
    assert "Traceback" not in done.stderr + done.stdout
    assert "torchao    compiled extensions: Skipping import of cpp extensions" in done.stdout
    lines = done.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["quantizer", "here"])
    table = {line.split()[0]: line.split()[1:] for line in lines[start + 1 :] if line.strip()}
    assert table["none"] == ["yes"] * 6
    assert table["rsr"][1:3] == ["yes", "no"]
    assert "cache=static" in done.stdout
