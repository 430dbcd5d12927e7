"""Every cell of a grid has a verdict, and identity follows what can change a number."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbi import environment, quantizer_rules, rules
from lbi.errors import InputError
from lbi.model_files import inspect
from lbi.plan import Plan, make_plan
from lbi.store import Store
from lbi.verdicts import DONE, DUPLICATE, PRUNED, RUN

ROOT = Path(__file__).parent.parent

MakePlan = Callable[..., Plan]


def finish(store: Store, run_id: str, env_id: str, status: str = "ok", **metrics: float) -> None:
    """Publish a result as a worker would."""
    attempt = store.claim(run_id, env_id, {})
    (attempt.folder / "env.json").write_text(json.dumps({"schema": 1, **environment.describe()}))
    if status == "ok":
        content = {"schema": 1, "metrics": {"decode_tok_s": 1.0, **metrics}, "missing": {}}
        (attempt.folder / "metrics.json").write_text(json.dumps(content))
    store.publish(attempt, status, "because", 1.0)


def only(plan: Plan) -> Any:
    (cell,) = plan.cells
    return cell


def test_no_cell_of_the_grid_is_missing(plan: MakePlan) -> None:
    made = plan("quantizer=none,int8_wo,int4_wo", "compiler=eager,inductor", "cache=dynamic,static")
    assert len(made.cells) == 12
    assert [cell.index for cell in made.cells] == list(range(12))
    assert Counter(cell.verdict for cell in made.cells) == {RUN: 9, PRUNED: 3}
    assert {cell.rule for cell in made.having(PRUNED)} == {"static_shapes_need_static_cache"}
    assert len({cell.name for cell in made.cells}) == 12


def test_choice_range_and_glob_sweeps(plan: MakePlan) -> None:
    made = plan(
        "workload.new_tokens=range(8,12)", "cache=glob(*,exclude=[*_*,off*,sliding])", "measure.repetitions=choice(2,3)"
    )
    assert len(made.cells) == 4 * 2 * 2


@pytest.mark.slow
def test_what_cannot_change_a_number_does_not_change_the_run(plan: MakePlan) -> None:
    base = only(plan()).run_id
    for override in (
        "resources.run_timeout_s=7",
        "tracker=none",
        "tracker.project=other",
        "trace=kernels",
        "store.path=elsewhere",
        "report.max_kld=1",
        "sweep.name=other",
        "model.name=other",
        "workload.name=other",
    ):
        assert only(plan(override)).run_id == base, override


@pytest.mark.slow
def test_what_can_change_a_number_changes_the_run(plan: MakePlan) -> None:
    overrides = (
        "workload.new_tokens=17",
        "workload.prompt=other",
        "model.seed=1",
        "model.dtype=float32",
        "quantizer=int8_wo",
        "cache=static",
        "measure.repetitions=3",
        "quality.tokens=512",
        "engine.threads=1",
        "decoding=sampling",
    )
    runs = [only(plan(override)).run_id for override in ("quantizer=none", *overrides)]
    assert len(set(runs)) == len(runs)


def test_two_spellings_of_one_setting_are_one_run(plan: MakePlan) -> None:
    made = plan("quantizer=hqq8,hqq4", "quantizer.bits=4")
    assert [cell.verdict for cell in made.cells] == [RUN, DUPLICATE]
    assert made.cells[0].run_id == made.cells[1].run_id
    assert "cell 0" in made.cells[1].reason


def test_a_finished_cell_is_done_and_a_failed_one_by_mode(plan: MakePlan, store: Store) -> None:
    cells = plan("cache=dynamic,static", "decoding=greedy,sampling").cells
    for cell, status in zip(cells, ("ok", "oom", "cancelled", "crash"), strict=True):
        finish(store, cell.run_id, cell.env_id, status)

    def verdicts(mode: str) -> list[str]:
        made = plan("cache=dynamic,static", "decoding=greedy,sampling", f"sweep.mode={mode}")
        return [cell.verdict for cell in made.cells]

    # A cancelled run has no result; a crash is tried a second time.
    assert verdicts("cached") == [DONE, DONE, RUN, RUN]
    assert verdicts("retry") == [DONE, RUN, RUN, RUN]
    assert verdicts("force") == [RUN] * 4
    assert verdicts("read_only") == [DONE, DONE, PRUNED, DONE]
    finish(store, cells[3].run_id, cells[3].env_id, "crash")
    assert verdicts("cached") == [DONE, DONE, RUN, DONE]


def test_another_version_of_a_package_makes_results_stale(
    plan: MakePlan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = only(plan())
    finish(store, cell.run_id, cell.env_id)
    assert only(plan()).verdict == DONE
    versions = environment.packages()
    monkeypatch.setattr(environment, "packages", lambda: versions | {"torchao": "99.0"})
    changed = only(plan())
    assert (changed.verdict, changed.run_id) == (RUN, cell.run_id)
    assert only(plan("sweep.reuse=same_gpu")).verdict == DONE
    assert only(plan("sweep.reuse=any")).verdict == DONE
    monkeypatch.setattr(environment, "cpu_model", lambda: "another processor")
    assert only(plan("sweep.reuse=same_gpu")).verdict == RUN
    assert only(plan("sweep.reuse=any")).verdict == DONE


def test_an_installed_version_is_read_from_the_environment_itself(tmp_path: Path) -> None:
    """Not through a stand-in: another torchao's metadata in front on the path changes the env_id."""
    fake = tmp_path / "torchao-99.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 99.0\n")
    question = "from lbi import environment as e; print(e.packages()['torchao'], e.identify('cpu'))"
    said = [
        subprocess.run(
            [sys.executable, "-c", question],
            env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for path in (str(ROOT), f"{tmp_path}:{ROOT}")
    ]
    assert said[1][0] == "99.0"
    assert said[0] != said[1]


def test_exact_reuse_asks_for_the_same_code(plan: MakePlan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = only(plan())
    finish(store, cell.run_id, cell.env_id)
    assert only(plan("sweep.reuse=exact")).verdict == DONE
    monkeypatch.setattr(environment, "git_state", lambda: {"commit": "other", "dirty": None})
    assert only(plan("sweep.reuse=exact")).verdict == RUN
    assert only(plan()).verdict == DONE


def test_a_group_that_does_not_divide_the_rows_is_pruned(plan: MakePlan) -> None:
    made = only(plan("quantizer=int4_wo", "quantizer.group_size=128", model="smollm2_135m"))
    assert (made.verdict, made.rule) == (PRUNED, "group_divides_rows")
    assert "576" in made.reason


def test_rules_can_be_switched_off_to_test_them(plan: MakePlan) -> None:
    assert only(plan("compiler=inductor", "sweep.prune=false")).verdict == RUN


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (("++quantizer.group_size=32", "quantizer=int8_wo"), "unused_quantizer_knob"),
        (("compiler.prefill=true",), "unused_knob"),
        (("+decoding.seed=1",), "unused_knob"),
        (("+cache.max_len=64",), "unused_knob"),
        (("quantizer=int8_wo", "quantizer.bits=4"), "bits_exist"),
        (("quantizer=hqq4", "quantizer.bits=5"), "bits_exist"),
        (("quantizer=int4_wo", "model.dtype=float32"), "dtype_and_group_exist"),
        (("quantizer=int4_wo", "quantizer.group_size=48"), "dtype_and_group_exist"),
        (("quantizer=int4_wo", "quantizer.qparams=magic"), "int4_forms"),
        (("quantizer=int4_wo", "quantizer.packing=plain"), "int4_forms"),
        (("quantizer=hqq4", "quantizer.backend=gemlite"), "hqq_backend"),
        (("quantizer=hqq4", "quantizer.backend=torchao_int4"), "hqq_backend"),
        (("quantizer=fp8_da",), "hardware_fits"),
        (("quantizer=gemlite_a16w4",), "hardware_fits"),
        (("quantizer=mix", "quantizer.mix={default:gemlite_a16w4}"), "hardware_fits"),
        (("quantizer=autoquant", "quantizer.candidates=[]"), "autoquant_is_complete"),
        (("quantizer=mix",), "mix_is_given"),
        (("compiler=cudagraph", "cache=static"), "cuda_graphs_need_cuda"),
        (("compiler=cudagraph", "cache=dynamic"), "static_shapes_need_static_cache"),
        (("compiler=eager", "compiler.linears=true"), "unused_knob"),
        (("quantizer=rsr", "engine.device=cuda"), "hardware_fits"),
        (("quantizer=bitnet", "model.dtype=float16"), "dtype_and_group_exist"),
        (("engine.device=cuda",), "gpu_is_there"),
        (("compiler=inductor_reduce_overhead", "cache=static"), "cuda_graphs_need_cuda"),
        (("compiler=inductor_tuned", "cache=static"), "coordinate_descent_needs_gpu"),
        (("workload.new_tokens=5000",), "fits_context"),
        (("cache=static", "cache.max_len=8"), "fits_context"),
        (("decoding=sampling", "decoding.temperature=null"), "sampling_is_complete"),
    ],
)
def test_each_rule_prunes_with_its_reason(plan: MakePlan, overrides: tuple[str, ...], rule: str) -> None:
    if environment.gpus():
        pytest.skip("these rules are about a machine without a GPU")
    cell = only(plan(*overrides))
    assert (cell.verdict, cell.rule) == (PRUNED, rule)
    assert cell.reason


