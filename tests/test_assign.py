"""Which layer becomes what: mixes, the lm_head, the embeddings, HQQ's quick solver, AutoQuant's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lbi.config import LbiConfig, QuantizerConfig
from lbi.errors import NotApplied
from lbi.plan import Plan
from lbi.quantizers import assign, audit, autoquant, hqq_solver
from lbi.quantizers.int8_layers import Int8Embedding, quantize_embeddings
from lbi.quantizers.options import HEAD_OPTION, PLAIN, option


def llama(tied: bool) -> Any:
    """A Llama of two layers, small, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def applied(model: Any, config: QuantizerConfig) -> dict[str, audit.Layer]:
    assignment = assign.by_name(model, config)
    with torch.no_grad():
        assign.apply(model, assignment)
        if config.embeddings == "int8":
            quantize_embeddings(model)
    layers = audit.read_layers(model, frozenset(assignment))
    audit.check(layers, assignment, config.name)
    return {layer.name: layer for layer in layers}


@pytest.mark.parametrize("name", ["int8_wo", "int4_wo", "hqq4", "bitnet", "fp8_wo", "native_w2"])
@pytest.mark.parametrize(("head", "bits"), [("keep", 16), ("int8", 8), ("same", None)])
def test_the_lm_head_is_a_knob_of_every_family(name: str, head: str, bits: int | None) -> None:
    config = replace(option(name), lm_head=head)
    seen = applied(llama(tied=False), config)["lm_head"].seen
    assert seen.bits == pytest.approx(bits or config.bits or 8, abs=0.5)
    assert seen.quantized == (head != "keep")


def test_an_int8_head_and_table_that_were_tied_share_one_tensor() -> None:
    model = llama(tied=True)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(tokens).logits.float()
    layers = applied(model, replace(option("int8_pack"), lm_head="int8", embeddings="int8"))
    table = model.get_input_embeddings()
    assert isinstance(table, Int8Embedding)
    assert table.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert audit.weight_bytes(model) < sum(layer.stored_bytes for layer in layers.values()) + 5 * 64 * 2 + 2 * 256 * 2
    with torch.no_grad():
        after = model(tokens).logits.float()
    assert (after - before).norm() / before.norm() < 0.05


def test_a_mix_stores_each_layer_as_its_name_says() -> None:
    config = replace(option_of_mix(), mix={"down_proj": "int8_wo", "lm_head": "int8_pack", "default": "hqq4"})
    layers = applied(llama(tied=False), config)
    kinds = {name.rsplit(".", 1)[-1]: layer.seen.kind.split("[")[0] for name, layer in layers.items()}
    assert kinds["down_proj"] == "Linear"
    assert kinds["lm_head"] == "Int8Linear"
    assert kinds["q_proj"] == kinds["up_proj"] == "HQQLinear"
    assert "Int8Tensor" in layers["model.layers.0.mlp.down_proj"].seen.kind


def option_of_mix() -> QuantizerConfig:
    return QuantizerConfig(name="mix", family="mix", method="mix")


def test_a_mix_that_names_no_layer_of_the_model_is_not_applied() -> None:
    config = replace(option_of_mix(), mix={"dwon_proj": "int8_wo"})
    with pytest.raises(NotApplied, match="dwon_proj"):
        assign.by_name(llama(tied=False), config)


