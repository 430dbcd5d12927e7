"""A quantized layer taken apart into tensors and JSON, and put together again: what the store keeps of it.

A layer is never pickled: only the classes named here are kept, each by the values that it is made
from, so that nothing in a file can name code to run. A layer of another class says so (`NotKept`)
and is quantized anew by every run.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Callable
from typing import Any

import torch

from lbi.kernels.formats import Packed
from lbi.quantizers.int8_layers import Int8Embedding, Int8Linear
from lbi.quantizers.native_layers import NativeLinear
from lbi.quantizers.ternary_layers import RsrLinear, TernaryLinear

TENSORS = {
    "Int8Tensor": "torchao.quantization",
    "Float8Tensor": "torchao.quantization",
    "Int4Tensor": "torchao.quantization",
    "Int4TilePackedTo4dTensor": "torchao.quantization",
    "IntxUnpackedToInt8Tensor": "torchao.quantization",
    "Int4OpaqueTensor": "torchao.prototype.quantization.int4",
    "MXTensor": "torchao.prototype.mx_formats.mx_tensor",
    "NVFP4Tensor": "torchao.prototype.mx_formats.nvfp4_tensor",
}
"""torchao's tensor subclasses that are kept, and where each is found."""

VALUES = {
    "KernelPreference": "torchao.quantization.quantize_.common",
    "PerRow": "torchao.quantization.granularity",
    "PerTensor": "torchao.quantization.granularity",
    "MappingType": "torchao.quantization.quant_primitives",
    "QuantizeTensorToInt8Kwargs": "torchao.quantization.quantize_.workflows.int8.int8_tensor",
    "QuantizeTensorToFloat8Kwargs": "torchao.quantization.quantize_.workflows.float8.float8_tensor",
    "Float8MMConfig": "torchao.float8.inference",
    "QuantizeTensorToMXKwargs": "torchao.prototype.mx_formats.mx_tensor",
    "QuantizeTensorToNVFP4Kwargs": "torchao.prototype.mx_formats.nvfp4_tensor",
    "ScaleCalculationMode": "torchao.prototype.mx_formats.config",
}
"""Enumerations, dataclasses and named tuples among the attributes of those tensors."""

PLAIN_TYPES = (bool, int, float, str, type(None))


