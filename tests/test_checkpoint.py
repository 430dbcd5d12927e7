"""Models that come quantized: what the plan refuses, what the audit reads, and a cell from folder to figures."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lbi import environment, models, reference, steps
from lbi.config import LbiConfig, ModelConfig, QuantizerConfig
from lbi.errors import InputError, NotApplied, Unsupported
from lbi.model_files import ModelFacts
from lbi.plan import Plan
from lbi.quantizers import assign, audit, loaders
from lbi.verdicts import PRUNED, RUN

SETTING = QuantizerConfig(name="checkpoint", family="checkpoint", method="checkpoint")
MakePlan = Callable[..., Plan]

SHAPES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def folder(path: Path, held: dict[str, Any] | None = None, byte: bytes = b"\0", **shapes: int) -> Path:
    """A model folder as far as the plan reads it."""
    path.mkdir(exist_ok=True)
    content = {"model_type": "llama", **SHAPES, **shapes} | ({"quantization_config": held} if held else {})
    (path / "config.json").write_text(json.dumps(content))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + byte * 128)
    return path


def only(plan: Plan) -> Any:
    (cell,) = plan.cells
    return cell


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have these packages, and of the loaders' no others."""
    every = {name for needs in loaders.LOADERS.values() for name in needs.packages}

    def have(*names: str) -> None:
        kept = {name: version for name, version in REAL_PACKAGES.items() if name not in every}
        monkeypatch.setattr(environment, "packages", lambda: kept | dict.fromkeys(names, "1.0"))

    return have


REAL_PACKAGES = environment.packages()


@pytest.mark.parametrize(
    ("held", "packages", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, (), "gptq weights need the package gptqmodel: pip install gptqmodel opt"),
        ({"quant_method": "gptq", "bits": 4}, ("gptqmodel",), "need the package optimum: pip install optimum"),
        ({"quant_method": "gptq", "bits": 4}, ("gptqmodel", "optimum"), None),
        ({"quant_method": "awq"}, (), "awq weights need the package gptqmodel"),
        ({"quant_method": "compressed-tensors"}, (), "pip install compressed-tensors"),
        ({"load_in_4bit": True}, (), "bitsandbytes weights need the package bitsandbytes"),
        ({"quant_method": "fp8"}, (), "fp8 weights need a GPU (on anything less transformers dequantizes"),
        ({"quant_method": "spqr"}, ("spqr_quant",), "spqr weights need a GPU"),
        ({"quant_method": "hqq"}, (), "no code to load HQQ weights"),
        ({"quant_method": "magic"}, (), "transformers has no loader for magic weights"),
        ({"bits": 4}, (), "no loader for unknown weights"),
    ],
)
@pytest.mark.slow
def test_what_transformers_needs_is_asked_of_the_plan(
    plan: MakePlan,
    tmp_path: Path,
    installed: Callable[..., None],
    held: dict[str, Any],
    packages: tuple[str, ...],
    reason: str | None,
) -> None:
    installed(*packages)
    where = folder(tmp_path / "model", held)
    cell = only(plan("quantizer=checkpoint", f"model.path={where}", "engine.device=cpu", model="hf"))
    if reason is None:
        assert (cell.verdict, cell.reason) == (RUN, "")
    else:
        assert (cell.verdict, cell.rule) == (PRUNED, "stored_weights_fit")
        assert reason in cell.reason


def test_a_gpu_that_is_too_old_is_named() -> None:
    facts = ModelFacts("folder", {"quantization_config": {"quant_method": "fp8"}}, "0")
    model = ModelConfig(name="hf", source="hf", path="folder", dtype="bfloat16")
    for capability, reason in ((8.0, "fp8 weights need sm_89 or newer"), (9.0, None), (None, None)):
        said = loaders.why_not(SETTING, model, facts, loaders.Place("cuda", {}, capability))
        assert said is None if reason is None else reason in str(said)


