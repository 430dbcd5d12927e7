"""A user's own quantizer: found without being imported, part of the identity, held to what it says it stores."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import identity, steps
from lbi.config import QuantizerConfig
from lbi.errors import NotApplied, Unsupported
from lbi.model_files import inspect
from lbi.plan import Plan
from lbi.quantizers import assign, audit, custom
from lbi.verdicts import PRUNED, RUN

README = Path(__file__).parent.parent / "README.md"

ROWS = '''
import torch


class Rows(torch.nn.Module):
    """Integers of `bits` bits, one scale a row."""

    def __init__(self, linear, bits):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = torch.nn.Buffer(weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1))
        self.codes = torch.nn.Buffer((weight / self.scale).round().to(torch.int8))

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.codes.to(inputs.dtype) * self.scale)

    def lbi_observed(self):
        return {"kind": "Rows", "bits": 8, "group_size": None, "tensors": [self.codes, self.scale]}


def quantize(linear, name, bits=8):
    return Rows(linear, bits)


number = 3
'''

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module into the current folder, which is not on Python's path; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def written(text: str, name: str = f"quantizer_{tmp_path.name}") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield written
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def setting(target: str, **knobs: Any) -> QuantizerConfig:
    return QuantizerConfig(name="custom", family="custom", method="custom", target=target, **knobs)


def block() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"proj": torch.nn.Linear(64, 96, bias=False), "lm_head": torch.nn.Linear(64, 100, bias=False)}
    ).to(torch.bfloat16)


def quantized(config: QuantizerConfig) -> tuple[torch.nn.Module, list[audit.Layer]]:
    model = block()
    assignment = assign.by_name(model, config)
    assign.apply(model, assignment)
    layers = audit.read_layers(model, frozenset(assignment))
    audit.check(layers, assignment, config.name)
    return model, layers


@torch.no_grad()
def test_the_function_replaces_the_layers_and_the_audit_reads_them(write: Write) -> None:
    model, layers = quantized(setting(f"{write(ROWS)}:quantize", bits=8))
    seen = {layer.name: layer for layer in layers}
    assert not seen["lm_head"].seen.quantized
    assert (seen["proj"].seen.kind, seen["proj"].seen.bits, seen["proj"].params) == ("Rows", 8, 64 * 96)
    assert seen["proj"].stored_bytes == 64 * 96 + 2 * 96
    inputs = torch.randn(3, 64, dtype=torch.bfloat16)
    weight = model["proj"].codes.double() * model["proj"].scale.double()
    product = inputs.double() @ weight.T
    assert (model["proj"](inputs).double() - product).norm() / product.norm() < 1e-2
    off = (weight - block()["proj"].weight.double()).norm() / block()["proj"].weight.double().norm()
    assert 1e-4 < off < 0.01


@torch.no_grad()
def test_options_reach_the_function_and_other_bits_than_asked_are_not_applied(write: Write) -> None:
    name = write(ROWS)
    model, _ = quantized(setting(f"{name}:quantize", options={"bits": 4}))
    assert int(model["proj"].codes.abs().max()) == 7
    with pytest.raises(NotApplied, match="hold 8 bits a weight instead of 4"):
        quantized(setting(f"{name}:quantize", bits=4))


RETURNS = "import torch\ndef quantize(linear, name):\n    return {}\n"
SAYS = (
    "import torch\nclass Mine(torch.nn.Module):\n    def lbi_observed(self):\n        return {}\n"
    "def quantize(linear, name):\n    return Mine()\n"
)
TENSORS = "'tensors': [torch.zeros(10)]"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (RETURNS.format("None"), "returned NoneType for proj; it must return a torch.nn.Module"),
        (RETURNS.format("linear"), "are still Linear"),
        (RETURNS.format("torch.nn.Identity()"), "became a Identity .* cannot read.*lbi_observed"),
        (SAYS.format("{'kind': 'Mine', 'bits': 4}"), r"lacks 'group_size'; lbi reads lbi_observed"),
        (SAYS.format("3"), "cannot be read: it is int"),
        (SAYS.format("{'kind': '', 'bits': 'four', 'group_size': 8, " + TENSORS + "}"), "cannot be read: could not"),
        (SAYS.format("{'kind': '', 'bits': 4, 'group_size': 8, 'tensors': []}"), "at least one tensor"),
        (SAYS.format("{'kind': '', 'bits': 4, 'group_size': 8, 'width': 1, " + TENSORS + "}"), "it has width too"),
        (SAYS.format("{'kind': '', 'bits': 4, 'group_size': 8, " + TENSORS + "}"), "says 4 bits .* room for 0.05"),
    ],
)
def test_what_cannot_be_read_back_is_not_applied(write: Write, text: str, part: str) -> None:
    with pytest.raises(NotApplied, match=part):
        quantized(setting(f"{write(text)}:quantize"))


@pytest.mark.parametrize(
    ("text", "function", "options", "part"),
    [
        ("import no_such_package\ndef quantize(linear, name): ...", "quantize", {}, "could not be imported: ModuleNot"),
        ("import sys\nsys.exit(3)\ndef quantize(linear, name): ...", "quantize", {}, "could not be imported: System"),
        (ROWS, "number", {}, "has no function number"),
        (ROWS, "quantize", {"rank": 4}, "cannot be called with .linear, name. and {'rank': 4}"),
        (ROWS, "quantize", {4: 4}, "cannot be called with"),
    ],
)
def test_a_function_that_cannot_be_had_is_unsupported_before_anything_is_loaded(
    write: Write, text: str, function: str, options: dict[Any, Any], part: str
) -> None:
    with pytest.raises(Unsupported, match=part):
        custom.function(setting(f"{write(text)}:{function}", options=options))


def test_the_plan_finds_the_function_without_importing_it(plan: Callable[..., Plan], write: Write) -> None:
    name = write("raise RuntimeError('it was imported')\ndef quantize(linear, name): ...")
    (cell,) = plan("quantizer=custom", f"quantizer.target={name}:quantize").cells
    assert (cell.verdict, cell.reason) == (RUN, "")
    inside = Path.cwd() / "pack" / "deep"
    inside.mkdir(parents=True)
    (inside.parent / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (inside / "mine.py").write_text(ROWS)
    (cell,) = plan("quantizer=custom", "quantizer.target=pack.deep.mine:quantize").cells
    assert cell.verdict == RUN
    assert not {name, "pack"} & set(sys.modules)


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("null", "is not given: set quantizer.target=module:function"),
        ("no_such_module:quantize", "there is no module no_such_module in the current folder"),
        ("mine.inner:quantize", "there is no module mine.inner"),
        ("json:no_such_function", "__init__.py has no no_such_function"),
        ("mine", "does not name a function"),
        ("'mine:not a name'", "does not name a function"),
        ("broken:quantize", "broken.py is not valid Python"),
    ],
)
def test_a_target_that_is_not_there_is_pruned(plan: Callable[..., Plan], write: Write, target: str, part: str) -> None:
    write(ROWS, "mine")
    write("def quantize(:", "broken")
    (cell,) = plan("quantizer=custom", f"quantizer.target={target}").cells
    assert (cell.verdict, cell.rule) == (PRUNED, "custom_function_is_there")
    assert part in cell.reason


def test_an_edited_quantizer_is_another_setting(plan: Callable[..., Plan], write: Write) -> None:
    def run_id(*overrides: str) -> str:
        return str(plan("quantizer=custom", f"quantizer.target={name}:quantize", *overrides).cells[0].run_id)

    name = write(ROWS)
    first = run_id()
    assert run_id("quantizer.options={bits: 4}") != first
    write(ROWS + "\n# edited\n")
    edited = run_id()
    assert edited != first
    assert run_id("quantizer.options={bits: 4}") not in (first, edited)
    mixed = ["quantizer=mix", f"quantizer.mix={{down_proj: int8_wo, default: 'custom target={name}:quantize'}}"]
    before = plan(*mixed).cells[0].run_id
    write(ROWS)
    assert run_id() == first
    assert plan(*mixed).cells[0].run_id != before


def test_a_quantizer_edited_after_the_plan_is_not_measured_under_the_plans_name(
    plan: Callable[..., Plan], write: Write
) -> None:
    name = write(ROWS)
    (cell,) = plan("quantizer=custom", f"quantizer.target={name}:quantize").cells
    assert cell.config is not None
    assert identity.run_id_of(cell.config, inspect(cell.config.model)) == cell.run_id
    steps.check_request(cell.config, {"run_id": cell.run_id})
    write(ROWS + "\n# edited\n")
    with pytest.raises(Unsupported, match="was edited after the plan was made"):
        steps.check_request(cell.config, {"run_id": cell.run_id})
    nowhere = replace(cell.config, quantizer=replace(cell.config.quantizer, target="gone:quantize"))
    with pytest.raises(Unsupported, match="there is no module gone"):
        steps.check_request(nowhere, {"run_id": cell.run_id})


@pytest.mark.slow
def test_the_whole_way_from_a_file_in_the_current_folder(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    """With the README's own example."""
    (example,) = (block for block in README.read_text().split("```python\n") if block.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(example.split("```")[0])
    (tmp_path / "broken.py").write_text("import no_such_package\ndef quantize(linear, name): ...\n")
    ran = run_lbi(
        *["-m", "model=tiny_random", "tracker=none", "measure=quick", "quality.tokens=256", "sweep.name=own"],
        *["quantizer=custom", "quantizer.target=mine:quantize,broken:quantize", "quantizer.bits=8"],
        timeout=300,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    with (tmp_path / "store" / "sweeps" / "own" / "results.csv").open() as file:
        good, bad = csv.DictReader(file)
    assert good["status"] == "ok", good["reason"]
    assert float(good["quantized_fraction"]) == pytest.approx(294912 / 360448)
    assert 0 < float(good["mean_kld"]) < 0.01
    assert bad["status"] == "unsupported"
    assert "broken could not be imported" in bad["reason"]
