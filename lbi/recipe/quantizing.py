"""How a recipe quantizes: each linear layer by its name, with the quantizer's own package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lbi.config import QuantizerConfig
from lbi.quantizers.options import HEAD_OPTION, PLAIN, option
from lbi.recipe.part import Part, arguments, literal

Choices = Sequence[tuple[tuple[str, ...], QuantizerConfig]]
"""Endings of layers' names and how these are stored, in order; no endings: all that are left."""

TORCHAO = "from torchao.quantization import {}, quantize_"

QUANTIZE = """
def quantize(model):
    groups = {{}}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            # The first entry that fits counts; one without endings fits every layer.
            way = next(way for ends, way in WAYS if not ends or any(f".{{name}}".endswith(f".{{end}}") for end in ends))
            groups.setdefault(way, set()).add(name)
    for way, names in groups.items():
        if way is not None:
            way(model, names){embeddings}
"""

INT8_ROWS = '''
def int8_rows(weight):
    """int8 with a scale a row."""
    scale = (weight.float().abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    return (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale
'''

INT8_PACK = '''
class Int8Linear(torch.nn.Module):
    """Multiplied by the kernel that torch carries, which widens int8 as it reads it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight, scale = int8_rows(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, inputs):
        product = torch._weight_int8pack_mm(inputs.reshape(-1, self.in_features), self.weight, self.scale)
        product = product.view(*inputs.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def {name}(model, names):
    for name in sorted(names):
        model.set_submodule(name, Int8Linear(model.get_submodule(name)))
'''

INT8_TABLE = '''
class Int8Embedding(torch.nn.Module):
    """Rows of an int8 table times their scales."""

    def __init__(self, table):
        super().__init__()
        weight, scale = int8_rows(table.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, tokens):
        return self.weight[tokens].to(self.scale.dtype) * self.scale[tokens][..., None]
'''

HQQ = """
def {name}(model, names):
    settings = BaseQuantizeConfig({settings})
    for name in sorted(names):
        layer = model.get_submodule(name)
        # HQQ's own defaults are CUDA and float16.
        model.set_submodule(name, HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device=DEVICE))
    HQQLinear.set_backend(HQQBackend.PYTORCH)
"""

CUSTOM = """
def {name}(model, names):
    for name in sorted(names):
        model.set_submodule(name, {function}(model.get_submodule(name), name{options}))
"""

TORCHAO_WAY = """
def {name}(model, names):
    quantize_(model, {config}, filter_fn=lambda layer, name: name in names)
"""

LBI_WAY = """
def {name}(model, names):
    standalone.store_as(model, names, {knobs})
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A function of the script that stores some layers: its imports and code. `shared` is needed once by several."""

    imports: tuple[str, ...]
    code: str
    shared: str = ""


def part(config: QuantizerConfig, chosen: Mapping[str, str] | None, device: str) -> Part:
    """`quantize(model)`. `chosen` is autoquant's option by layer, as the run recorded it."""
    if config.family in ("none", "checkpoint") and config.embeddings == "keep":
        return Part((), "\ndef quantize(model):\n    pass\n")
    choices = _by_layer(chosen) if chosen else _choices(config)
    # Keyed by their text: a config may hold mappings, which have no hash.
    names, ways = {repr(PLAIN): "None"}, []
    for _, stored in choices:
        if repr(stored) not in names:
            names[repr(stored)] = _identifier(stored.name)
            ways.append(_way(names[repr(stored)], stored, device))
    table = "".join(f"\n    ({literal(ends, 4)}, {names[repr(stored)]})," for ends, stored in choices)
    shared = list(dict.fromkeys(way.shared for way in ways if way.shared))
    embeddings = ""
    if config.embeddings == "int8":
        shared = list(dict.fromkeys([*shared, INT8_ROWS]))
        ways.append(Way((), INT8_TABLE))
        embeddings = "\n    model.set_input_embeddings(Int8Embedding(model.get_input_embeddings()))"
    code = [*shared, *(way.code for way in ways), f"\nWAYS = [{table}\n]\n", QUANTIZE.format(embeddings=embeddings)]
    return Part(tuple(line for way in ways for line in way.imports), "\n".join(code))


def _choices(config: QuantizerConfig) -> Choices:
    """The rules of `options.layer_config`, as endings in order."""
    made: list[tuple[tuple[str, ...], QuantizerConfig]] = []
    if config.skip:
        made.append((config.skip, PLAIN))
    made += [((end,), option(str(text))) for end, text in (config.mix or {}).items() if end != "default"]
    if config.lm_head != "same":
        made.append((("lm_head",), option(HEAD_OPTION) if config.lm_head == "int8" else PLAIN))
    if config.family in ("none", "checkpoint"):
        rest = PLAIN
    else:
        rest = option(str((config.mix or {}).get("default", "none"))) if config.family == "mix" else config
    return [*made, ((), rest)]


def _by_layer(chosen: Mapping[str, str]) -> Choices:
    """Layers with one option each; the option of most layers is that of all the rest."""
    by_option: dict[str, list[str]] = {}
    for name, text in chosen.items():
        by_option.setdefault(text, []).append(name)
    made = [(tuple(names), option(text)) for text, names in by_option.items()]
    # What is not in the list was left alone before autoquant chose: the lm_head, and what is skipped.
    return [*made, ((), PLAIN)]


