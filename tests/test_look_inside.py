"""Decode steps looked into: real ones on a CPU, and traces as a GPU writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import decode_trace, dequantized, kernels_seen, steps
from lbi.config import LbiConfig
from lbi.decode_trace import MARK, Allocation, Kernel, Step, read_steps
from lbi.engines.hf import HfEngine
from lbi.errors import NotApplied
from lbi.look_inside import look_inside
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.quantizers import torchao
from lbi.record import Record

PROMPT = list(range(1, 25))

SHAPES = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_hidden_layers": 1}
WIDE = [f"model.arch.{name}={value}" for name, value in SHAPES.items()]
"""Layers of 65,536, 32,768 and 196,608 weights: no activation of a decode step is nearly as large."""

WEIGHTS = 2 * 65536 + 2 * 32768 + 3 * 196608
"""Of the one block; the lm_head stays as it is."""


@pytest.fixture
def looked_into(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Record]:
    """What `look_inside` records of a tiny model with these overrides."""

    def look(*overrides: str) -> Record:
        made = plan(*WIDE, *overrides).cells[0]
        assert made.config is not None, made.reason
        config: LbiConfig = made.config
        phases = Phases(tmp_path)
        record = Record(tmp_path, phases)
        with torch.no_grad():
            model = load(config.model, config.engine).model
            layers = steps.quantize(config, model, PROMPT, tmp_path / "tuning.json", record, phases)
            engine = HfEngine(model, config, slots=64)
            if config.compiler.backend != "eager":
                engine.compile()
            engine.generate(PROMPT, 4, seed=0)
            before = model.__dict__.get("forward")
            look_inside(config, engine, model, PROMPT, layers, record, phases)
        assert model.__dict__.get("forward") is before
        return record

    return look


def top(record: Record) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in record.effective["kernels"]["top"]}


def test_kernels_are_counted_by_decode_step(looked_into: Callable[..., Record]) -> None:
    record = looked_into("quantizer=none")
    seen = record.effective["kernels"]
    assert seen["steps"] == decode_trace.LAUNCHES_TAKEN
    taken = record.effective["timeline"]
    assert sum(taken["kinds_ms"].values()) + taken["outside_ms"] == pytest.approx(taken["ms_per_token"], rel=0.01)
    assert taken["kinds_ms"]["products"] > 0
    assert seen["ms_per_step"] > 0
    # Seven layers in the block, and the lm_head.
    assert top(record)["aten::mm"]["calls"] == 8
    assert 0 < sum(item["share"] for item in seen["top"]) <= 1.0001
    assert len(seen["top"]) <= kernels_seen.SHOWN
    assert record.missing["unpacked_bytes_per_token"] == "no layer is quantized in its weights alone"
    assert "dequantized" not in record.effective


@pytest.mark.parametrize("option", ["int8_wo", "hqq4", "intx_sim"])
def test_weights_unpacked_whole_are_found(looked_into: Callable[..., Record], option: str) -> None:
    bits = ["quantizer.bits=4", "quantizer.group_size=32"] if option == "intx_sim" else []
    record = looked_into(f"quantizer={option}", *bits)
    found = record.effective["dequantized"]
    assert (found["layers"], found["per_token_bytes"]) == (7, 2 * WEIGHTS)
    assert record.metrics["unpacked_bytes_per_token"] == 2 * WEIGHTS
    assert found["evidence"].startswith("7 of 7 weights: each of 3 decode steps allocates their size (in ")


@pytest.mark.parametrize(("option", "kernel"), [("int8_pack", "_weight_int8pack_mm"), ("int4_wo", "int4pack_mm")])
def test_a_kernel_that_unpacks_while_it_multiplies_is_not_blamed(
    looked_into: Callable[..., Record], option: str, kernel: str
) -> None:
    record = looked_into(f"quantizer={option}")
    assert record.metrics["unpacked_bytes_per_token"] == 0
    assert [item["calls"] for name, item in top(record).items() if kernel in name] == [7]


def test_a_prefill_that_unpacks_is_not_blamed_on_the_decode_step(looked_into: Callable[..., Record]) -> None:
    """Inductor turns torchao's int8 decode step into the fused kernel; the prefill runs eagerly and unpacks."""
    record = looked_into("quantizer=int8_wo", "compiler=inductor", "cache=static")
    assert top(record)["aten::_weight_int8pack_mm"]["calls"] == 7
    assert record.metrics["unpacked_bytes_per_token"] == 0


