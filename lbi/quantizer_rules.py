"""What quantizers need of the machine, the model and each other; see rules.py."""

from __future__ import annotations

from lbi.config import LbiConfig
from lbi.kernels import rsr_index
from lbi.model_files import ModelFacts
from lbi.quantizers import loaders, method, native, target
from lbi.rule_table import Machine, rule


@rule(
    "torchao 0.18.0, gemlite 0.6.0.post2: asserted there, or read from the instructions their kernels use; "
    "fp8 matrix multiply from sm_89, block-scaled formats (MX, NVFP4) from sm_100"
)
def hardware_fits(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    needs, name = method(config.quantizer).needs, config.quantizer.name
    wanted = f"sm_{round(10 * needs.capability)}"
    because = f" ({needs.because})" if needs.because else ""
    if machine.device not in needs.devices:
        newer = f" of {wanted} or newer" if needs.capability else ""
        return f"{name} needs {'a CPU' if machine.device == 'cuda' else f'a GPU{newer}'}{because}"
    known = machine.device == "cuda" and machine.capability is not None
    if known and float(machine.capability or 0) < needs.capability:
        have = f"sm_{round(10 * (machine.capability or 0))}"
        return f"{name} needs a GPU of {wanted} or newer{because}; this one is {have}"
    return None


@rule("importlib.metadata finds no such distribution")
def package_is_installed(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    for package in method(config.quantizer).needs.packages:
        device, _, name = package.rpartition(":")
        if device in ("", machine.device) and name not in machine.packages:
            return f"{config.quantizer.name} needs the package {name}: pip install {name}"
    return None


@rule("layers that no option is named for stay as they are, and with no name at all nothing would be quantized")
def mix_is_given(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.family == "mix" and not config.quantizer.mix:
        return "mix needs quantizer.mix, such as {down_proj:int8_pack,default:hqq4}"
    return None


@rule("without candidates there is no choice, without a bound the smallest weights would win")
def autoquant_is_complete(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.family != "autoquant":
        return None
    if not config.quantizer.candidates:
        return "autoquant needs quantizer.candidates, such as [int8_pack,int4_wo]"
    return "autoquant needs quantizer.max_error" if config.quantizer.max_error is None else None


@rule("the methods' own tables (torchao 0.18.0, hqq 0.2.8.post1, gemlite 0.6.0.post2)")
def dtype_and_group_exist(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    needs, quantizer = method(config.quantizer).needs, config.quantizer
    if needs.dtypes and config.model.dtype not in needs.dtypes:
        return f"{quantizer.name} has kernels for {' and '.join(needs.dtypes)}; model.dtype is {config.model.dtype}"
    if needs.groups and quantizer.group_size not in needs.groups:
        return f"{quantizer.name} has groups of {', '.join(map(str, needs.groups))}, not {quantizer.group_size}"
    for layer, (inputs, _) in facts.matrices().items():
        if inputs % needs.divisor:
            return f"{quantizer.name} wants rows of a multiple of {needs.divisor}; {layer} has {inputs} inputs"
    return None


@rule("the methods' own tables (torchao 0.18.0, hqq 0.2.8.post1)")
def bits_exist(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    allowed, bits = method(config.quantizer).bits, config.quantizer.bits
    if not allowed or bits in allowed:
        return None
    return f"{config.quantizer.name} has no {bits}-bit form; it has {', '.join(map(str, allowed))}"


@rule(
    "torchao 0.18.0: Int4Tensor asserts in_features % group_size == 0 or leaves the layer as it is with an INFO "
    "message; IntxWeightOnlyConfig fails with 'Expecting input size at 1 dimension: 576 to be divisible'"
)
def group_divides_rows(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    group = config.quantizer.group_size
    by_row = config.quantizer.family in ("torchao", "gemlite", "native") or config.quantizer.backend in (
        "torchao_int4",
        "gemlite",
    )
    if not by_row or group is None:
        return None
    widths: dict[int, list[str]] = {}
    for layer, (inputs, _) in facts.matrices().items():
        if inputs % group:
            widths.setdefault(inputs, []).append(layer)
    for width, layers in widths.items():
        return (
            f"groups of {group} do not divide the {width} inputs of {', '.join(layers)}: those layers would be "
            "left unquantized"
        )
    return None


@rule("hqq 0.2.8.post1: Quantizer.quantize asserts that group_size divides the number of weights")
def group_divides_matrix(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    group = config.quantizer.group_size
    if config.quantizer.family != "hqq" or group is None:
        return None
    for layer, (inputs, outputs) in facts.matrices().items():
        if (inputs * outputs) % group:
            return f"groups of {group} do not divide the {inputs} x {outputs} weights of {layer}"
    return None


@rule(
    "torchao 0.18.0: PrototypeInt4WeightOnlyConfig packs for aten::_weight_int4pack_mm_for_cpu and refuses groups of "
    "256; on a float32 model its prefill is a reference loop (285 CPU s for 2048 tokens). Int4WeightOnlyConfig: hqq's "
    "parameters with tile_packed_to_4d only; plain and preshuffled raise 'Requires mslk >= 1.0.0'"
)
def int4_forms(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    quantizer = config.quantizer
    if quantizer.method not in ("int4_wo", "fp8_int4") or quantizer.family != "torchao":
        return None
    if quantizer.method == "int4_wo" and quantizer.qparams not in ("tinygemm", "hqq"):
        return f"int4_wo finds its scales by tinygemm or hqq, not {quantizer.qparams}"
    if machine.device == "cpu":
        if quantizer.packing != "auto":
            return f"quantizer.packing={quantizer.packing} is a layout for GPUs"
        return "int4_wo on a CPU has groups of 32, 64 or 128, not 256" if quantizer.group_size == 256 else None
    if quantizer.packing in ("plain", "preshuffled"):
        if "mslk-cuda" not in machine.packages:
            return f"quantizer.packing={quantizer.packing} needs the package mslk: pip install mslk-cuda"
        if quantizer.qparams == "hqq":
            return "qparams=hqq is for quantizer.packing=tile_packed_to_4d"
    return None


@rule("lbi/kernels/formats.py: a group is whole fours of words; HQQ moves zeros, and constant ones do not move")
def native_forms(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return native.no_such_form(config.quantizer) if config.quantizer.family == "native" else None


@rule(
    "hqq 0.2.8.post1: HQQLinearTorchWeightOnlynt4 asserts axis=1, 4 bits, bfloat16, groups of 32 to 256; gemlite "
    "0.6.0.post2 asserts axis=1 and has 8, 4, 2 and 1 bits; prepare_for_inference(backend='gemlite') without gemlite "
    "leaves HQQLinear in place without a word"
)
def hqq_backend(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    quantizer, backend = config.quantizer, config.quantizer.backend
    if quantizer.family != "hqq" or backend in (None, "pytorch"):
        return None
    if machine.device != "cuda":
        return f"quantizer.backend={backend} is made of GPU kernels; on a CPU there is backend=pytorch"
    if quantizer.axis != 1:
        return f"quantizer.backend={backend} has groups along the inputs only: quantizer.axis=1"
    if backend == "gemlite" and "gemlite" not in machine.packages:
        return "quantizer.backend=gemlite needs the package gemlite: pip install gemlite"
    if backend == "gemlite" and quantizer.bits == 3:
        return "gemlite has no 3-bit kernels; quantizer.backend=pytorch has"
    if backend == "torchao_int4" and (quantizer.bits != 4 or config.model.dtype != "bfloat16"):
        return "quantizer.backend=torchao_int4 is for 4 bits and bfloat16"
    return None


MOST_ROWS_THAT_FAIL = 16
"""What aten::_int_mm asks to be exceeded on a GPU; that it fails was seen with one row."""


@rule(
    "torchao 0.18.0, kernel/intmm.py: outside of torch.compile an int8 product is tried as such and, where that "
    "fails, repeated in float32; seen with one row on an H200, torch 2.11.0: captured without a compiler, 'operation "
    "failed due to a previous error during capture'; compiled, 'self.size(0) needs to be greater than 16, but got 1' "
    "from inductor's code; eager, 0.4 s a token of an 8B model"
)
def failed_products_want_eager(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    tuned = config.compiler.mode == "max-autotune"
    if config.quantizer.name != "int8_da" or machine.device != "cuda" or config.compiler.backend == "eager" or tuned:
        return None
    if config.workload.batch > MOST_ROWS_THAT_FAIL:
        return None
    return (
        f"int8_da's products of {MOST_ROWS_THAT_FAIL} rows or fewer fail on a GPU, and torchao repeats them in float32 "
        "in eager mode alone: use compiler=eager, or int8_wo"
    )


@rule("lbi/kernels/ternary_cpu.cpp is the only form of RSR, and its index has 16 bits for a column and for a length")
def rsr_can_be_built(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    if config.quantizer.method != "rsr":
        return None
    if not machine.has_compiler:
        return f"{config.quantizer.name} needs a C++ compiler (g++ or clang++) on the PATH"
    for layer, (inputs, _) in facts.matrices().items():
        if inputs > rsr_index.COLUMNS:
            return f"{config.quantizer.name} takes rows of up to {rsr_index.COLUMNS}; {layer} has {inputs} inputs"
    return None


@rule("the function's file, found and parsed without importing it")
def custom_function_is_there(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    return target.why_not(config.quantizer.target) if config.quantizer.family == "custom" else None


@rule("transformers 5.23.0, quantizers/quantizer_*.py: what each format's validate_environment asks for")
def stored_weights_fit(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    place = loaders.Place(machine.device, machine.packages, machine.capability)
    return loaders.why_not(config.quantizer, config.model, facts, place)


@rule(
    "torch 2.13.0, compressed-tensors 0.20.0: 'torch._dynamo.exc.Unsupported: Data pointer comparison', in the "
    "wrapper it puts around each layer's forward; with graph breaks it runs"
)
def wrapped_layers_have_graph_breaks(config: LbiConfig, facts: ModelFacts, machine: Machine) -> str | None:
    compiles_whole = config.compiler.backend == "inductor" and config.compiler.fullgraph
    if compiles_whole and loaders.stored_format(facts.arch) == "compressed-tensors":
        return "torch cannot compile the layers of compressed-tensors as one graph: set compiler.fullgraph=false"
    return None
