"""What engine=fused can read of a loaded model: its matrices as lbi's kernels store them, or why it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lbi.errors import Unsupported
from lbi.kernels.decode_torch import Shape
from lbi.kernels.formats import Packed, pack

MODEL_TYPES = ("llama", "mistral")
MOST_HEADS_A_KEY = 16
"""Query heads of one key-value head that attention takes as one tile of the tensor cores."""

MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles change with the length of the text."""


def refusal(model: Any, shape: Shape, slots: int) -> str | None:
    """Why the model cannot be had; None if it can."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"a model of type {config.model_type} is not one of {', '.join(MODEL_TYPES)}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = int(getattr(config, "sliding_window", None) or slots)
    problems = {
        f"hidden_act={config.hidden_act} is not silu": config.hidden_act != "silu",
        f"rope_type={rope} changes its angles with the length of the text": rope in MOVING_ROPE,
        f"its sliding window of {window} tokens is shorter than the {slots} slots": window < slots,
        f"{shape.heads} query heads on {shape.kv_heads} key-value heads are more than {MOST_HEADS_A_KEY} on one": (
            shape.heads // shape.kv_heads > MOST_HEADS_A_KEY
        ),
        f"heads of {shape.width} values are odd or wider than 256": shape.width % 2 == 1 or shape.width > 256,
    }
    biased = [name for name, module in model.named_modules() if getattr(module, "bias", None) is not None]
    problems[f"{biased[0] if biased else ''} has a bias"] = bool(biased)
    found = next((problem for problem, is_so in problems.items() if is_so), None)
    return found or _unread(model)


def _unread(model: Any) -> str | None:
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not _is_read(module):
            return f"it cannot read {name}, a {type(module).__name__} of {type(_weight(module)).__name__}"
    return None


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)


def _is_read(module: Any) -> bool:
    return hasattr(module, "matrix") or type(module).__name__ == "Int8Linear" or _is_plain(module)


def _is_plain(module: Any) -> bool:
    weight = _weight(module)
    return isinstance(module, torch.nn.Linear) and type(weight) in (torch.nn.Parameter, torch.Tensor)


def matrix_of(module: Any) -> Packed:
    """A linear layer's weights: plain, of a NativeLinear, or of an Int8Linear. Raises `Unsupported`."""
    if hasattr(module, "matrix"):
        return module.matrix()  # type: ignore[no-any-return]
    if type(module).__name__ == "Int8Linear":
        codes = (module.weight.to(torch.int16) + 128).to(torch.uint8)
        return Packed("w8", module.in_features, pack(codes, 8), module.scale.float()[:, None])
    if _is_plain(module):
        return Packed("plain", module.in_features, module.weight.detach())
    raise Unsupported(f"engine=fused cannot read a {type(module).__name__}")


def give_back(module: Any, whole: Packed, rows: slice) -> None:
    """Let a layer of the model be a view of the matrix that its weights are part of now."""

    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows]

    if hasattr(module, "matrix"):
        data = whole.data[rows]
        module.adopt(replace(whole, data=data, scales=part(whole.scales), zeros=part(whole.zeros)))
    elif _is_plain(module):
        module.weight = torch.nn.Parameter(whole.data[rows], requires_grad=False)
