"""Where a decode step's time goes: traces as a GPU writes them, with what a sum of durations would get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lbi import compare_traces, timeline
from lbi.decode_trace import MARK, read_steps
from lbi.errors import InputError
from lbi.kernel_kinds import kind_of
from lbi.store import Result, Store


def mark(start: float, length: float, tokens: int = 1) -> dict[str, Any]:
    name = MARK if tokens == 1 else f"{MARK}s {tokens}"
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": length, "tid": 1}


def launch(at: float, number: int, name: str = "cudaLaunchKernel") -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": name, "ts": at, "dur": 1.0, "tid": 1, "args": {"correlation": number}}


def kernel(name: str, start: float, end: float, number: int) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": end - start, "tid": 7, "args": {"correlation": number}}


def found(*events: dict[str, Any]) -> dict[str, Any]:
    return timeline.breakdown(events, read_steps(events), "cuda")


def test_a_kernel_that_waits_for_its_predecessor_does_not_count_that_time() -> None:
    """As with programmatic dependent launch: the second begins at 20 and can do nothing before 50."""
    seen = found(
        mark(0, 10), launch(1, 1), launch(2, 2), kernel("gemv_kernel", 10, 50, 1), kernel("attention", 20, 60, 2)
    )
    assert seen["kinds_ms"] == pytest.approx({"products": 0.040, "attention": 0.010})
    assert seen["ms_per_token"] == pytest.approx(0.050)
    assert seen["overlapped_ms"] == pytest.approx(0.030)
    assert seen["idle_share"] == 0


def test_a_kernel_inside_another_has_no_time_of_its_own() -> None:
    seen = found(mark(0, 5), launch(1, 1), launch(2, 2), kernel("gemm", 10, 90, 1), kernel("Memcpy DtoD", 20, 30, 2))
    assert seen["kinds_ms"] == pytest.approx({"products": 0.080, "copies": 0.0})


def test_idle_time_is_the_host_s_where_it_launched_late() -> None:
    """The second kernel is launched at 70, after the first ended; the third was launched in time."""
    events = [mark(0, 100), launch(1, 1), launch(70, 2), launch(71, 3)]
    events += [kernel("gemm", 10, 40, 1), kernel("gemm", 80, 90, 2), kernel("gemm", 95, 100, 3)]
    seen = found(*events)
    assert seen["waiting_ms"] == pytest.approx(0.040)
    assert seen["between_ms"] == pytest.approx(0.005)
    assert seen["idle_share"] == pytest.approx(45 / 90)
    total = sum(seen["kinds_ms"].values()) + seen["waiting_ms"] + seen["between_ms"]
    assert total == pytest.approx(seen["ms_per_token"])


def test_a_graph_s_kernels_share_its_launch_and_its_tokens() -> None:
    events = [mark(0, 10, tokens=4), launch(1, 1, "cudaGraphLaunch")]
    events += [kernel("norm_product", 20 + 10 * place, 28 + 10 * place, 1) for place in range(8)]
    seen = found(*events)
    assert seen["tokens"] == 4
    assert seen["launches_per_token"] == 2
    assert seen["in_graphs"] == 1
    assert seen["kernels"] == [{"name": "norm_product", "calls": 2.0, "ms": pytest.approx(0.016)}]
    assert seen["between_ms"] == pytest.approx(7 * 0.002 / 4)
    assert seen["waiting_ms"] == 0


def test_what_no_marked_step_launched_is_left_out() -> None:
    """The prefill's kernels, which run while the first step is launched."""
    seen = found(launch(1, 1), mark(5, 10), launch(6, 2), kernel("gemm", 2, 40, 1), kernel("gemv", 40, 50, 2))
    assert seen["ms_per_token"] == pytest.approx(0.010)
    assert found(launch(1, 1), kernel("gemm", 2, 40, 1)) == {}
    assert found(mark(5, 10)) == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "products"),
        ("triton_red_fused__to_copy_mm_mul_3", "products"),
        ("aten::_weight_int4pack_mm_for_cpu", "products"),
        ("norm_product_swiglu", "products"),
        ("pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("triton_per_fused_add_mean_mul_pow_rsqrt_2", "norms"),
        ("aten::mean", "norms"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::copy_", "copies"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor>", "element by element"),
        ("aten::bitwise_and", "unpacking"),
        (
            "at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
            "choice of the token",
        ),
        ("aten::view", "views and allocation"),
        ("triton_red_fused_1", "compiled, of several kinds"),
        ("something_new", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def result(store: Store, run_id: str, seen: dict[str, Any] | None, tpot_s: float) -> Result:
    folder = store.run_folder(run_id, "e0") / "attempt-1"
    folder.mkdir(parents=True)
    outcome = {
        "schema": 1,
        "run_id": run_id,
        "status": "ok",
        "reason": "",
        "attempt": 1,
        "finished": 1.0,
        "seconds": 1.0,
    }
    (folder.parent / "status.json").write_text(json.dumps(outcome))
    files: dict[str, Any] = {
        "metrics": {"metrics": {"tpot_s": tpot_s}},
        "effective": {"timeline": seen} if seen else {},
    }
    files["config"] = {"config": {"model": {"name": "tiny"}, "quantizer": {"name": run_id}}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"schema": 1, **content}))
    read = store.result(run_id, "e0")
    assert read is not None
    return read


def test_two_runs_and_what_costs_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(tmp_path, write=True)
    slow = found(mark(0, 9), launch(1, 1), launch(2, 2), kernel("gemm", 10, 50, 1), kernel("dequantize", 50, 90, 2))
    fast = found(mark(0, 9), launch(1, 1), kernel("gemm", 10, 45, 1))
    runs = [result(store, "aaaaaaaaaaaa", slow, 0.1), result(store, "bbbbbbbbbbbb", fast, 0.04)]
    ours, theirs = (compare_traces.read(store, run) for run in runs)
    first = compare_traces.by_kernel(ours, theirs)[0]
    assert (first.name, first.ours, first.theirs) == ("dequantize", pytest.approx(0.040), 0.0)
    assert first.calls == (1.0, 0.0)
    assert [change.name for change in compare_traces.by_kind(ours, theirs)][:2] == ["unpacking", "products"]
    assert compare_traces.show(store, "", "aaaaaaaaaaaa", "bbbbbbbbbbbb") == 0
    said = capsys.readouterr().out
    assert "A takes 2.50 times as long per token as B, as timed." in said
    assert "+0.040" in said
    assert "the kernel that began first" in said


def test_a_run_without_a_breakdown_says_why(tmp_path: Path) -> None:
    store = Store.open(tmp_path, write=True)
    with pytest.raises(InputError, match="has no breakdown"):
        compare_traces.read(store, result(store, "aaaaaaaaaaaa", None, 0.1))
