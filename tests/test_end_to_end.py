"""The whole way from the command line to the report, on a tiny model with real libraries.

One sweep is run once for all tests of this file; what is asserted is what a user would read.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent

GRID = ["-m", "model=tiny_random", "tracker=none", "measure=brief"]
SWEEP = [*GRID, "quantizer=none,int8_wo,int4_wo,hqq4", "cache=dynamic,static", "compiler=eager", "sweep.name=main"]


FIGURES = """
    decode_tok_s decode_tok_s_lo prefill_tok_s ttft_s tpot_s generate_tok_s peak_memory_bytes weight_bytes
    bits_per_weight quantized_fraction bytes_per_token kv_bytes mbu_measured mfu_measured mean_kld p99_kld
    top1_agreement ppl ppl_ratio first_divergence load_s quantize_s total_s
""".split()


class Bench:
    """A folder with a store, and lbi run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "lbi_store"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **variables}
        return subprocess.Popen(
            [sys.executable, "-m", "lbi", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def rows(self, sweep: str) -> list[dict[str, str]]:
        with (self.store / "sweeps" / sweep / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def attempts(self) -> list[Path]:
        return sorted(self.store.glob("runs/*/*/attempt-*"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("bench"))
    code, output = made.run(*SWEEP)
    assert code == 0, output
    return made


def number(row: dict[str, str], name: str) -> float:
    return float(row[name])


def test_every_cell_is_measured_and_every_figure_is_there(bench: Bench) -> None:
    rows = bench.rows("main")
    assert [row["status"] for row in rows] == ["ok"] * 8
    for row in rows:
        for name in FIGURES:
            assert row[name] != "", (row["name"], name)
        assert number(row, "decode_tok_s_lo") <= number(row, "decode_tok_s") <= number(row, "decode_tok_s_hi")
        assert 0 < number(row, "mbu_measured") < 1
    parquet = pq.read_table(bench.store / "sweeps" / "main" / "results.parquet").to_pylist()
    assert [row["run_id"] for row in parquet] == [row["run_id"] for row in rows]
    assert isinstance(parquet[0]["decode_tok_s"], float)


def test_the_figures_fit_what_the_quantizers_are(bench: Bench) -> None:
    by_name = {(row["quantizer"], row["cache"]): row for row in bench.rows("main")}
    plain = by_name["none", "dynamic"]
    # 294,912 weights of the decoder and 65,536 of the lm_head; see conf/model/tiny_random.yaml.
    assert number(plain, "bits_per_weight") == 16
    assert number(plain, "mean_kld") == 0
    assert number(plain, "first_divergence") == 24
    assert number(by_name["int8_wo", "dynamic"], "quantized_fraction") == pytest.approx(294912 / 360448)
    bits = {name: number(by_name[name, "dynamic"], "bits_per_weight") for name in ("int8_wo", "int4_wo", "hqq4")}
    assert 9 < bits["int8_wo"] < 10
    assert bits["hqq4"] < bits["int4_wo"] < 7.5
    klds = {name: number(by_name[name, "dynamic"], "mean_kld") for name in bits}
    assert 0 < klds["int8_wo"] < klds["int4_wo"]
    for quantizer in ("none", *bits):
        dynamic, static = by_name[quantizer, "dynamic"], by_name[quantizer, "static"]
        assert dynamic["mean_kld"] == static["mean_kld"]
        assert number(dynamic, "bytes_per_token") <= number(static, "bytes_per_token")


def test_what_ran_was_read_back(bench: Bench) -> None:
    for row in bench.rows("main"):
        folder = Path(row["folder"])
        effective = json.loads((folder / "effective.json").read_text())
        assert effective["cache"]["class"] == {"static": "StaticCache", "dynamic": "DynamicCache"}[row["cache"]]
        assert effective["settings_undone"] == []
        if row["cache"] == "static":
            assert effective["lossless"]["verdict"] in ("equal", "tie")
        samples = pq.read_table(folder / "samples.parquet").to_pylist()
        assert len({sample["repetition"] for sample in samples}) == 5
        assert len(samples) == 5 * 25
        told = {number: sample["decode_tok_s"] for number, sample in enumerate(effective["samples"])}
        for number, speed in told.items():
            at = [one["seconds"] for one in samples if one["repetition"] == number and one["token"] >= 0]
            assert speed == pytest.approx((len(at) - 1) / (at[-1] - at[0]))
        assert len(told) == 5
        assert json.loads((folder / "env.json").read_text())["packages"]["torch"]


def test_the_reference_was_computed_once(bench: Bench) -> None:
    kinds = sorted(path.name.split("-")[0] for path in (bench.store / "references").iterdir())
    assert kinds == ["greedy", "logits", "quality", "quality", "quality", "quality"]


def test_a_second_call_runs_nothing(bench: Bench) -> None:
    before = bench.attempts()
    code, output = bench.run(*SWEEP)
    assert code == 0
    assert "8 cells, 8 DONE" in output
    assert "Fastest:" in output
    assert bench.attempts() == before


def test_what_cannot_change_a_number_reuses_results_and_what_can_does_not(bench: Bench) -> None:
    _, output = bench.run(*SWEEP, "resources.run_timeout_s=99", "tracker.project=other", "sweep.dry_run=true")
    assert "8 DONE" in output
    _, output = bench.run(*SWEEP, "workload.new_tokens=9", "sweep.dry_run=true")
    assert "8 RUN" in output


def test_the_verbs_know_only_the_store(bench: Bench) -> None:
    code, output = bench.run("status")
    assert code == 0
    assert "8 ok" in output
    report = bench.store / "sweeps" / "main" / "report.html"
    report.unlink()
    (report.parent / "results.csv").unlink()
    code, output = bench.run("report", "main", "--baseline", "int8_wo dynamic")
    assert code == 0
    assert "int8_wo dynamic (baseline)" in output
    assert report.stat().st_size < 2_000_000
    assert len(bench.rows("main")) == 8
    assert bench.run("collect", "mai")[0] == 0


@pytest.mark.slow
def test_a_partly_applied_quantizer_never_gives_a_number(bench: Bench) -> None:
    """192 inputs are not divided by 128: torchao leaves those layers, without an error."""
    wide = ["model.arch.hidden_size=192", "model.arch.num_attention_heads=6", "model.arch.num_key_value_heads=2"]
    cell = [*GRID, *wide, "quantizer=int4_wo", "quantizer.group_size=128", "quality=off"]
    code, output = bench.run(*cell)
    assert (code, "no cell of the grid can run" in output) == (2, True)
    code, output = bench.run(*cell, "sweep.prune=false", "sweep.name=partly")
    assert code == 1
    (row,) = bench.rows("partly")
    assert row["status"] == "not_applied"
    assert "are still Linear[bfloat16]" in row["reason"]
    assert row["decode_tok_s"] == ""


@pytest.mark.slow
def test_compiling_is_checked_and_counted(bench: Bench) -> None:
    code, output = bench.run(*GRID, "compiler=inductor", "cache=static", "quality=off", "sweep.name=compiled")
    assert code == 0, output
    (row,) = bench.rows("compiled")
    effective = json.loads((Path(row["folder"]) / "effective.json").read_text())
    assert effective["compiler"]["graphs"] == 1
    assert effective["compiler"]["graph_breaks"] == 0
    assert effective["lossless"]["verdict"] in ("equal", "tie")
    assert number(row, "compile_s") > 0


@pytest.mark.slow
def test_an_unknown_inductor_option_is_unsupported_with_a_hint(bench: Bench) -> None:
    cell = [*GRID, "compiler=inductor", "cache=static", "quality=off", "sweep.name=misspelt"]
    code, _ = bench.run(*cell, "+compiler.options.max_autotun=true")
    assert code == 1
    (row,) = bench.rows("misspelt")
    assert row["status"] == "unsupported"
    assert "max_autotune" in row["reason"]


@pytest.mark.slow
def test_sampling_is_repeatable_for_a_seed(bench: Bench) -> None:
    code, output = bench.run(
        *GRID, "decoding=sampling", "decoding.seed=1,2", "cache=dynamic,static", "quality=off", "sweep.name=sampled"
    )
    assert code == 0, output
    texts: dict[str, Any] = {}
    for row in bench.rows("sampled"):
        tokens = json.loads((Path(row["folder"]) / "text.json").read_text())["tokens"]
        texts.setdefault(row["name"].split("seed=")[1], []).append(tokens)
    assert texts["1"][0] == texts["1"][1]
    assert texts["1"][0] != texts["2"][0]


def wait_for(condition: Any, process: Any = None, seconds: float = 240) -> None:
    """Until the condition holds; it cannot any more once the process, if given, has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        assert process is None or process.poll() is None, "the process ended before"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Not so what has ended and is still to be waited for by somebody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def measuring(bench: Bench) -> Path | None:
    """The attempt whose child is in the timed region right now."""
    for folder in bench.attempts():
        try:
            progress = json.loads((folder / "progress.json").read_text())
        except (OSError, ValueError):
            continue
        if progress["phase"] == "measure" and not (folder / "outcome.json").exists():
            return folder
    return None


INTERRUPTED = [*GRID, "quality=off", "measure.cooldown_s=0.4"]


@pytest.mark.parametrize("victim", ["child", "driver", "driver with Ctrl-C"])
@pytest.mark.slow
def test_whatever_is_killed_loses_no_finished_cell(tmp_path: Path, victim: str) -> None:
    bench = Bench(tmp_path)
    grid = [*INTERRUPTED, "quantizer=none,int8_wo,hqq4", "sweep.name=killed"]
    process = bench.start(*grid)

    def second_cell_is_measured() -> bool:
        folder = measuring(bench)
        return folder is not None and len(list(bench.store.glob("runs/*/*/status.json"))) == 1

    wait_for(second_cell_is_measured, process)
    folder = measuring(bench)
    assert folder is not None
    child = json.loads((folder / "process.json").read_text())["pid"]
    if victim == "child":
        os.kill(child, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT if "Ctrl-C" in victim else signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    finished = {path: path.stat().st_mtime_ns for path in bench.store.glob("runs/*/*/attempt-*/metrics.json")}

    if victim == "child":
        assert process.returncode == 1
        assert sorted(row["status"] for row in bench.rows("killed")) == ["crash", "ok", "ok"]
        assert "SIGKILL in phase measure" in output
    elif victim == "driver":
        wait_for(lambda: not is_alive(child))
        assert len(finished) == 1
    else:
        assert process.returncode == 1
        assert "the same command runs the rest" in output
        assert "Traceback" not in output
        assert len(finished) == 1

    code, output = bench.run(*grid)
    assert code == 0, output
    assert f"{len(finished)} DONE" in output
    assert [row["status"] for row in bench.rows("killed")] == ["ok"] * 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())


@pytest.mark.slow
def test_a_damaged_store_is_reported_and_repaired(bench: Bench) -> None:
    row = bench.rows("main")[2]
    metrics = Path(row["folder"]) / "metrics.json"
    whole = metrics.read_text()
    metrics.write_text(whole[: len(whole) // 2])
    (bench.store / "devices" / "rubbish.json").write_text("?")
    _, output = bench.run(*SWEEP, "sweep.dry_run=true")
    assert "1 RUN, 7 DONE" in output
    assert "Ignored in the store" in output
    assert "metrics.json" in output
    code, _ = bench.run(*SWEEP)
    assert code == 0
    assert [row["status"] for row in bench.rows("main")] == ["ok"] * 8


@pytest.mark.slow
def test_a_trace_is_taken_after_the_measurement(bench: Bench) -> None:
    code, _ = bench.run(*GRID, "workload.new_tokens=12", "quality=off", "trace=kernels", "sweep.name=traced")
    assert code == 0
    folder = Path(bench.rows("traced")[0]["folder"])
    trace = json.loads((folder / "effective.json").read_text())["traces"]["kernels"]
    assert (folder / trace["file"]).stat().st_size > 1000
    assert trace["top"][0]["seconds"] > 0


def test_results_go_to_wandb_from_the_store(bench: Bench) -> None:
    code, output = bench.run(*[item for item in SWEEP if item != "tracker=none"])
    assert code == 0
    assert "W&B: 8 runs offline" in output
    assert len(list((bench.store / "wandb").rglob("offline-run-*"))) == 8
