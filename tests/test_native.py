"""lbi's own formats and kernels: packing, rounding, layers on a CPU, and the Triton kernels without a GPU."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import FORMS, Form, error, random_codes, random_matrix
from test_fused import CONFIG, expected, llama
from test_fused import off as off_from
from test_quantizers import check, quantized

from lbi.engines.fused import FusedEngine
from lbi.errors import NotApplied
from lbi.kernels.formats import BITS, ZERO, Packed, interleaved, pack, positions, stacked, unpack
from lbi.plan import Plan
from lbi.quantizers import assign, audit, autoquant, native
from lbi.quantizers.native_layers import NativeLinear
from lbi.quantizers.native_rounding import packed
from lbi.quantizers.options import option
from lbi.verdicts import PRUNED, RUN

HERE = Path(__file__).parent

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

OPTIONS = [
    "native_w8",
    "native_fp8",
    "native_w4",
    "native_w4 group_size=32",
    "native_w4 group_size=64 qparams=rtn",
    "native_w4 qparams=rtn symmetric=true",
    "native_w4 group_size=null",
    "native_w4 group_size=null qparams=rtn symmetric=true",
    "native_w2",
    "native_w2 group_size=128 qparams=rtn",
    "native_w158",
]


def fresh_width(unit: int) -> int:
    """A multiple of a format's words that differs from call to call."""
    return unit * int(torch.randint(1, 9, ()).item())


def linear(text: str, dtype: torch.dtype = torch.float32, spread: float = 0.02) -> Any:
    """A layer of a random shape that the option can store."""
    made = option(text)
    inputs = fresh_width(max(64, made.group_size or 0))
    layer = torch.nn.Linear(inputs, int(torch.randint(8, 200, ()).item())).to(dtype)
    with torch.no_grad():
        layer.weight.normal_(0, spread)
    return layer


# Formats