@pytest.mark.parametrize(
    ("option", "least"),
    [
        ("fp8_da", 8.9),
        ("int4_wo", 8.0),
        ("gemlite_a16w4", 8.0),
        ("gemlite_a16w8_fp8", 8.9),
        ("mxfp8_da", 10.0),
        ("native_w4", 8.0),
        ("native_fp8", 8.9),
    ],
)
def test_a_gpu_too_old_is_told_what_would_be_needed(plan: MakePlan, option: str, least: float) -> None:
    config = only(plan(f"quantizer={option}", "engine.device=cuda", "sweep.prune=false")).config
    assert config is not None
    facts = inspect(config.model)

    def said(capability: float | None) -> str | None:
        machine = rules.Machine("cuda", {"torchao": "0", "gemlite": "0", "hqq": "0"}, True, capability)
        return quantizer_rules.hardware_fits(config, facts, machine)

    assert said(least) is None
    # Unknown is not refused: the run itself looks again at the GPU that it finds.
    assert said(None) is None
    assert f"sm_{round(10 * least)} or newer" in str(said(least - 0.1))


def test_a_part_of_a_mix_belongs_to_its_identity(plan: MakePlan) -> None:
    made = [
        only(plan("quantizer=mix", f"quantizer.mix={{q_proj:{part},default:int8_pack}}"))
        for part in ("int8_wo", "'int4_wo group_size=32'", "'int4_wo group_size=64'")
    ]
    assert len({cell.run_id for cell in made}) == 3


