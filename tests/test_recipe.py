"""Recipes: the script that a result comes down to gives the measured tokens, and needs lbi only where it must.

One sweep on a tiny model has a cell of each kind; each recipe is run as it was written.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbi.cells import find_result
from lbi.collect import rows
from lbi.errors import InputError
from lbi.recipe import script
from lbi.store import Result, Store

ROOT = Path(__file__).parent.parent

CUSTOM = """
import torch


class Rows(torch.nn.Module):
    def __init__(self, linear, bits):
        super().__init__()
        self.scale = torch.nn.Buffer(linear.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))
        self.codes = torch.nn.Buffer((linear.weight / self.scale).round().to(torch.int8))

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.codes.to(inputs.dtype) * self.scale)

    def lbi_observed(self):
        return {"kind": "Rows", "bits": 8, "group_size": None, "tensors": [self.codes, self.scale]}


def by_rows(linear, name, bits=8):
    return Rows(linear, bits)
"""

PRESET = """# @package _global_
hydra:
  sweeper:
    grids:
      - {quantizer: "none,int8_wo,int4_wo,hqq4,int8_pack,intx_sim,native_w4"}
      - {quantizer: int8_wo, cache: "static,hf_quantized_fp8", decoding: sampling}
      - {quantizer: native_w8, engine: "loop,fused", cache: static_int8}
      - {engine: loop, cache: static, quantizer: int8_wo, workload.batch: 3}
      - {engine: loop, cache: static, decoding: speculative_self, decoding.draft_quantizer: native_w8}
      - {quantizer: mix, quantizer.mix: "choice({down_proj: hqq4, default: int8_wo})", quantizer.lm_head: int8,
         quantizer.embeddings: int8, quantizer.skip: "choice([q_proj])"}
      - {quantizer: autoquant, quantizer.candidates: "choice([int8_pack, int4_wo])", quantizer.max_error: 0.5}
      - {quantizer: custom, quantizer.target: "'own_rows:by_rows'", quantizer.options: "choice({bits: 6})"}
"""

SMALL = ["model=tiny_random", "tracker=none", "measure=quick", "quality=off"]
SMALL += ["workload.new_tokens=10", "workload.prompt_tokens=16"]

WITHOUT_LBI = {"none", "int8_wo", "int4_wo", "hqq4", "int8_pack", "intx_sim", "mix", "autoquant", "custom"}


def lbi(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lbi", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("recipes")
    (made / "own_rows.py").write_text(CUSTOM)
    (made / "conf" / "sweep").mkdir(parents=True)
    (made / "conf" / "sweep" / "kinds.yaml").write_text(PRESET)
    ran = lbi(made, "--config-dir", str(made / "conf"), "-m", "+sweep=kinds", "sweep.name=kinds", *SMALL)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    sys.path.append(str(made))
    yield made
    sys.path.remove(str(made))


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store.open(folder / "lbi_store", write=False)


def run_here(text: str, file: Path) -> tuple[dict[str, Any], list[int]]:
    """What the script defines, and the tokens that it generates."""
    import torch

    file.write_text(text)
    # dynamo remembers what other tests compiled, and a script allows it no more than its own.
    torch._dynamo.reset()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        defined = runpy.run_path(str(file))
        tokens, _ = defined["run"]()
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
    return defined, tokens


@pytest.mark.slow
def test_each_kind_of_cell_gives_the_run_s_tokens(store: Store, tmp_path: Path) -> None:
    table = rows(store, "kinds")
    assert [row["status"] for row in table] == ["ok"] * 16
    for row in table:
        text = script.of_result(store, find_result(store, "kinds", row["run_id"]))
        imports_lbi = re.search(r"^(from|import) lbi", text, re.MULTILINE) is not None
        plain = row["engine"] == "hf" and row["quantizer"].split()[0] in WITHOUT_LBI
        assert imports_lbi is not plain, row["name"]
        defined, tokens = run_here(text, tmp_path / f"recipe_{row['cell']}.py")
        assert tokens == defined["RUN_TOKENS"], row["name"]
        assert len(tokens) == 10


@pytest.mark.slow
def test_another_setting_gives_other_tokens(store: Store, tmp_path: Path) -> None:
    """Or the comparison would hold whatever the script did: random weights at 4 bits choose other tokens."""
    text = script.of_result(store, find_result(store, "kinds", "hf hqq4 greedy dynamic"))
    assert "nbits=4" in text
    defined, tokens = run_here(text.replace("nbits=4", "nbits=1"), tmp_path / "other.py")
    assert tokens != defined["RUN_TOKENS"]
    assert defined["check"](tokens) == 1


@pytest.mark.slow
def test_the_verb_writes_a_script_that_checks_itself(folder: Path, store: Store, tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    wrote = lbi(folder, "recipe", "hf int8_pack", "-o", str(file))
    assert wrote.returncode == 0, wrote.stderr
    ran = subprocess.run([sys.executable, str(file), "--check"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the same 10 tokens as the run's" in ran.stdout
    own = subprocess.run([sys.executable, str(file), "some other words"], capture_output=True, text=True, timeout=120)
    assert len(own.stdout.split()) == 10
    assert own.stdout.splitlines() != ran.stdout.splitlines()[:1]


@pytest.mark.parametrize("verb", ["recipe", "trace"])
def test_looking_at_a_run_needs_no_torch(folder: Path, tmp_path: Path, verb: str) -> None:
    """A torch that cannot be imported stands in its place."""
    for name in ("torch", "transformers", "torchao", "hqq"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "lbi", verb, "hf int8_pack"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert {"recipe": "def generate", "trace": "aten::_weight_int8pack_mm"}[verb] in ran.stdout


@pytest.mark.parametrize(("run", "words"), [("nonsense", "no such cell"), ("int8_wo", "several cells")])
def test_what_names_no_single_run(folder: Path, run: str, words: str) -> None:
    said = lbi(folder, "recipe", run)
    assert said.returncode == 2
    assert words in said.stderr
    assert "Traceback" not in said.stderr


def test_a_run_without_a_number_has_no_recipe(store: Store) -> None:
    result = find_result(store, "kinds", "0")
    failed = Result(result.run_id, result.env_id, "oom", "needs 90 GB", 1, 0.0, 0.0, result.folder)
    with pytest.raises(InputError, match="needs 90 GB"):
        script.of_result(store, failed)


@pytest.mark.by_hand
def test_a_compiled_cell(folder: Path, tmp_path: Path) -> None:
    compiled = ["quantizer=int8_wo", "compiler=inductor", "cache=static", "engine=hf,loop", "sweep.name=compiled"]
    ran = lbi(folder, "-m", *SMALL, *compiled)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    store = Store.open(folder / "lbi_store", write=False)
    for cell in ("0", "1"):
        text = script.of_result(store, find_result(store, "compiled", cell))
        defined, tokens = run_here(text, tmp_path / f"compiled_{cell}.py")
        assert tokens == defined["RUN_TOKENS"]


@pytest.mark.by_hand
@pytest.mark.model
def test_real_weights_from_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    cells = ["model=smollm2_135m", "quantizer=int8_pack", "sweep.name=real"]
    ran = lbi(folder, "-m", *SMALL[1:], *cells)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    store = Store.open(folder / "lbi_store", write=False)
    text = script.of_result(store, find_result(store, "real", "0"))
    assert "lbi" not in text.partition("RUN_TOKENS")[0].partition("import")[2]
    defined, tokens = run_here(text, tmp_path / "real.py")
    assert tokens == defined["RUN_TOKENS"]