def _identifier(name: str) -> str:
    text = "".join(letter if letter.isalnum() else "_" for letter in name)
    return f"as_{text}"


def _way(name: str, config: QuantizerConfig, device: str) -> Way:
    if config.family == "torchao":
        return _torchao(name, config, device)
    if config.family == "aten":
        return Way((), INT8_PACK.format(name=name), INT8_ROWS)
    if config.family == "hqq" and config.backend in (None, "pytorch"):
        settings = arguments({"nbits": config.bits, "group_size": config.group_size, "axis": config.axis})
        imports = ("from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear",)
        return Way(imports, HQQ.format(name=name, settings=settings))
    if config.family == "custom":
        module, _, function = str(config.target).partition(":")
        options = f", {arguments(dict(config.options))}" if config.options else ""
        return Way((f"import {module}",), CUSTOM.format(name=name, function=f"{module}.{function}", options=options))
    return Way(("from lbi import standalone",), LBI_WAY.format(name=name, knobs=literal(knobs(config), 4)))


def knobs(config: Any) -> dict[str, Any]:
    """The knobs of a section that are not at their defaults."""
    return {
        spec.name: getattr(config, spec.name)
        for spec in fields(config)
        if getattr(config, spec.name) != spec.default and getattr(config, spec.name) not in ({}, ())
    }


def _torchao(name: str, config: QuantizerConfig, device: str) -> Way:
    made, module, others = _torchao_config(config, device)
    kind = made.partition("(")[0]
    first = TORCHAO.format(kind) if module == "torchao.quantization" else f"from {module} import {kind}"
    imports = (first, "from torchao.quantization import quantize_", *others)
    return Way(imports, TORCHAO_WAY.format(name=name, config=made))


def _torchao_config(config: QuantizerConfig, device: str) -> tuple[str, str, tuple[str, ...]]:
    """torchao's config as an expression, the module it is from, and other imports. As in quantizers/torchao.py."""
    per = "PerTensor" if config.granularity == "tensor" else "PerRow"
    granularity = (f"from torchao.quantization import {per}",)
    public, own = "torchao.quantization", "set_inductor_config=False"
    if config.method == "int8_wo":
        return f"Int8WeightOnlyConfig({own})", public, ()
    if config.method == "fp8_wo":
        return f"Float8WeightOnlyConfig(granularity={per}(), {own})", public, granularity
    if config.method == "int8_da":
        return f"Int8DynamicActivationInt8WeightConfig(granularity={per}(), {own})", public, granularity
    if config.method == "fp8_da":
        return f"Float8DynamicActivationFloat8WeightConfig(granularity={per}(), {own})", public, granularity
    if config.method == "int4_wo":
        return _int4(config, device)
    if config.method == "fp8_int4":
        return f"Float8DynamicActivationInt4WeightConfig(int4_packing_format={config.packing!r})", public, ()
    if config.method == "intx_sim":
        return _intx(config)
    if config.method in ("mx_da", "mx_sim"):
        return _mx(config)
    formats = "torchao.prototype.mx_formats"
    if config.method == "nvfp4_wo":
        return "NVFP4WeightOnlyConfig()", formats, ()
    return "NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)", formats, ()


def _int4(config: QuantizerConfig, device: str) -> tuple[str, str, tuple[str, ...]]:
    known: dict[str, Any] = {"group_size": config.group_size, "int4_choose_qparams_algorithm": config.qparams}
    if device == "cpu":
        made = f"PrototypeInt4WeightOnlyConfig({arguments(known | {'set_inductor_config': False})})"
        return made, "torchao.prototype.quantization.int4.inference_workflow", ()
    packing = "tile_packed_to_4d" if config.packing in (None, "auto") else config.packing
    known |= {"int4_packing_format": packing, "set_inductor_config": False}
    return f"Int4WeightOnlyConfig({arguments(known)})", "torchao.quantization", ()


def _intx(config: QuantizerConfig) -> tuple[str, str, tuple[str, ...]]:
    granularity = f"PerGroup({config.group_size})" if config.group_size else "PerAxis(0)"
    mapping = f"MappingType.{'SYMMETRIC' if config.symmetric else 'ASYMMETRIC'}"
    made = (
        f"IntxWeightOnlyConfig(weight_dtype=torch.int{config.bits}, granularity={granularity}, mapping_type={mapping})"
    )
    others = (
        f"from torchao.quantization import {granularity.partition('(')[0]}",
        "from torchao.quantization.quant_primitives import MappingType",
    )
    return made, "torchao.quantization", others


def _mx(config: QuantizerConfig) -> tuple[str, str, tuple[str, ...]]:
    element = "torch.float8_e4m3fn" if config.bits == 8 else "torch.float4_e2m1fn_x2"
    kernels = "KernelPreference.EMULATED" if config.method == "mx_sim" else "KernelPreference.AUTO"
    made = (
        f"MXDynamicActivationMXWeightConfig(activation_dtype={element}, weight_dtype={element}, "
        f"kernel_preference={kernels})"
    )
    others = ("from torchao.quantization.quantize_.common import KernelPreference",)
    return made, "torchao.prototype.mx_formats", others