@pytest.mark.slow
def test_a_compiled_graph_that_unpacks_is_found_although_its_buffers_are_used_again(
    looked_into: Callable[..., Record],
) -> None:
    record = looked_into("quantizer=hqq8", "compiler=inductor", "cache=static")
    assert record.effective["dequantized"]["layers"] == 7


def test_of_a_mix_the_part_that_unpacks_is_counted(looked_into: Callable[..., Record]) -> None:
    record = looked_into("quantizer=mix", "quantizer.mix={down_proj: int8_wo, default: int8_pack}")
    found = record.effective["dequantized"]
    assert (found["layers"], found["per_token_bytes"]) == (1, 2 * 196608)
    assert record.effective["torchao_extensions"].keys() == {"loaded", "failed", "skipped"}


def test_kernels_that_were_expected_and_not_seen_are_no_number(
    looked_into: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    expecting = replace(torchao.METHODS["int8_wo"], kernels={"cpu": "int8pack"})
    monkeypatch.setitem(torchao.METHODS, "int8_wo", expecting)
    with pytest.raises(NotApplied, match=r"int8_wo: kernels int8pack were expected and the decode step ran aten::"):
        looked_into("quantizer=int8_wo")
    # Of a mix every part is held to its own kernels, and a skipped layer to none.
    with pytest.raises(NotApplied, match="int8_wo: kernels int8pack"):
        looked_into("quantizer=mix", "quantizer.mix={down_proj: int8_wo, default: int4_wo}")
    looked_into("quantizer=mix", "quantizer.mix={default: int8_pack}")


def test_a_compiled_graph_on_a_cpu_is_not_held_to_names(plan: Callable[..., Plan]) -> None:
    config = plan("quantizer=int8_pack").cells[0].config
    assert config is not None
    ran = [Step(ops=[Kernel("inductor's own", 1.0)])]
    kernels_seen.check(ran, [config.quantizer], "cpu", "inductor")
    kernels_seen.check([Step()], [config.quantizer], "cuda", "eager")
    with pytest.raises(NotApplied):
        kernels_seen.check(ran, [config.quantizer], "cpu", "eager")
    gpu = [Step(kernels=[Kernel("void gemv<c10::BFloat16>(int)", 1.0)])]
    with pytest.raises(NotApplied, match="the decode step ran gemv"):
        kernels_seen.check(gpu, [config.quantizer], "cuda", "inductor")


class Trace:
    """A chrome trace in the making, in microseconds, as torch.profiler writes one."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "ts": 0, "pid": 7, "tid": 0}]
        self.now, self.correlation = 1000.0, 0

    def step(self, *allocations: tuple[int, str], marked: bool = True, kernels: Any = (), graph: bool = False) -> None:
        """A forward pass that takes memory and launches `kernels` (name, grid, block), which run much later."""
        start = self.now
        for size, by in allocations:
            self._add("cpu_op", by, 4.0)
            about = {"Bytes": size, "Device Type": 1, "Addr": 1}
            self.events.append(
                {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 7, "tid": 7, "ts": self.now + 1}
                | {"args": about}
            )
            self.now += 10
        for number, (name, grid, block) in enumerate(kernels):
            if number == 0 or not graph:
                self.correlation += 1
                call = "cudaGraphLaunch" if graph else "cudaLaunchKernel"
                self._add("cuda_runtime", call, 2.0, correlation=self.correlation)
            self.now += 3
            where = {"correlation": self.correlation, "grid": grid, "block": block, "stream": 7}
            self.events.append(
                {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": self.now + 5e5, "dur": 2.0}
                | {"args": where}
            )
        if marked:
            self.events.append(
                {"ph": "X", "cat": "user_annotation", "name": MARK, "pid": 7, "tid": 7, "ts": start - 1}
                | {"dur": self.now - start + 2}
            )
            self.events.append(
                {"ph": "X", "cat": "gpu_user_annotation", "name": MARK, "pid": 0, "tid": 7, "ts": start + 5e5}
                | {"dur": 9.0}
            )
        self.now += 100

    def _add(self, kind: str, name: str, dur: float, **about: Any) -> None:
        self.events.append(
            {"ph": "X", "cat": kind, "name": name, "pid": 7, "tid": 7, "ts": self.now, "dur": dur, "args": about}
        )


SIZES = {4096 * 14336: 3, 4096 * 4096: 2, 4096 * 1024: 2}
"""One block of an 8B Llama."""

UNPACKED = [(2 * numel, "aten::_to_copy") for numel, layers in SIZES.items() for _ in range(layers)]


def find(trace: Trace, device: str = "cuda", compiled: bool = False) -> dequantized.Written:
    return dequantized.find(read_steps(trace.events), SIZES, 2, device, compiled=compiled)


@pytest.mark.parametrize("times", [1, 3, 12])
def test_a_prefill_alone_is_never_flagged_however_often_it_copies(times: int) -> None:
    trace = Trace()
    trace.step(*UNPACKED * times, marked=False)
    for _ in range(3):
        trace.step((4096, "aten::mul"))
    assert find(trace).per_token_bytes == 0


def test_every_decode_step_must_do_it() -> None:
    trace = Trace()
    for blocks in (UNPACKED, UNPACKED, []):
        trace.step(*blocks)
    assert find(trace).per_token_bytes == 0


@pytest.mark.parametrize("rounding", [0, 512, (2 << 20) - 1])
def test_blocks_as_the_cuda_allocator_rounds_them(rounding: int) -> None:
    trace = Trace()
    for _ in range(3):
        trace.step(*((size + rounding, by) for size, by in UNPACKED))
    found = find(trace)
    assert (found.layers, found.per_token_bytes) == (7, sum(size for size, _ in UNPACKED))
    assert "aten::_to_copy" in found.evidence
    # A CPU's blocks are not rounded.
    assert find(trace, "cpu").layers == (7 if rounding == 0 else 0)


def test_what_is_copied_several_times_is_counted_once_and_float32_too() -> None:
    trace = Trace()
    for _ in range(3):
        trace.step(*UNPACKED * 3)
    assert find(trace).per_token_bytes == sum(size for size, _ in UNPACKED)
    trace = Trace()
    for _ in range(3):
        trace.step(*((2 * size, by) for size, by in UNPACKED))
    assert find(trace, "cpu").per_token_bytes == 2 * sum(size for size, _ in UNPACKED)


def test_keys_values_and_workspaces_of_a_weights_size_are_no_weights() -> None:
    trace = Trace()
    projection, square = 2 * 4096 * 1024, 2 * 4096 * 4096
    for _ in range(3):
        # A cache of 1,024 positions, copied; its expansion; cuBLASLt's workspace at every layer.
        trace.step(*[(2 * 4096 * 14336, "aten::cat")] * 3, *[(projection, "aten::clone")] * 2)
        trace.step(*[(projection, "aten::clone")] * 2, *[(square, "aten::addmm")] * 7)
    assert find(trace).per_token_bytes == 0


POINTWISE = ("triton_poi_fused__to_copy_mul_3", [57344, 1, 1], [128, 1, 1])
"""1,024 elements a block: 58.7 million."""


def test_a_cuda_graph_is_judged_by_what_its_replay_launches() -> None:
    small = ("triton_poi_fused_mul_silu_5", [14, 1, 1], [128, 1, 1])
    product = ("void gemv2T_kernel_val<int, int, __nv_bfloat16>(int)", [57344, 1, 1], [128, 1, 1])
    trace, fused = Trace(), Trace()
    trace.step(marked=False, kernels=[POINTWISE] * 40)
    fused.step(marked=False, kernels=[POINTWISE] * 40)
    for _ in range(3):
        trace.step(kernels=[POINTWISE, small, product] * 7, graph=True)
        fused.step(kernels=[small, product] * 40, graph=True)
    found = find(trace, compiled=True)
    assert (found.layers, found.per_token_bytes) == (7, sum(size for size, _ in UNPACKED))
    assert "elementwise kernels" in found.evidence
    assert find(fused, compiled=True).per_token_bytes == 0
    # Eagerly each weight that is written takes memory, so kernels alone are no evidence.
    assert find(trace, compiled=False).per_token_bytes == 0


def test_kernels_belong_to_the_step_that_launched_them() -> None:
    trace = Trace()
    trace.step(marked=False, kernels=[POINTWISE])
    for _ in range(2):
        trace.step((512, "aten::mul"), kernels=[POINTWISE, ("Memcpy DtoD", [1], [1])])
    first, second = read_steps(trace.events)
    assert [kernel.name for kernel in first.kernels] == ["triton_poi_fused__to_copy_mul_3", "Memcpy DtoD"]
    assert first.kernels[0].threads == 57344 * 128
    assert second.allocations == [Allocation(512, "aten::mul")]
    seen = kernels_seen.summary([first, second], "cuda")
    assert Counter({item["name"]: item["calls"] for item in seen["top"]})["Memcpy DtoD"] == 1
    assert seen["ms_per_step"] == pytest.approx(4e-3)


def test_an_operators_own_time_leaves_out_what_it_calls() -> None:
    def op(name: str, start: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "cpu_op", "name": name, "tid": 7, "ts": start, "dur": dur}

    mark = {"ph": "X", "cat": "user_annotation", "name": MARK, "tid": 7, "ts": 0.0, "dur": 100.0}
    elsewhere = op("another thread's", 20, 60) | {"tid": 8}
    (step,) = read_steps([op("inner", 10, 30), op("outer", 10, 50), op("later", 60, 5), mark, elsewhere])
    assert [(found.name, round(found.seconds * 1e6)) for found in step.ops] == [
        ("outer", 20),
        ("inner", 30),
        ("later", 5),
    ]


def test_a_trace_without_a_decode_step_says_so() -> None:
    assert read_steps([]) == []
    assert kernels_seen.summary([], "cuda") == {"missing": "the profiler saw no kernel in a decode step"}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("aten::_weight_int8pack_mm", "aten::_weight_int8pack_mm"),
        ("triton_red_fused__to_copy_mm_4", "triton_red_fused__to_copy_mm_4"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("## Call CompiledFxGraph fmfabc ##", "inductor's own code (CompiledFxGraph)"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)",
            "at::native::vectorized_elementwise_kernel<CUDAFunctor_add>",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
            "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const>(int)",
            "at::native::elementwise_kernel<direct_copy_kernel_cuda>",
        ),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, int>(int)",
            "at::native::CatArrayBatchedCopy",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)",
            "cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        ),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"),
        ("kernel_of_mine(int, float)", "kernel_of_mine"),
    ],
)
def test_names_of_kernels_are_shortened(name: str, short: str) -> None:
    assert kernels_seen.shorten(name) == short


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("compiled", [[], ["compiler=inductor", "cache=static"], ["compiler=inductor_reduce_overhead"]])
def test_on_a_gpu_the_same_is_seen(looked_into: Callable[..., Record], compiled: list[str]) -> None:
    record = looked_into("quantizer=hqq8", "engine.device=cuda", "cache=static", *compiled)
    assert record.effective["dequantized"]["layers"] > 0
    assert "missing" not in record.effective["kernels"]
    fused = looked_into("quantizer=int8_pack", "engine.device=cuda", "cache=static", *compiled)
    assert fused.metrics["unpacked_bytes_per_token"] == 0