def test_layers_without_an_option_of_a_mix_stay_plain() -> None:
    model = llama(tied=False)
    found = assign.by_name(model, replace(option_of_mix(), mix={"down_proj": "int8_wo"}, lm_head="int8"))
    assert found["model.layers.0.self_attn.q_proj"] == PLAIN
    assert found["lm_head"] == option(HEAD_OPTION)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("spread", [0.03, 3.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_quick_solver_finds_what_hqqs_own_finds(bits: int, spread: float, axis: int) -> None:
    """Errors of 3.0 are so large that the shrinking, which the quick solver skips for small ones, matters."""
    from hqq.core.optimize import optimize_weights_proximal_legacy

    weights = torch.randn(3000, 64) * spread
    weights[torch.rand_like(weights) < 0.001] *= 10
    weights = weights if axis == 1 else weights.t().contiguous()
    low, high = weights.amin(axis, keepdim=True), weights.amax(axis, keepdim=True)
    levels = 2**bits - 1
    scale = levels / (high - low)
    found = []
    for solve in (optimize_weights_proximal_legacy, hqq_solver.optimize):
        stored, _, zero = solve(weights, scale, -low * scale, [0, levels], axis)
        assert zero.shape == scale.shape
        found.append((stored, float((weights - (stored - zero) / scale).abs().mean())))
    (own, own_error), (quick, quick_error) = found
    assert quick_error == pytest.approx(own_error, rel=1e-3)
    # hqq stops where the error no longer falls: at a plateau one rounding error decides.
    assert (own != quick).float().mean() < 0.01


def test_the_quick_solver_is_put_back() -> None:
    from hqq.core.quantize import Quantizer

    own = Quantizer.optimize_weights
    with hqq_solver.quick():
        assert Quantizer.optimize_weights is not own
    assert Quantizer.optimize_weights is own


@pytest.fixture
def autoquant_config(plan: Callable[..., Plan]) -> LbiConfig:
    made = plan("quantizer=autoquant", "quantizer.candidates=[int8_pack,hqq2,gemlite_a16w4]", "engine.device=cpu")
    config = made.cells[0].config
    assert config is not None
    return config


def chosen(config: LbiConfig, times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """AutoQuant's choice where each candidate takes the time given for it."""
    from lbi.quantizers import layer_timing

    monkeypatch.setattr(layer_timing, "in_turn", lambda passes: {name: (times[name], 0.0) for name in passes})
    model = llama(tied=False)
    return autoquant.choose(model, config, assign.by_name(model, config.quantizer), list(range(1, 100)))


def test_autoquant_takes_the_fastest_that_is_accurate_enough(
    autoquant_config: LbiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"none": 3.0, "int8_pack": 2.0, "hqq2": 1.0}
    found, evidence = chosen(autoquant_config, times, monkeypatch)
    # 2 bits are the fastest and ten times too inaccurate; the head is not autoquant's to choose.
    assert {part.name for name, part in found.items() if name != "lm_head"} == {"int8_pack"}
    assert found["lm_head"] == PLAIN
    for row in evidence["by_shape"]:
        assert row["error"]["int8_pack"] < 0.02 < 0.15 < row["error"]["hqq2"]
        assert row["chosen"] == {"int8_pack": row["layers"]}
        assert "GPU" in row["refused"]["gemlite_a16w4"]


def test_autoquant_leaves_alone_what_no_candidate_makes_faster(
    autoquant_config: LbiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = chosen(autoquant_config, {"none": 1.0, "int8_pack": 2.0, "hqq2": 3.0}, monkeypatch)
    assert all(part == PLAIN for part in found.values())


def test_of_equally_fast_candidates_autoquant_takes_the_more_accurate(
    autoquant_config: LbiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = replace(autoquant_config, quantizer=replace(autoquant_config.quantizer, max_error=2.0))
    found, _ = chosen(loose, {"none": 9.0, "int8_pack": 1.01, "hqq2": 1.0}, monkeypatch)
    assert {part.name for name, part in found.items() if name != "lm_head"} == {"int8_pack"}
    found, _ = chosen(loose, {"none": 9.0, "int8_pack": 1.1, "hqq2": 1.0}, monkeypatch)
    assert {part.name for name, part in found.items() if name != "lm_head"} == {"hqq2"}


def test_autoquants_own_timing_leaves_no_trace_in_the_compilers_counters(autoquant_config: LbiConfig) -> None:
    from lbi.compilers import counters

    model = llama(tied=False)
    found, evidence = autoquant.choose(
        model, autoquant_config, assign.by_name(model, autoquant_config.quantizer), list(range(1, 60))
    )
    assign.apply(model, found)
    assert all(row["timed_us"]["none"] > 0 for row in evidence["by_shape"])
    assert counters()["graphs"] == 0
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
