"""Ternary layers against float64 products of what they store: the packed kernel, RSR, and torch without either."""

from __future__ import annotations

import shutil
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_quantizers import check, option, quantized

from lbi.errors import NotApplied, Unsupported
from lbi.kernels import cpu_build, rsr_index, ternary_ops
from lbi.quantizers import audit
from lbi.quantizers.ternary_layers import RsrLinear, TernaryLinear, ternarize
from lbi.verdicts import PRUNED, RUN

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in cpu_build.COMPILERS), reason="there is no C++ compiler"
)

SHAPES = [(1, 1), (5, 31), (4, 32), (33, 100), (64, 576), (67, 1000), (130, 129)]
"""(outputs, inputs)."""

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine on which no compiler is found, for code that asks after this."""
    caches = (cpu_build._outcome, ternary_ops.library)
    monkeypatch.setattr(cpu_build, "COMPILERS", ("no-such-compiler",))
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def random_codes(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)


def packed_layer(codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> TernaryLinear:
    return TernaryLinear(ternary_ops.pack(codes), scale, bias, codes.shape[1])


def error(layer: torch.nn.Module, codes: torch.Tensor, scale: torch.Tensor, inputs: torch.Tensor) -> float:
    """Distance of a layer's output from the float64 product, relative to the weights' and inputs' norms."""
    expected = inputs.double() @ (codes.double() * scale.double()).T
    with torch.no_grad():
        found = layer(inputs)
    assert found.dtype == inputs.dtype
    assert found.shape == expected.shape
    # A sum of few random signs may be 0, so the yardstick is what its terms add up to.
    usual = scale.double() * inputs.double().norm() * codes.double().norm() / codes.shape[1] ** 0.5
    return float((found.double() - expected).norm() / max(float(expected.norm()), float(usual), 1e-30))


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packing_is_undone_by_unpacking(outputs: int, inputs: int) -> None:
    codes = random_codes(outputs, inputs)
    packed = ternary_ops.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (outputs, -(-inputs // 32) * 8)
    assert torch.equal(ternary_ops.unpack(packed, inputs), codes)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_both_kernels_are_the_float64_product(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> None:
    codes, scale = random_codes(outputs, inputs), torch.rand(1) + 0.1
    given = torch.randn(rows, inputs).to(dtype)
    packed = packed_layer(codes, scale)
    assert packed.route == "packed cpu kernel"
    assert error(packed, codes, scale, given) < TOLERANCE[dtype]
    assert error(RsrLinear(codes, scale, None), codes, scale, given) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_use_the_threads_that_torch_has(threads: int) -> None:
    before = torch.get_num_threads()
    codes, scale, given = random_codes(515, 576), torch.rand(1), torch.randn(5, 576)
    try:
        torch.set_num_threads(threads)
        assert error(packed_layer(codes, scale), codes, scale, given) < 1e-5
        assert error(RsrLinear(codes, scale, None), codes, scale, given) < 1e-5
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_a_bias_and_inputs_of_any_form_are_taken() -> None:
    codes, scale, bias = random_codes(24, 96), torch.rand(1), torch.randn(24)
    given = torch.randn(96, 2, 3).permute(1, 2, 0)
    expected = given.double() @ (codes.double() * scale.double()).T + bias.double()
    for layer in (packed_layer(codes, scale, bias), RsrLinear(codes, scale, bias)):
        assert torch.allclose(layer(given).double(), expected, atol=1e-5)


@needs_compiler
def test_many_rows_are_unpacked_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, given = random_codes(70, 200), torch.rand(1), torch.randn(9, 200)
    layer = packed_layer(codes, scale)
    by_kernel = layer(given)
    monkeypatch.setattr("lbi.quantizers.ternary_layers.UNPACK_ROWS", 9)
    assert torch.allclose(layer(given), by_kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_a_compiler_torch_gives_the_same_numbers(dtype: torch.dtype) -> None:
    codes, scale = random_codes(67, 1000), torch.rand(1)
    layer = packed_layer(codes, scale)
    assert layer.route == "unpacked by torch"
    assert error(layer, codes, scale, torch.randn(3, 1000).to(dtype)) < TOLERANCE[dtype]
    with pytest.raises(Unsupported, match=r"C.. compiler"):
        RsrLinear(codes, scale, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_a_gpu_torch_unpacks(dtype: torch.dtype) -> None:
    codes, scale = random_codes(67, 1000).cuda(), torch.rand(1).cuda()
    layer = packed_layer(codes, scale)
    assert layer.route == "unpacked by torch"
    inputs = torch.randn(3, 1000).to("cuda", dtype)
    assert error(layer, codes, scale, inputs) < TOLERANCE[dtype]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = layer(inputs)
    graph.replay()
    assert torch.equal(captured, layer(inputs))


def plain_rsr(codes: np.ndarray, vector: np.ndarray, k: int) -> np.ndarray:
    """RSR as the paper has it: permutation, segmentation, sums of segments, times the matrix of all keys."""
    rows = []
    table = (np.arange(2**k)[:, None] >> np.arange(k)) & 1
    for first in range(0, len(codes), k):
        block = np.zeros((k, codes.shape[1]))
        part = codes[first : first + k]
        for sign in (1, -1):
            keys = (1 << np.arange(len(part))) @ (part == sign)
            order = np.argsort(keys, kind="stable")
            ends = np.searchsorted(keys[order], np.arange(2**k + 1))
            sums = np.array([vector[order[a:b]].sum() for a, b in pairwise(ends)])
            block[:, 0] += sign * (sums @ table)
        rows.append(block[: len(part), 0])
    return np.concatenate(rows)


@needs_compiler
@pytest.mark.parametrize("fold", [False, True], ids=["RSR", "RSR++"])
@pytest.mark.parametrize("k", [1, 2, 5, 8, 11, 14])
def test_rsr_is_the_dense_product_for_any_block(k: int, fold: bool) -> None:
    codes, scale = random_codes(37, 203), torch.ones(1)
    index, starts = (torch.from_numpy(part) for part in rsr_index.build(codes.numpy(), k))
    for rows in (1, 9):
        given = torch.randn(rows, 203)
        found = torch.ops.lbi.rsr_linear(given, index, starts, scale, 37, k, fold)
        assert torch.allclose(found.double(), given.double() @ codes.double().T, atol=1e-4)
    reference = plain_rsr(codes.numpy(), given[0].double().numpy(), k)
    assert np.allclose(found[0].numpy(), reference, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("value", [-1, 0, 1])
def test_rsr_of_a_matrix_with_one_value(value: int) -> None:
    codes, scale = torch.full((12, 300), value, dtype=torch.int8), torch.ones(1)
    assert error(RsrLinear(codes, scale, None), codes, scale, torch.randn(1, 300)) < 1e-5


def test_the_block_size_is_that_of_least_work() -> None:
    for columns in (64, 576, 4096, 16384):
        work = {k: columns / k * (columns + 2**k) for k in range(1, 15)}
        assert work[rsr_index.block_size(columns)] == min(work.values())
        assert rsr_index.block_size(columns, fold=False) <= rsr_index.block_size(columns)
    with pytest.raises(ValueError, match="16 bits"):
        rsr_index.build(np.zeros((1, 65_536), dtype=np.int8), 1)
    with pytest.raises(ValueError, match="1 to 14"):
        rsr_index.build(np.zeros((1, 8), dtype=np.int8), 15)


def test_rsr_is_pruned_where_it_cannot_be_built(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbi.rule_table.shutil.which", lambda name: None)
    made = plan("quantizer=bitnet,rsr")
    assert [cell.verdict for cell in made.cells] == [RUN, PRUNED]
    assert made.cells[1].rule == "rsr_can_be_built"


def test_the_scale_is_the_mean_of_the_weights_sizes() -> None:
    weight = torch.randn(50, 70)
    codes, scale = ternarize(weight)
    assert torch.allclose(scale, weight.abs().mean())
    assert torch.equal(codes.float(), (weight / scale).round().clamp(-1, 1))
    zeros, tiny = ternarize(torch.zeros(3, 4))
    assert float(zeros.abs().sum()) == 0
    assert torch.isfinite(tiny).all()


@needs_compiler
@pytest.mark.parametrize("name", ["bitnet", "rsr"])
def test_the_audit_counts_what_is_stored(name: str) -> None:
    config = option(name)
    before, after, layers = quantized(config)
    check(after, layers, config)
    for layer in layers:
        if layer.name == "lm_head":
            continue
        made: Any = after.get_submodule(layer.name)
        if name == "bitnet":
            assert layer.seen.kind == "TernaryLinear[packed cpu kernel]"
            assert layer.seen.bits == 2
            assert layer.stored_bytes == layer.params / 4 + 4
        else:
            assert layer.seen.kind == f"RsrLinear[k={made.k}]"
            assert layer.stored_bytes == 2 * made.index.numel() + 8 * made.starts.numel() + 4
            assert layer.seen.bits == pytest.approx(8 * (layer.stored_bytes - 4) / layer.params)
    assert audit.weight_bytes(after) == sum(layer.stored_bytes for layer in layers)
    for old, new in zip(before.layers, after.layers, strict=True):
        codes, scale = ternarize(old.weight)
        assert error(new, codes, scale, torch.randn(3, old.in_features, dtype=torch.bfloat16)) < 1e-2


@needs_compiler
def test_a_layer_that_was_not_ternarized_is_not_applied() -> None:
    _, after, layers = quantized(option("int8_pack"))
    with pytest.raises(NotApplied, match="hold 8 bits a weight instead of 2"):
        check(after, layers, option("bitnet"))


@needs_compiler
@pytest.mark.parametrize("name", ["bitnet", "rsr"])
def test_torch_compile_takes_both_in_one_graph(name: str) -> None:
    _, after, _ = quantized(option(name), [(96, 96), (96, 160)])
    stack = torch.nn.Sequential(*after.layers)
    compiled = torch.compile(stack, fullgraph=True)
    given = torch.randn(2, 3, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.allclose(compiled(given).float(), stack(given).float(), rtol=2e-2, atol=2e-2)


def build(results: Any) -> None:
    """In a process of its own: build, or find, the library, and say where."""
    results.put(ternary_ops.library()._name)


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_at_once_and_leave_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBI_CACHE", str(tmp_path))
    context = get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=build, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    names = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=30)
    assert [str(path) for path in (tmp_path / "kernels").iterdir()] == list(names)


def test_a_file_that_does_not_compile_says_why(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return nonsense; }\n")
    with pytest.raises(cpu_build.NoKernel, match=r"nonsense|C.. compiler"):
        cpu_build.load(source)
