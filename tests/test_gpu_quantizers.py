"""Every quantizer that a GPU can run: a layer's output against the float64 product of what it stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact_inputs import exact_inputs

from lbi import rules
from lbi.config import LbiConfig
from lbi.model_files import ModelFacts
from lbi.quantizers import assign, audit
from lbi.quantizers.native_layers import NativeLinear
from lbi.quantizers.options import option

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

CONF = Path(__file__).parent.parent / "conf" / "quantizer"

SHAPES = [(2048, 768)]

BARE = ("mix", "autoquant", "custom", "checkpoint", "none")

VARIANTS = [
    *sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in BARE),
    "int4_wo group_size=64",
    "int4_wo group_size=128",
    "int4_wo group_size=256",
    "int4_wo group_size=64 qparams=hqq",
    "int4_wo group_size=128 packing=plain",
    "int4_wo group_size=128 packing=preshuffled",
    "fp8_wo granularity=tensor",
    "fp8_da granularity=tensor",
    "int8_da granularity=tensor",
    "hqq4 backend=torchao_int4",
    "hqq8 backend=gemlite",
    "hqq4 backend=gemlite",
    "hqq2 backend=gemlite",
    "hqq1 backend=gemlite",
    "mx_sim bits=8",
]

NATIVE = [
    "native_w8",
    "native_fp8",
    "native_w4",
    "native_w4 qparams=rtn",
    "native_w4 qparams=rtn symmetric=true",
    "native_w4 group_size=64",
    "native_w4 group_size=32",
    "native_w4 group_size=32 qparams=rtn symmetric=true",
    "native_w4 group_size=null",
    "native_w2",
    "native_w2 group_size=128 qparams=rtn",
    "native_w158",
]
VARIANTS += [name for name in NATIVE if name not in VARIANTS]


LARGEST = {"gemlite_a8w4": 0.06}
"""Relative errors above 0.01 that are known: A8W4 rounds its weights to fp8 for many rows and not for one."""


def refused(name: str, whole: LbiConfig) -> str | None:
    """Why the rules keep this option from this GPU."""
    found = rules.refuse(
        replace(whole, quantizer=option(name)), ModelFacts(None, None, None), rules.Machine.here("cuda")
    )
    return found[1] if found else None


def stored_weights(layer: torch.nn.Module, inputs: int) -> torch.Tensor:
    """(outputs, inputs) in float64, from products with unit vectors.

    Six at a time, as in the test: GemLite tunes a kernel of its own, for seconds, for other numbers of rows.
    """
    units = torch.eye(-(-inputs // 6) * 6, inputs, dtype=torch.bfloat16, device="cuda")
    return torch.cat([layer(rows) for rows in units.split(6)])[:inputs].double().T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_layers_output_is_its_stored_weights_product(
    name: str, shape: tuple[int, int], plan: object, record_property: object
) -> None:
    made = plan("engine.device=cuda", "model.dtype=bfloat16")  # type: ignore[operator]
    reason = refused(name, made.cells[0].config)
    if reason is not None:
        pytest.skip(reason)
    config = option(name)
    block = torch.nn.ModuleDict({"layer": torch.nn.Linear(*shape, bias=False)}).to("cuda", torch.bfloat16)
    original = block["layer"].weight.detach().double()
    with torch.no_grad():
        assignment = assign.by_name(block, config)
        assign.apply(block, assignment)
        layers = audit.read_layers(block, frozenset(assignment))
        audit.check(layers, assignment, config.name)
        weight = stored_weights(block["layer"], shape[0])
        for rows in (1, 6):
            given = exact_inputs(config, rows, shape[0], "cuda")
            product = given.double() @ weight.T
            error = (block["layer"](given).double() - product).norm() / product.norm()
            assert error < LARGEST.get(name, 1e-2), f"{rows} rows: {error:.4f}"
        off = (weight - original).norm() / original.norm()
    assert 1e-4 < off < 1.0


def native(name: str, inputs: int, outputs: int, dtype: torch.dtype, plan: object) -> NativeLinear:
    """A layer of lbi's own; skips the test where the rules keep it from this GPU."""
    made = plan("engine.device=cuda", f"model.dtype={str(dtype).removeprefix('torch.')}")  # type: ignore[operator]
    reason = refused(name, made.cells[0].config)
    if reason is not None:
        pytest.skip(reason)
    layer = torch.nn.Linear(inputs, outputs).to("cuda", dtype)
    return NativeLinear.of(layer, option(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_every_kernel_of_a_native_layer_is_the_product_of_what_is_stored(
    name: str, dtype: torch.dtype, plan: object
) -> None:
    """One token, a few and many have kernels of their own; rows and inputs leave every tile a rest."""
    layer = native(name, 1152 if "null" in name else 1280, 517, dtype, plan)
    assert layer.kind == f"NativeLinear[{layer.format}]"
    weight = layer.matrix().dequantize().double()
    for rows in (1, 2, 5, 16, 17):
        x = torch.randn(rows, layer.in_features, device="cuda").to(dtype)
        y = layer(x)
        expected = x.double() @ weight.T + layer.bias.double()
        error = float((y.double() - expected).norm() / expected.norm())
        # Rounding the output to bfloat16 is 1.65e-3 alone; several rows round the weights alike, for the tensor cores.
        bound = 2e-4 if dtype == torch.float32 else 2e-3 if rows == 1 else 3.5e-3
        assert error < bound, f"{rows} rows: {error:.2e}"
        assert torch.equal(y, layer(x)), f"{rows} rows: the same inputs gave other bits"


@pytest.mark.parametrize("name", ["native_w8", "native_w4", "native_w2"])
def test_a_native_layer_can_be_captured_and_compiled(name: str, plan: object) -> None:
    layer = native(name, 4096, 1024, torch.bfloat16, plan)
    with torch.no_grad():
        for rows in (1, 4):
            x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
            expected = layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(x)
            x.normal_()
            graph.replay()
            assert not torch.equal(captured, expected)
            assert torch.equal(captured, layer(x))
            assert torch.equal(torch.compile(layer, fullgraph=True)(x), captured)