class NotKept(Exception):
    """These weights are not kept, and are quantized anew by each run; the message is the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """What a layer is made of: its kind, JSON values, and tensors by name."""

    kind: str
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def take_apart(layer: Any) -> Form:
    """What `layer` can be put together from. Raises `NotKept`."""
    kind = type(layer).__name__
    known = KINDS.get(kind)
    if known is None:
        raise NotKept(f"there is no way to keep a {kind}")
    values, tensors = known.take(layer)
    odd = next((name for name, tensor in tensors.items() if type(tensor) not in (torch.Tensor, torch.nn.Parameter)), "")
    if odd:
        raise NotKept(f"a {kind} holds a {type(tensors[odd]).__name__} in its {odd}")
    return Form(kind, values, {name: tensor.detach() for name, tensor in tensors.items()})


def put_together(form: Form, plain: Any) -> torch.nn.Module:
    """The layer of a form, for the place of `plain`, which is left as it is."""
    return KINDS[form.kind].make(form.values, form.tensors, plain)


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """How layers of one class are taken apart and made."""

    take: Callable[[Any], tuple[dict[str, Any], dict[str, torch.Tensor]]]
    make: Callable[[dict[str, Any], dict[str, torch.Tensor], Any], torch.nn.Module]


def _of_buffers(*attributes: str) -> Callable[[Any], tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """A layer of lbi's own: its buffers, and some attributes."""

    def take(layer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {name: tensor for name, tensor in layer._buffers.items() if tensor is not None}
        return {name: getattr(layer, name) for name in attributes}, tensors

    return take


def _native(values: dict[str, Any], tensors: dict[str, torch.Tensor], plain: Any) -> torch.nn.Module:
    matrix = Packed(values["format"], values["in_features"], tensors["data"], tensors["scales"], tensors.get("zeros"))
    return NativeLinear(matrix, tensors.get("bias"))


def _take_linear(layer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A Linear whose weight is one of torchao's tensors. Its bias is the model's own and is not kept."""
    weight = layer.weight
    kind = type(weight).__name__
    if type(layer) is not torch.nn.Linear or TENSORS.get(kind) is None or type(weight) is not _class(kind, TENSORS):
        raise NotKept(f"there is no way to keep a {type(layer).__name__} with a weight of the class {kind}")
    names, attributes = weight.__tensor_flatten__()
    tensors = {name: tensor for name in names if (tensor := getattr(weight, name)) is not None}
    size = {"size": list(weight.shape), "stride": list(weight.stride())}
    return {"class": kind, "attributes": encoded(attributes), **size}, tensors


def _linear(values: dict[str, Any], tensors: dict[str, torch.Tensor], plain: Any) -> torch.nn.Module:
    kind = _class(values["class"], TENSORS)
    weight = kind.__tensor_unflatten__(tensors, decoded(values["attributes"]), values["size"], values["stride"])
    made = torch.nn.Linear(1, 1, bias=False, device="meta")
    made.in_features, made.out_features = plain.in_features, plain.out_features
    made.weight, made.bias = torch.nn.Parameter(weight, requires_grad=False), plain.bias
    return made.train(plain.training)


HQQ_ATTRIBUTES = ("in_features", "out_features", "in_gpu", "axis", "channel_wise", "offload_meta", "device")
HQQ_ENCODED = ("compute_dtype", "quant_config")


def _take_hqq(layer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    meta = {name: value for name, value in layer.meta.items() if not isinstance(value, torch.Tensor)}
    tensors = {f"meta.{name}": value for name, value in layer.meta.items() if name not in meta}
    tensors |= {"W_q": layer.W_q} | ({} if layer.bias is None else {"bias": layer.bias})
    values = {name: encoded(getattr(layer, name)) for name in (*HQQ_ATTRIBUTES, *HQQ_ENCODED)}
    return {**values, "meta": encoded(meta)}, tensors


def _hqq(values: dict[str, Any], tensors: dict[str, torch.Tensor], plain: Any) -> torch.nn.Module:
    from hqq.core.quantize import HQQBackend, HQQLinear

    known = {name: decoded(values[name]) for name in (*HQQ_ATTRIBUTES, *HQQ_ENCODED)}
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    made: Any = HQQLinear(
        None,
        {**known["quant_config"], "offload_meta": known["offload_meta"]},
        compute_dtype=known["compute_dtype"],
        device=known["device"],
        initialize=False,
    )
    # What hqq's own `initialize` leaves behind.
    del made.linear_layer
    for name in HQQ_ATTRIBUTES:
        setattr(made, name, known[name])
    own = {name.removeprefix("meta."): tensor for name, tensor in tensors.items() if name.startswith("meta.")}
    made.meta = {**decoded(values["meta"]), **own}
    made.W_q = torch.nn.Parameter(tensors["W_q"], requires_grad=False)
    made.bias, made.ready = tensors.get("bias"), True
    return made  # type: ignore[no-any-return]


SIZES = ("in_features", "out_features")

KINDS = {
    "NativeLinear": _Kind(_of_buffers("format", *SIZES), _native),
    "TernaryLinear": _Kind(
        _of_buffers(*SIZES),
        lambda values, own, plain: TernaryLinear(own["packed"], own["scale"], own.get("bias"), values["in_features"]),
    ),
    "RsrLinear": _Kind(
        _of_buffers("k", *SIZES),
        lambda values, own, plain: RsrLinear.of_index(
            own["index"],
            own["starts"],
            own["scale"],
            own.get("bias"),
            (values["out_features"], values["in_features"], values["k"]),
        ),
    ),
    "Int8Linear": _Kind(
        _of_buffers(*SIZES), lambda values, own, plain: Int8Linear(own["weight"], own["scale"], own.get("bias"))
    ),
    "Int8Embedding": _Kind(_of_buffers(), lambda values, own, plain: Int8Embedding(own["weight"], own["scale"])),
    "Linear": _Kind(_take_linear, _linear),
    "HQQLinear": _Kind(_take_hqq, _hqq),
}
"""The classes that are kept."""


def encoded(value: Any) -> Any:
    """A value as JSON that `decoded` makes the same of again, its type included. Raises `NotKept`."""
    kind = type(value)
    if kind in PLAIN_TYPES:
        return value
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind in (list, tuple, torch.Size):
        return {kind.__name__: [encoded(item) for item in value]}
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": {key: encoded(item) for key, item in value.items()}}
    if VALUES.get(kind.__name__) is None or kind is not _class(kind.__name__, VALUES):
        raise NotKept(f"there is no way to keep a value of the class {kind.__name__}")
    if isinstance(value, enum.Enum):
        return {"enum": [kind.__name__, value.name]}
    names = getattr(value, "_fields", None) or [item.name for item in dataclasses.fields(value)]
    return {"object": [kind.__name__, {name: encoded(getattr(value, name)) for name in names}]}


def decoded(value: Any) -> Any:
    """The value that `encoded` made this of. Raises `KeyError` or another for what it did not make."""
    if type(value) in PLAIN_TYPES:
        return value
    ((kind, content),) = value.items()
    if kind == "dtype":
        return getattr(torch, content)
    if kind in SEQUENCES:
        return SEQUENCES[kind](decoded(item) for item in content)
    if kind == "dict":
        return {key: decoded(item) for key, item in content.items()}
    found, given = _class(content[0], VALUES), content[1]
    if kind == "enum":
        return found[given]
    return found(**{name: decoded(item) for name, item in given.items()})


SEQUENCES: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "Size": lambda items: torch.Size(items)}


def _class(name: str, table: dict[str, str]) -> Any:
    """A class of a table. Raises `KeyError` for one that is not in it."""
    return getattr(importlib.import_module(table[name]), name)
