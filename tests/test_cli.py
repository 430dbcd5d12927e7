"""The command line as a user meets it: one clear message, an exit code, no traceback, no torch where none is needed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbi.cli import in_each_cell

ROOT = Path(__file__).parent.parent
RunLbi = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["quantizer=nope"], ["quantizer", "int8_wo"]),
        (["-m", "quantizer=none,nope"], ["quantizer", "nope", "int8_wo"]),
        (["workload.new_tokens=-3"], ["workload.new_tokens=-3", "at least 2"]),
        (["workload.new_tokens=abc"], ["workload.new_tokens=abc", "whole number"]),
        (["-m", "workload.new_tokens=8,abc"], ["workload.new_tokens=abc"]),
        (["model=hf", "model.path=/does/not/exist"], ["model.path=/does/not/exist", "no such folder", "hub id"]),
        (["model=hf"], ["model.path", "Set model.path"]),
        (["store.path=/proc/nowhere", "model=tiny_random"], ["store.path=/proc/nowhere", "LBI_STORE"]),
        (["workload.new_tokns=3"], ["workload.new_tokns", "no such knob", "new_tokens"]),
        (
            ["quantizer=int8_wo", "quantizer.group_size=64"],
            ["quantizer.group_size", "no such knob", "quantizer=int8_wo"],
        ),
        (["nonsense.knob=3"], ["nonsense", "no such knob"]),
        (["=3"], ["lbi:"]),
        (["quantizer=[a"], ["lbi:"]),
        (["+sweep=nope"], ["sweep/nope", "quickstart"]),
        (["statsu"], ["statsu", "status"]),
        (["-m", "workload.new_tokens=interval(1,9)"], ["interval"]),
        (["model=tiny_random", "compiler=inductor"], ["no cell of the grid can run"]),
        (["model=tiny_random", "hydra/launcher=basic"], ["hydra/launcher", "lbi_local"]),
        (["status"], ["no such store"]),
        (["report", "--store", "."], ["no sweep"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_request_is_one_clear_message_and_exit_code_2(
    run_lbi: RunLbi, arguments: list[str], parts: list[str]
) -> None:
    done = run_lbi(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for part in parts:
        assert part in done.stderr, done.stderr
    assert done.stderr.startswith("lbi: ")
    assert len(done.stderr.strip().splitlines()) <= 3


def test_a_read_only_store_is_a_wrong_request(run_lbi: RunLbi, tmp_path: Path) -> None:
    """Not by permissions, which root ignores: by a file system that cannot be written."""
    done = run_lbi("model=tiny_random", "store.path=/proc/sys/lbi")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-m", "+sweep=quickstart", "sweep.dry_run=true"],
        ["--cfg", "job"],
        ["status"],
        ["report"],
        ["collect"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_where_nothing_is_measured(run_lbi: RunLbi, tmp_path: Path, arguments: list[str]) -> None:
    """A torch that cannot be imported stands in its place: whoever tries fails."""
    from lbi.plan import Plan
    from lbi.store import Store
    from lbi.sweep_folder import write_plan

    store = Store.open(tmp_path / "store", write=True)
    header = {"command": "", "planned": 0.0, "baseline": None, "max_kld": 0.05, "notes": {}, "problems": []}
    write_plan(store, "empty", Plan([], 0.0), header)
    fake = tmp_path / "fake"
    for name in ("torch", "transformers", "torchao", "hqq", "wandb"):
        (fake / name).mkdir(parents=True)
        (fake / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')")
    done = run_lbi(*arguments, PYTHONPATH=f"{fake}:{ROOT}")
    assert "was imported" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_help_names_every_group_and_option(run_lbi: RunLbi) -> None:
    text = run_lbi("--help").stdout
    for option in ROOT.glob("conf/*/*.yaml"):
        assert option.stem in text
    for group in ROOT.glob("conf/*"):
        if group.is_dir() and group.name != "sweep":
            assert f"\n  {group.name}: " in text
    assert "quickstart" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_dry_run_shows_every_verdict_and_leaves_nothing_behind(run_lbi: RunLbi, tmp_path: Path) -> None:
    done = run_lbi("-m", "+sweep=quickstart", "sweep.dry_run=true")
    assert done.returncode == 0
    assert done.stdout.count("PRUNED") == 4 + 1
    assert "12 RUN, 4 PRUNED" in done.stdout
    assert "576 inputs" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_the_grid_of_decodings_runs_on_every_engine_that_can_and_says_why_on_others(run_lbi: RunLbi) -> None:
    """Three engines, six ways to decode, seven caches: on hf greedy alone, on the others all on four static caches."""
    done = run_lbi("-m", "+sweep=decoding_grid", "engine=loop,fused", "sweep.dry_run=true")
    assert "84 cells, 48 RUN, 36 PRUNED" in done.stdout
    hf = run_lbi("-m", "+sweep=decoding_grid", "engine=hf", "cache=dynamic,static,static_int8", "sweep.dry_run=true")
    assert "18 cells, 2 RUN, 16 PRUNED" in hf.stdout


def test_a_preset_is_narrowed_by_the_command_line(run_lbi: RunLbi) -> None:
    done = run_lbi("-m", "+sweep=quickstart", "quantizer=none", "sweep.dry_run=true")
    assert "hqq4" not in done.stdout
    assert "int8_wo" not in done.stdout


def test_a_single_run_takes_the_same_path_as_a_sweep(run_lbi: RunLbi) -> None:
    single = run_lbi("model=tiny_random", "sweep.dry_run=true").stdout
    sweep = run_lbi("-m", "model=tiny_random", "sweep.dry_run=true").stdout
    assert single.split("Sweep")[0] == sweep.split("Sweep")[0]
    assert "1 RUN" in single


def test_the_readmes_commands_are_real(run_lbi: RunLbi) -> None:
    """Every `python -m lbi` line of the README with an override plans without an error."""
    lines = (ROOT / "README.md").read_text().replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.strip(), comments=True)[3:] for line in lines if line.startswith("python -m lbi ")]
    planned = [words for words in commands if "=" in " ".join(words) and "model.path=" not in " ".join(words)]
    assert len(planned) >= 4
    for words in planned:
        done = run_lbi(*words, "sweep.dry_run=true")
        assert done.returncode == 0, (words, done.stderr)


def test_importing_lbi_sets_nothing_up() -> None:
    code = (
        "import sys, signal, logging\nbefore = (signal.getsignal(2), logging.root.handlers[:], sys.excepthook)\n"
        "import lbi, lbi.plan, lbi.store, lbi.worker, lbi.collect, lbi.ranking, lbi.report.terminal, lbi.report.html\n"
        "assert before == (signal.getsignal(2), logging.root.handlers[:], sys.excepthook)\n"
        "assert not {'torch', 'transformers', 'wandb', 'pyarrow', 'vl_convert'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr


def test_version_and_wheel_data_agree() -> None:
    """conf/ and the presets must travel in the wheel, which maps them into the package."""
    import tomllib

    project: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert mapped == {"conf": "lbi/conf"}
    assert (ROOT / "conf" / "sweep").resolve() == ROOT / "sweeps"


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("quantizer.lm_head=same", "quantizer.lm_head=choice(same)"),
        ("quantizer.skip=[q_proj,k_proj]", "quantizer.skip=choice([q_proj,k_proj])"),
        ("+quantizer.options={a: 1}", "+quantizer.options=choice({a: 1})"),
        ("quantizer.group_size=32,64", "quantizer.group_size=32,64"),
        ("workload.new_tokens=8", "workload.new_tokens=8"),
        ("engine=hf", "engine=hf"),
        ("~tracker", "~tracker"),
    ],
)
def test_knobs_of_a_swept_group_are_set_in_each_cell(given: str, made: str) -> None:
    assert in_each_cell(["-m", "quantizer=int8_wo,int4_wo", given]) == ["-m", "quantizer=int8_wo,int4_wo", made]


def test_a_knob_that_the_default_option_lacks_can_be_set_for_swept_ones(run_lbi: Callable[..., Any]) -> None:
    done = run_lbi("-m", "quantizer=int8_wo,int4_wo", "quantizer.lm_head=same", "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "2 cells, 2 RUN" in done.stdout