def test_every_loaders_package_is_part_of_the_environment() -> None:
    """Else a rule would never find it, and another version would not be another environment."""
    assert {name for needs in loaders.LOADERS.values() for name in needs.packages} <= set(environment.PACKAGES)


@pytest.mark.parametrize("nested", [False, True], ids=["", "text_config"])
def test_quantized_weights_and_other_quantizers_exclude_each_other(
    plan: MakePlan, tmp_path: Path, nested: bool
) -> None:
    held = folder(tmp_path / "held", {"quant_method": "gptq"})
    if nested:
        content = json.loads((held / "config.json").read_text())
        (held / "config.json").write_text(json.dumps({"text_config": content}))
    bare = folder(tmp_path / "bare")
    cells = plan("quantizer=none,hqq4,int8_wo", f"model.path={held}", model="hf").cells
    assert {cell.reason for cell in cells} == {f"{held} holds gptq weights: use quantizer=checkpoint"}
    assert "plain weights" in only(plan("quantizer=checkpoint", f"model.path={bare}", model="hf")).reason
    assert "made by lbi as plain weights" in only(plan("quantizer=checkpoint")).reason


def test_a_hub_id_is_decided_when_it_is_loaded_in_the_same_words(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Callable[..., None]
) -> None:
    installed()
    contents: dict[str, Any] = {"quantization_config": {"quant_method": "gptq"}}
    monkeypatch.setattr(models.PretrainedConfig, "get_config_dict", lambda *_, **__: (contents, {}))
    for name, reason in (("checkpoint", "gptq weights need the package gptqmodel"), ("none", "holds gptq weights")):
        cell = only(plan(f"quantizer={name}", "model.path=org/quantized", "engine.device=cpu", model="hf"))
        assert cell.verdict == RUN
        with pytest.raises(Unsupported, match=reason):
            steps.check_request(cell.config, {"run_id": cell.run_id})
    contents.clear()
    cell = only(plan("quantizer=none", "model.path=org/quantized", model="hf"))
    steps.check_request(cell.config, {"run_id": cell.run_id})


def test_the_base_is_checked_and_its_weights_are_part_of_the_identity(
    plan: MakePlan, tmp_path: Path, installed: Callable[..., None]
) -> None:
    installed("gptqmodel", "optimum")
    held = folder(tmp_path / "held", {"quant_method": "gptq"})

    def cell(base: Path | str) -> Any:
        return only(plan("quantizer=checkpoint", f"model.path={held}", f"quantizer.base={base}", model="hf"))

    one, same, other = (folder(tmp_path / name, byte=byte) for name, byte in (("a", b"1"), ("b", b"1"), ("c", b"2")))
    assert cell(one).verdict == RUN
    assert cell(one).run_id == cell(same).run_id
    assert len({cell(base).run_id for base in (one, other, "null")}) == 3
    assert "holds gptq weights itself; name the unq" in cell(held).reason
    assert "is another model: its hidden_size is 64" in cell(folder(tmp_path / "small", hidden_size=64)).reason
    with pytest.raises(InputError, match="no such folder") as caught:
        cell(tmp_path / "nowhere")
    assert caught.value.field == "quantizer.base"


def test_quality_is_compared_with_the_base_and_never_shared_between_checkpoints(
    plan: MakePlan, tmp_path: Path, installed: Callable[..., None]
) -> None:
    installed("gptqmodel", "optimum")
    base = folder(tmp_path / "base")
    held = [folder(tmp_path / name, {"quant_method": "gptq"}, byte) for name, byte in (("a", b"1"), ("b", b"2"))]

    def config(path: Path, quantizer: str, *overrides: str) -> LbiConfig:
        made: LbiConfig = only(plan(f"quantizer={quantizer}", f"model.path={path}", *overrides, model="hf")).config
        return made

    def kept(made: LbiConfig) -> dict[str, Path]:
        return reference.folders(tmp_path, made, "env")

    plain = kept(config(base, "none"))
    with_base = [kept(config(path, "checkpoint", f"quantizer.base={base}")) for path in held]
    without = kept(config(held[0], "checkpoint"))
    for name in ("logits", "greedy"):
        assert plain[name] == with_base[0][name] == with_base[1][name] != without[name]
    assert len({kind["quality"] for kind in (plain, *with_base, without)}) == 4
    assert reference.unquantized(config(held[0], "checkpoint", f"quantizer.base={base}")).model.path == str(base)


