"""What each quantizer stores, against the float64 product of what it says it stores; and the audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from exact_inputs import exact_inputs

from lbi.config import LbiConfig, QuantizerConfig
from lbi.errors import NotApplied
from lbi.quantizers import assign, audit, method
from lbi.typed import build

CONF = Path(__file__).parent.parent / "conf" / "quantizer"

SHAPES = [(64, 96), (256, 64), (192, 320)]


def option(name: str, **knobs: Any) -> QuantizerConfig:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    made: QuantizerConfig = build(get_type_hints(LbiConfig)["quantizer"], content, "quantizer")
    return replace(made, **knobs)


class Block(torch.nn.Module):
    """Linear layers of several widths and an lm_head, as in a decoder."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(i, o, bias=False) for i, o in shapes)
        self.lm_head = torch.nn.Linear(shapes[0][0], 100, bias=False)


def quantized(
    config: QuantizerConfig, shapes: list[tuple[int, int]] = SHAPES
) -> tuple[Block, Block, list[audit.Layer]]:
    """A block before and after quantization, and the audit's reading of it."""
    torch.manual_seed(int(torch.randint(1 << 30, ()).item()))
    before = Block(shapes).to(torch.bfloat16)
    after = Block(shapes).to(torch.bfloat16)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        assign.apply(after, assign.by_name(after, config))
    return before, after, audit.read_layers(after, assign.linear_names(before))


def check(after: Block, layers: list[audit.Layer], config: QuantizerConfig) -> None:
    """The audit's verdict on layers that were to be stored as `config` says."""
    plain = Block([(1, 1)] * len(after.layers))
    audit.check(layers, assign.by_name(plain, config), config.name)


OPTIONS = [
    ("int8_pack", {}, 8, 0.01),
    ("int8_wo", {}, 8, 0.01),
    ("int4_wo", {"group_size": 32}, 4, 0.12),
    ("int4_wo", {"group_size": 64}, 4, 0.15),
    ("int4_wo", {"group_size": 64, "qparams": "hqq"}, 4, 0.15),
    ("intx_sim", {"bits": 3, "group_size": 32}, 3, 0.3),
    ("intx_sim", {"bits": 5, "group_size": 32, "symmetric": True}, 5, 0.1),
    ("hqq8", {}, 8, 0.01),
    ("hqq4", {}, 4, 0.15),
    ("hqq3", {}, 3, 0.3),
    ("hqq2", {}, 2, 0.7),
    ("hqq1", {}, 1, 1.0),
    ("bitnet", {}, 2, 0.6),
    ("fp8_wo", {}, 8, 0.04),
    ("fp8_wo", {"granularity": "tensor"}, 8, 0.04),
    ("int8_da", {}, 8, 0.01),
    ("int8_da", {"granularity": "tensor"}, 8, 0.01),
    ("mx_sim", {"bits": 8}, 8, 0.05),
    ("mx_sim", {"bits": 4}, 4, 0.25),
    ("nvfp4_wo", {}, 4, 0.15),
    ("native_w8", {}, 8, 0.01),
    ("native_fp8", {}, 8, 0.04),
    ("native_w4", {"group_size": 64}, 4, 0.12),
    ("native_w4", {"group_size": 32, "symmetric": True, "qparams": "rtn"}, 4, 0.12),
    ("native_w2", {}, 2, 0.6),
    ("native_w158", {}, 2, 0.6),
]


@pytest.mark.parametrize(("name", "knobs", "bits", "loss"), OPTIONS, ids=lambda value: str(value))
def test_a_layers_output_is_its_stored_weights_product(
    name: str, knobs: dict[str, Any], bits: int, loss: float
) -> None:
    config = option(name, **knobs)
    before, after, layers = quantized(config)
    check(after, layers, config)
    for old, new in zip(before.layers, after.layers, strict=True):
        inputs = exact_inputs(config, 3, old.in_features)
        with torch.no_grad():
            # The identity through the layer is its dequantized weight, column by column.
            weight = new(torch.eye(old.in_features, dtype=torch.bfloat16)).double().T
            product = inputs.double() @ weight.T
            error = (new(inputs).double() - product).norm() / product.norm()
            off = (weight - old.weight.double()).norm() / old.weight.double().norm()
        assert error < 1e-2
        assert off < loss
        # A quantizer that did nothing would lose nothing.
        assert off > 1e-4