@pytest.mark.parametrize("part", ["nope", "'int4_wo magic=3'", "autoquant"])
def test_a_part_that_does_not_exist_is_a_wrong_request(plan: MakePlan, part: str) -> None:
    with pytest.raises(InputError, match="quantizer"):
        plan("quantizer=mix", f"quantizer.mix={{default:{part}}}")


def test_a_missing_package_is_named(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {name: version for name, version in environment.packages().items() if name != "hqq"}
    monkeypatch.setattr(environment, "packages", lambda: versions)
    assert "pip install hqq" in only(plan("quantizer=hqq4")).reason


def test_a_knob_that_only_some_options_have_prunes_the_others(plan: MakePlan) -> None:
    made = plan("quantizer=none,int4_wo", "quantizer.group_size=32,64")
    assert [cell.verdict for cell in made.cells] == [PRUNED, PRUNED, RUN, RUN]
    assert "group_size" in made.cells[0].reason
    assert made.cells[0].name == "none group_size=32"


def test_a_knob_that_no_option_has_is_a_wrong_request(compose: Any, store: Store) -> None:
    cells = compose("quantizer=none,int8_wo", "quantizer.group_size=32")
    with pytest.raises(InputError, match="no such knob"):
        make_plan(cells, store, 0.0)


def test_the_weights_name_a_model_not_its_path(plan: MakePlan, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_model(tmp_path / name)
    one = only(plan(f"model.path={tmp_path / 'one'}", model="hf"))
    two = only(plan(f"model.path={tmp_path / 'two'}", model="hf"))
    assert one.run_id == two.run_id
    write_model(tmp_path / "two", byte=b"\1")
    assert only(plan(f"model.path={tmp_path / 'two'}", model="hf")).run_id != one.run_id


def write_model(folder: Path, byte: bytes = b"\0", cut: int = 0) -> None:
    """A model folder as far as the plan reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}).encode()
    content = struct.pack("<Q", len(header)) + header + byte * 128
    (folder / "model.safetensors").write_bytes(content[: len(content) - cut])


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (lambda folder: write_model(folder, cut=40), "header promises"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1\0"), "header"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'), "lacks b"),
    ],
)
def test_a_damaged_model_folder_is_a_wrong_request(
    plan: MakePlan, tmp_path: Path, break_it: Callable[[Path], Any], part: str
) -> None:
    folder = tmp_path / "model"
    write_model(folder)
    break_it(folder)
    with pytest.raises(InputError, match=part) as caught:
        plan(f"model.path={folder}", model="hf")
    assert caught.value.field == "model.path"
    assert caught.value.way_out


def test_a_model_that_is_not_there_is_a_wrong_request(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        plan("model.path=/does/not/exist", model="hf")
    with pytest.raises(InputError, match="is not given"):
        plan(model="hf")
    with pytest.raises(InputError, match="no such file"):
        plan(f"model.path={tmp_path / 'x.gguf'}", model="gguf")
    (tmp_path / "x.gguf").write_text("text")
    with pytest.raises(InputError, match="not a GGUF"):
        plan(f"model.path={tmp_path / 'x.gguf'}", model="gguf")


def test_a_hub_id_is_left_to_the_run(plan: MakePlan) -> None:
    assert only(plan("model.path=meta-llama/Llama-3.1-8B", model="hf")).verdict == RUN


def test_ten_thousand_cells_are_planned_in_a_moment(plan: MakePlan) -> None:
    """A guard against something quadratic, not a measurement: benchmarks/plan_scale.py is that."""
    made = plan(
        "quantizer=glob(*)",
        "compiler=glob(*)",
        "cache=glob(*)",
        "decoding=greedy,sampling",
        "workload.new_tokens=range(16,18)",
    )
    assert len(made.cells) > 10_000
    assert made.counts()[RUN] + made.counts()[PRUNED] == len(made.cells)