class Packed(torch.nn.Module):
    """A layer as gptqmodel makes it: `bits` wide codes in 32-bit words, scales by group."""

    def __init__(self, inputs: int, outputs: int, bits: int, group: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(inputs // group, outputs * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(inputs // group, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))


class Fp8(torch.nn.Linear):
    """A layer as transformers makes it of fp8 weights: a scale for each block of 128 x 128."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = torch.nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(torch.ones(outputs // 128, inputs // 128))


class Lazy(torch.nn.Linear):
    """A layer that compressed-tensors left packed: `unpack` is what its first forward pass does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=torch.bfloat16)
        del self.weight
        self.weight_packed = torch.nn.Parameter(torch.zeros(outputs, inputs // 8, dtype=torch.int32), False)
        self.weight_scale = torch.nn.Parameter(torch.ones(outputs, inputs // 32, dtype=torch.bfloat16), False)

    def unpack(self) -> None:
        del self.weight_packed
        self.weight = torch.nn.Parameter(torch.zeros(self.out_features, self.in_features, dtype=torch.bfloat16))


class Holder(torch.nn.Module):
    """A model of one such layer and a plain lm_head, as far as a first forward pass needs one."""

    device = torch.device("cpu")

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.lm_head = torch.nn.Linear(256, 100, bias=False, dtype=torch.bfloat16)

    def forward(self, tokens: torch.Tensor) -> None:
        if isinstance(self.layer, Lazy):
            self.layer.unpack()


def loaded(layer: torch.nn.Module) -> tuple[Holder, list[audit.Layer]]:
    model = Holder(layer)
    assignment = assign.by_name(model, SETTING)
    assign.apply(model, assignment)
    layers = audit.read_layers(model, frozenset(assignment))
    audit.check(layers, assignment, "checkpoint")
    return model, layers


@pytest.mark.parametrize(
    ("layer", "kind", "bits", "group", "stored"),
    [
        (Packed(256, 384, 4, 64), "Packed[int32]", 4, 64, 256 * 384 // 2 + 4 * 384 // 2 + 2 * 4 * 384 + 4 * 256),
        (Packed(256, 384, 3, 128), "Packed[int32]", 3, 128, 256 * 384 * 3 // 8 + 2 * 384 * 3 // 8 + 2 * 2 * 384 + 1024),
        (Fp8(256, 384), "Fp8[float8_e4m3fn]", 8, None, 256 * 384 + 4 * 2 * 3),
        (Lazy(256, 384), "Linear[bfloat16] from Lazy[int32]", 4, 32, 2 * 256 * 384),
    ],
    ids=["gptq4", "gptq3", "fp8", "lazy"],
)
def test_layers_of_any_library_are_read_by_the_size_of_their_tensors(
    layer: torch.nn.Module, kind: str, bits: int, group: int | None, stored: int
) -> None:
    _, layers = loaded(layer)
    seen = {found.name: found for found in layers}
    assert not seen["lm_head"].seen.quantized
    found = seen["layer"]
    assert (found.seen.kind, found.seen.quantized) == (kind, True)
    assert (found.seen.bits, found.seen.group_size, found.stored_bytes) == (bits, group, stored)
    share = 256 * 384 / (256 * 384 + 256 * 100)
    assert audit.summarize(layers)["quantized_fraction"] == pytest.approx(share)


def test_a_checkpoint_without_a_quantized_layer_is_not_applied() -> None:
    with pytest.raises(NotApplied, match=r"no linear layer is quantized after loading: all 2 are Linear\[bfloat16\]"):
        loaded(torch.nn.Linear(256, 384, bias=False, dtype=torch.bfloat16))


def test_a_layer_without_tensors_to_read_is_not_applied() -> None:
    layer = torch.nn.Module()
    layer.in_features, layer.out_features = 256, 384  # type: ignore[assignment]
    with pytest.raises(NotApplied, match="cannot read"):
        loaded(layer)


def test_of_a_layer_made_of_linear_layers_the_inner_ones_count() -> None:
    outer = torch.nn.Module()
    outer.in_features, outer.out_features = 8, 8  # type: ignore[assignment]
    outer.base_layer = torch.nn.Linear(8, 8)
    assert assign.linear_names(torch.nn.ModuleDict({"outer": outer, "outer2": torch.nn.Linear(8, 8)})) == {
        "outer.base_layer",
        "outer2",
    }


def test_weights_of_a_family_that_lbi_knows_are_read_by_it() -> None:
    quantized = Holder(torch.nn.Linear(256, 384, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        config = replace(SETTING, name="int8_wo", family="torchao", method="int8_wo", bits=8)
        assign.apply(quantized, assign.by_name(quantized, config))
    _, layers = loaded(quantized.layer)
    assert {layer.name: layer.seen.kind for layer in layers}["layer"] == "Linear[Int8Tensor]"


def save_base(path: Path) -> Any:
    """A tiny random Llama with a tokenizer of bytes, saved; the model."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES, max_position_embeddings=2048, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return model


def with_tokenizer(base: Path, path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((base / name).read_bytes())


def measured(run_lbi: Callable[..., Any], tmp_path: Path, sweep: str, *overrides: str) -> list[dict[str, str]]:
    ran = run_lbi(
        *["-m", "model=hf", "tracker=none", "measure=quick", "quality.tokens=256", "quantizer=checkpoint"],
        *[f"sweep.name={sweep}", *overrides],
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with (tmp_path / "store" / "sweeps" / sweep / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_whole_way_with_and_without_a_base(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    """With torchao, whose packed weights transformers keeps: no package is needed that lbi does not have."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    base, held = tmp_path / "base", tmp_path / "held"
    save_base(base)
    how = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how).save_pretrained(held)
    with_tokenizer(base, held)
    with_base, without = measured(run_lbi, tmp_path, "torchao", f"model.path={held}", f"quantizer.base={base},null")
    for row in (with_base, without):
        assert row["status"] == "ok", row["reason"]
        assert float(row["quantized_fraction"]) == pytest.approx(294912 / 360448)
        assert 9 < float(row["bits_per_weight"]) < 10
    assert 0 < float(with_base["mean_kld"]) < 0.01
    assert float(with_base["first_divergence"]) >= 1
    assert (without["mean_kld"], without["first_divergence"]) == ("", "")
    missing = json.loads((Path(without["folder"]) / "metrics.json").read_text())["missing"]
    assert missing["mean_kld"] == missing["first_divergence"] == reference.NO_BASE
    kinds = sorted(path.name.split("-")[0] for path in (tmp_path / "store" / "references").iterdir())
    assert kinds == ["greedy", "logits", "quality"]


def save_compressed(base: Path, path: Path, bits: int, group: int | None, activations: bool = False) -> None:
    """The base quantized by compressed-tensors' own compressor: symmetric, round to nearest, lm_head left."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    weights = QuantizationArgs(
        num_bits=bits, symmetric=True, strategy="group" if group else "channel", group_size=group
    )
    inputs = QuantizationArgs(num_bits=8, dynamic=True, strategy="token") if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    groups = {"group_0": scheme}
    how = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], quantization_status=QuantizationStatus.INITIALIZED
    )
    apply_quantization_config(model, how, show_progress=False)
    for layer in model.modules():
        if getattr(layer, "quantization_scheme", None) is not None:
            rows = layer.weight.data.unflatten(1, (-1, group or layer.in_features))
            scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), weights)
            layer.weight_scale.data.copy_(scale)
            layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    with_tokenizer(base, path)


@pytest.mark.parametrize(
    ("bits", "group", "activations", "loss"),
    [(4, 32, False, 0.15), (8, None, False, 0.01), (8, None, True, 0.01)],
    ids=["pack-quantized int4", "pack-quantized int8", "int-quantized int8 with activations"],
)
def test_compressed_tensors_are_read_as_the_dense_layers_that_run(
    tmp_path: Path, bits: int, group: int | None, activations: bool, loss: float
) -> None:
    """compressed-tensors has no kernels: the first forward pass unpacks for good, and the audit says so."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    before = save_base(tmp_path / "base").model.layers[0].mlp.down_proj.weight.double()
    save_compressed(tmp_path / "base", tmp_path / "held", bits, group, activations)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "held", dtype=torch.bfloat16)
    assignment = assign.by_name(model, SETTING)
    assign.apply(model, assignment)
    layers = audit.read_layers(model, frozenset(assignment))
    audit.check(layers, assignment, "checkpoint")
    seen = {layer.name: layer for layer in layers}["model.layers.0.mlp.down_proj"]
    assert seen.seen.kind.startswith("Linear[bfloat16] from Linear[int")
    assert (seen.seen.bits, seen.seen.group_size, seen.stored_bytes) == (bits, group, 2 * 128 * 256)
    summary = audit.summarize(layers)
    assert summary["quantized_fraction"] == pytest.approx(294912 / 360448)
    assert summary["bits_per_weight"] == 16
    layer = model.model.layers[0].mlp.down_proj
    inputs = torch.randn(3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        product = inputs.double() @ layer.weight.double().T
        # Inputs that are quantized on the fly, a scale a token, are off by a part in 127 of the largest.
        assert (layer(inputs).double() - product).norm() / product.norm() < (2e-2 if activations else 1e-2)
    assert 1e-4 < (layer.weight.double() - before).norm() / before.norm() < loss
    assert len(torch.unique((layer.weight / layer.weight_scale.repeat_interleave(group or 256, 1)).round())) <= 2**bits


@pytest.mark.slow
def test_the_whole_way_with_compressed_tensors(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_base(tmp_path / "base")
    save_compressed(tmp_path / "base", tmp_path / "four", 4, 32)
    save_compressed(tmp_path / "base", tmp_path / "eight", 8, None)
    paths = f"model.path={tmp_path / 'four'},{tmp_path / 'eight'}"
    four, eight = measured(run_lbi, tmp_path, "compressed", paths, f"quantizer.base={tmp_path / 'base'}")
    assert (four["status"], eight["status"]) == ("ok", "ok"), (four["reason"], eight["reason"])
    assert 0 < float(eight["mean_kld"]) < float(four["mean_kld"]) < 0.05
    assert float(four["bits_per_weight"]) == 16


def test_what_compressed_tensors_wraps_is_not_compiled_as_one_graph(
    plan: MakePlan, tmp_path: Path, installed: Callable[..., None]
) -> None:
    installed("compressed-tensors")
    where = folder(tmp_path / "model", {"quant_method": "compressed-tensors"})
    cell = ["quantizer=checkpoint", f"model.path={where}", "compiler=inductor", "cache=static"]
    assert "set compiler.fullgraph=false" in only(plan(*cell, model="hf")).reason
    assert only(plan(*cell, "compiler.fullgraph=false", model="hf")).verdict == RUN


def test_a_checkpoint_whose_weights_are_not_all_there_is_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: MakePlan
) -> None:
    """transformers fills what it does not find with random numbers, and says so in a warning only."""
    from safetensors.torch import load_file, save_file
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    base, held = tmp_path / "base", tmp_path / "held"
    save_base(base)
    how = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how).save_pretrained(held)
    with_tokenizer(base, held)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "norm" not in name}, held / "model.safetensors")
    config = only(plan("quantizer=checkpoint", f"model.path={held}", "engine.device=cpu", model="hf")).config
    with pytest.raises(Unsupported, match="torchao loader found no weights for 5 tensors, such as model"):
        models.load(config.model, config.engine)