@pytest.mark.parametrize(("name", "knobs", "bits", "loss"), OPTIONS, ids=lambda value: str(value))
def test_the_audit_reads_bits_and_bytes_from_the_tensors(
    name: str, knobs: dict[str, Any], bits: int, loss: float
) -> None:
    config = option(name, **knobs)
    _, after, layers = quantized(config)
    seen = {layer.name: layer for layer in layers}
    assert not seen["lm_head"].seen.quantized
    body = [layer for layer in layers if layer.name != "lm_head"]
    summary = audit.summarize(layers)
    expected = sum(layer.params for layer in body) / sum(layer.params for layer in layers)
    assert summary["quantized_fraction"] == pytest.approx(expected)
    stored = 8 * sum(layer.stored_bytes for layer in body) / sum(layer.params for layer in body)
    if method(config).simulated:
        assert stored > 8
    else:
        # Scales and zeros cost up to 1 bit in groups of 32, and int8's one scale a row of 64 half a bit.
        # torchao fills the tables of block scales up to 128 rows and 4 blocks.
        blocks = 3.1 if config.method in ("mx_sim", "nvfp4_wo") else 1.1
        assert bits < stored <= bits + blocks
    assert audit.weight_bytes(after) == sum(layer.stored_bytes for layer in layers)


def test_torchao_skips_what_the_group_does_not_divide_and_the_audit_says_so() -> None:
    config = option("int4_wo", group_size=128)
    _, after, layers = quantized(config, [(192, 64), (256, 64)])
    assert [layer.seen.quantized for layer in layers if layer.name != "lm_head"] == [False, True]
    with pytest.raises(NotApplied, match=r"1 of 3 layers are still Linear\[bfloat16\] \(such as layers.0\)"):
        check(after, layers, config)


def test_other_bits_or_groups_than_asked_are_not_applied() -> None:
    config = option("int4_wo")
    _, after, layers = quantized(config)
    with pytest.raises(NotApplied, match="groups of 32 instead of 64"):
        check(after, layers, replace(config, group_size=64))
    with pytest.raises(NotApplied, match="hold 4 bits a weight instead of 8"):
        check(after, layers, replace(config, bits=8))


def test_a_skipped_layer_that_was_quantized_is_not_applied() -> None:
    config = option("int8_wo", lm_head="same")
    _, after, layers = quantized(config)
    with pytest.raises(NotApplied, match="were to be left as they are"):
        check(after, layers, option("int8_wo"))


def test_a_skip_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(NotApplied, match="no_such_layer"):
        quantized(option("int8_wo", skip=("no_such_layer",)))


def test_a_layer_nobody_can_read_is_an_error() -> None:
    block = Block(SHAPES)
    names = assign.linear_names(block)
    block.lm_head = torch.nn.Bilinear(2, 2, 2)  # type: ignore[assignment]
    with pytest.raises(NotApplied, match="cannot read"):
        audit.read_layers(block, names)


def test_quantizing_leaves_the_compilers_settings_alone() -> None:
    """hqq and torchao change inductor's settings for the whole process where one lets them."""
    from lbi.compilers import CompilerState

    state = CompilerState.take()
    for name in ("int8_wo", "int4_wo", "intx_sim", "hqq4", "native_w2"):
        quantized(option(name))
        assert state.restore() == [], name
    import torch._inductor.config as inductor

    inductor.coordinate_descent_tuning = not inductor.coordinate_descent_tuning
    torch.set_float32_matmul_precision("high")
    assert state.restore() == ["inductor.coordinate_descent_tuning", "float32_matmul_precision"]
    assert torch.get_float32_matmul_precision() == state.matmul_precision


def test_storage_that_is_shared_is_counted_once() -> None:
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(10, 4), "head": torch.nn.Linear(4, 10, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert audit.weight_bytes(tied) == 10 * 4 * 4