@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name].format in ZERO])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_packing_is_undone_by_unpacking_and_has_its_fields_where_it_says(name: str, rows: int) -> None:
    form = FORMS[name]
    bits, inputs = BITS[form.format], fresh_width(form.unit)
    codes = random_codes(form, rows, inputs)
    words = pack(codes, bits)
    assert words.shape == (rows, inputs * bits // 32)
    assert torch.equal(unpack(words, bits), codes)
    where = positions(bits, inputs)
    for field in range(where.shape[1]):
        found = words.long() >> (bits * field) & (2**bits - 1)
        assert torch.equal(found, codes[:, where[:, field]].long())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_that_do_not_fill_four_words_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of {128 // bits}"):
        pack(torch.zeros(2, 128 // bits + 1), bits)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_stacked_and_interleaved_without_unpacking(name: str) -> None:
    form = FORMS[name]
    inputs = 4 * max(form.unit, form.group or 1)
    one, other = (random_matrix(form, rows, inputs, torch.bfloat16) for rows in (5, 5))
    both = torch.stack([one.dequantize(), other.dequantize()])
    assert torch.equal(stacked([one, other]).dequantize(), both.view(10, inputs))
    assert torch.equal(interleaved(one, other).dequantize(), both.transpose(0, 1).reshape(10, inputs))
    third = random_matrix(form, 3, inputs, torch.bfloat16)
    assert torch.equal(stacked([third, one]).dequantize(), torch.cat([third.dequantize(), one.dequantize()]))


def test_what_does_not_fit_together_is_not_stacked() -> None:
    grouped, rows = (random_matrix(FORMS[name], 4, 128, torch.float32) for name in ("w4 g32", "w4 row"))
    with pytest.raises(ValueError, match="group_size 128 does not fit 32"):
        stacked([grouped, rows])
    with pytest.raises(ValueError, match="with and without zeros"):
        stacked([grouped, random_matrix(FORMS["w4 g32 symmetric"], 4, 128, torch.float32)])


def test_dequantizing_leaves_what_is_stored_alone() -> None:
    matrix = random_matrix(FORMS["w4 g32"], 4, 64, torch.float32)
    before = [tensor.clone() for tensor in matrix.tensors()]
    matrix.dequantize()
    assert all(torch.equal(old, new) for old, new in zip(before, matrix.tensors(), strict=True))


# Rounding


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("text", OPTIONS)
def test_a_layers_output_is_its_stored_weights_product(text: str, dtype: torch.dtype) -> None:
    plain = linear(text, dtype)
    layer = NativeLinear.of(plain, option(text))
    for rows in (1, 3, 20):
        x = torch.randn(rows, plain.in_features).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert error(y, layer.matrix(), x, plain.bias) < TOLERANCE[dtype]
    assert layer(x.view(4, 5, -1)).shape == (4, 5, plain.out_features)
    grouped = layer.scales.shape[1] > 1
    assert layer.scales.dtype == (dtype if grouped else torch.float32)
    assert layer.zeros is None or layer.zeros.dtype == layer.scales.dtype


def off(text: str, weight: torch.Tensor, norm: float = 2.0) -> float:
    """How far the stored weights are from those given, relative, in some norm."""
    lost = (packed(weight, option(text)).dequantize().double() - weight.double()).abs()
    return float(lost.pow(norm).sum() / weight.double().abs().pow(norm).sum()) ** (1 / norm)


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight = (torch.randn(256, 1024) * 0.02).to(torch.bfloat16)
    ladder = ["native_w8", "native_w4 group_size=32", "native_w4", "native_w4 group_size=null", "native_w2"]
    found = [off(text, weight) for text in ladder]
    assert found == sorted(found)
    assert 1e-4 < found[0] < 0.01
    assert found[2] < 0.12
    assert off("native_fp8", weight) < 0.04
    # A lower end at the largest weight: 1/8 of it a step, where 1/7 would lose 0.118 of a normal distribution.
    assert off("native_w4 qparams=rtn symmetric=true", weight) < 0.11
    assert found[-1] < off("native_w158", weight) < 0.6


@pytest.mark.parametrize("text", ["native_w4", "native_w4 group_size=32", "native_w4 group_size=null", "native_w2"])
@pytest.mark.parametrize("heavy", [False, True])
def test_hqq_is_nearer_in_the_norm_that_it_minimizes(text: str, heavy: bool) -> None:
    weight = torch.distributions.StudentT(4.0 if heavy else 1e4).sample((256, 512)) * 0.02
    assert off(f"{text} qparams=hqq", weight, norm=0.7) < off(f"{text} qparams=rtn", weight, norm=0.7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("text", OPTIONS)
def test_groups_of_one_value_and_huge_outliers_stay_finite(text: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 256) * 0.02
    weight[0] = 0.0
    weight[1], weight[2] = 0.37, -0.37
    weight[3, 7], weight[4, 9] = 6e4, -6e4
    weight = weight.to(dtype)
    stored = packed(weight, option(text)).dequantize()
    assert torch.isfinite(stored).all()
    assert (stored[0] == 0).all()
    if option(text).method != "w158":
        assert torch.allclose(stored[1:3], weight[1:3].float(), rtol=5e-3)
        # The opposite of the largest is one step short of 16 around a zero in the middle.
        assert stored[3, 7] == pytest.approx(6e4, rel=0.01)
        assert stored[4, 9] == pytest.approx(-6e4, rel=0.01)


def test_the_weights_given_are_left_as_they_are() -> None:
    for text in OPTIONS:
        weight = torch.randn(8, 256)
        before = weight.clone()
        packed(weight, option(text))
        assert torch.equal(weight, before), text


def test_ternary_weights_are_bitnets() -> None:
    from lbi.quantizers.ternary_layers import ternarize

    weight = torch.randn(24, 128)
    codes, scale = ternarize(weight)
    assert torch.equal(packed(weight, option("native_w158")).dequantize(), codes.float() * scale)


# Layers


@pytest.mark.parametrize("text", OPTIONS)
def test_the_audit_reads_what_is_stored(text: str) -> None:
    config = option(text)
    shapes = [(256, 96), (512, 64)]
    _, after, layers = quantized(config, shapes)
    check(after, layers, config)
    body = [layer for layer in layers if layer.name != "lm_head"]
    assert {layer.seen.kind for layer in body} == {f"NativeLinear[{config.method}, torch]"}
    assert all(layer.seen.bits == config.bits for layer in body)
    stored = sum(tensor.nbytes for layer in after.layers for tensor in layer.matrix().tensors())  # type: ignore[operator]
    assert sum(layer.stored_bytes for layer in body) == stored


def test_a_layer_that_cannot_be_stored_is_not_applied() -> None:
    for text, reason in (
        ("native_w4", "layers.0: quantizer.group_size=128 does not divide 192 inputs"),
        ("native_w2 group_size=96", "quantizer.group_size=96: .* has groups of a multiple of 64"),
        ("native_w4 symmetric=true group_size=64", "no zeros for hqq to move: set quantizer.qparams=rtn"),
        ("native_w4 qparams=magic group_size=64", "qparams=magic: .* finds its scales and zeros by rtn or hqq"),
    ):
        with pytest.raises(NotApplied, match=reason):
            quantized(option(text), [(192, 64)])
    with pytest.raises(NotApplied, match=r"layers\.0: native_w8 wants rows of a multiple of 16, not 40"):
        quantized(option("native_w8"), [(40, 64)])


def test_the_lm_head_may_be_stored_alike() -> None:
    _, after, layers = quantized(replace(option("native_w8"), lm_head="same"))
    assert {layer.seen.kind for layer in layers} == {"NativeLinear[w8, torch]"}
    assert isinstance(after.lm_head, NativeLinear)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_layer_compiles_as_one_graph(rows: int) -> None:
    layer = NativeLinear.of(linear("native_w4", torch.bfloat16), option("native_w4"))
    x = torch.randn(1, rows, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_the_operator_is_what_torch_expects_of_one() -> None:
    for name in ("plain", "w4 g32", "w158"):
        matrix = random_matrix(FORMS[name], 24, 128, torch.float32)
        given = (torch.randn(3, 128), matrix.data, matrix.scales, matrix.zeros, torch.randn(24), matrix.format)
        torch.library.opcheck(torch.ops.lbi.packed_linear, given)


@pytest.mark.parametrize("text", OPTIONS)
def test_layers_that_adopt_rows_of_one_matrix_give_what_they_gave(text: str) -> None:
    layers = [NativeLinear.of(torch.nn.Linear(256, 24, bias=False), option(text)) for _ in range(2)]
    x = torch.randn(3, 256)
    before = [layer(x) for layer in layers]
    both = interleaved(layers[0].matrix(), layers[1].matrix())
    for number, layer in enumerate(layers):
        taken = [None if tensor is None else tensor[number::2] for tensor in (both.data, both.scales, both.zeros)]
        layer.adopt(Packed(both.format, both.inputs, *taken))
        assert layer.data.untyped_storage().data_ptr() == both.data.untyped_storage().data_ptr()
        assert torch.equal(layer(x), before[number])
        seen = native.observe(layer)
        assert seen is not None
        assert seen.bits == option(text).bits


@pytest.mark.parametrize("text", ["native_w8", "native_fp8", "native_w4 group_size=64", "native_w2", "native_w158"])
def test_the_fused_engine_reads_them_as_they_are(text: str) -> None:
    model = llama(intermediate_size=256)
    assign.apply(model, assign.by_name(model, replace(option(text), lm_head="same")))
    before, prompt = audit.weight_bytes(model), list(range(1, 12))
    tokens, logits = expected(model, prompt, 5)
    engine = FusedEngine(model, CONFIG, slots=32)
    found = engine.generate(prompt, 5, seed=0, inspect=True)
    assert found.tokens == tokens
    assert found.logits is not None
    assert off_from(found.logits, logits) < 1e-4
    assert audit.weight_bytes(model) == before
    assert torch.equal(expected(model, prompt, 5)[1], logits)


# The plan


def verdicts(made: Plan) -> list[tuple[str, str]]:
    return [(cell.verdict, cell.rule) for cell in made.cells]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("quantizer=native_w8,native_fp8,native_w4,native_w2,native_w158",), (RUN, "")),
        (("quantizer=native_w4", "quantizer.group_size=32,64,128,null"), (RUN, "")),
        (("quantizer=native_w4", "quantizer.group_size=256"), (PRUNED, "group_divides_rows")),
        (("quantizer=native_w4", "quantizer.group_size=48"), (PRUNED, "group_divides_rows")),
        (("quantizer=native_w2", "quantizer.group_size=32"), (PRUNED, "native_forms")),
        (("quantizer=native_w4", "quantizer.symmetric=true"), (PRUNED, "native_forms")),
        (("quantizer=native_w4", "quantizer.qparams=magic"), (PRUNED, "native_forms")),
        (("quantizer=native_w8", "++quantizer.group_size=64"), (PRUNED, "unused_quantizer_knob")),
    ],
)
def test_the_plan_knows_what_can_be_stored(
    plan: Callable[..., Plan], overrides: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert set(verdicts(plan(*overrides))) == {expected}


def test_autoquant_does_not_time_what_has_no_kernel_here(plan: Callable[..., Plan]) -> None:
    config = plan("quantizer=autoquant", "quantizer.candidates=[int8_pack,native_w8]").cells[0].config
    assert config is not None
    usable, refused = autoquant.usable_candidates(config)
    assert list(usable) == ["none", "int8_pack"]
    assert refused == {"native_w8": "native_w8 has no kernel on a CPU"}


@pytest.mark.slow
def test_the_whole_way_to_the_table(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    done = run_lbi(
        *("-m", "model=tiny_random", "tracker=none", "measure=brief", "sweep.name=native", "sweep.prune=false"),
        *("quantizer=native_w4", "quantizer.group_size=64,80", "compiler=eager"),
    )
    with (tmp_path / "store" / "sweeps" / "native" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "not_applied"], done.stdout
    effective = json.loads((Path(rows[0]["folder"]) / "effective.json").read_text())
    found = {(kind["kind"], kind["bits"], kind["group_size"]) for kind in effective["weights"]["kinds"]}
    assert found == {("NativeLinear[w4, torch]", 4.0, 64), ("Linear[bfloat16]", 16.0, None)}
    assert effective["one_row"]["error"] < 0.01
    assert "group_size=80 does not divide 256 inputs" in rows[1]["reason"]


# The Triton kernels, without a GPU


def printed(script: str, folder: Path, **variables: str) -> list[dict[str, Any]]:
    """The JSON lines of a script beside this file."""
    given = {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **given, **variables},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    rows = printed("interpreted.py", tmp_path_factory.mktemp("interpreted"))
    return {row["form"]: row for row in rows}


@needs_triton
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.slow
def test_the_interpreted_kernels_are_the_float64_product(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    found = interpreted[name]
    # Fields of a byte are multiplied by scaled inputs: by up to 64 at 2 bits, which float32 pays for in digits.
    assert found["float32"] < (1e-4 if name.startswith(("w2", "w158")) else 1e-5)
    # The interpreter cuts bfloat16 off where a GPU rounds it, at twice the error.
    assert found["bfloat16"] < 5e-3
    assert found["small"] < 1e-5
    assert found["unpacked"] < 1e-6
    assert found["unequal"] == 0


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    found = printed("compiled.py", tmp_path, TRITON_CACHE_DIR=str(tmp_path / "triton"))
    assert len(found) == 10
    assert [row for row in found if row["problem"]] == []


@needs_triton
@pytest.mark.slow
def test_the_benchmark_goes_its_whole_way_without_a_gpu(tmp_path: Path) -> None:
    """It tunes, writes and reads tiles, and prints a table; what cannot be here are times that mean anything."""
    given = ["--dry-run", "--tune", "--candidates", "1", "--forms", "w8,w4 g32", "--rows", "1,3", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "benchmarks" / "gemv.py"), *given, "--json", "found.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "found.json").read_text())
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("tuned"), kinds.count("linear"), kinds.count("product")) == (4, 4, 8)
    assert all(row["error"] < 1e-4 for row in rows if row["kind"] == "product")
    assert all(row["tuned"] for row in rows if row["kind"] == "product" and row["tokens"] == 1)


def test_forms_and_formats_are_the_same_list() -> None:
    assert {form.format for form in FORMS.values()} == set(BITS)
    assert Form("w4").unit == 32
    assert Packed("plain", 3, torch.ones(2, 3)).rows == 2
