"""Inputs that survive an option's own quantization of them exactly, so that only the product is tested."""

from __future__ import annotations

import torch

from lbi.config import QuantizerConfig
from lbi.quantizers import method


def exact_inputs(config: QuantizerConfig, rows: int, width: int, device: str = "cpu") -> torch.Tensor:
    """(rows, width) in bf16, drawn afresh from what the option keeps of its inputs."""
    activations = method(config).activations
    if config.method in ("mx_sim", "mx_da"):
        activations = config.bits or 0
    if activations == 16:
        return torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    if activations == 8 and ("int8" in config.name or config.method in ("a8w158", "int8_da")):
        made = torch.randint(-127, 128, (rows, width), device=device).to(torch.bfloat16)
        # The largest value makes the scale 1.
        made[:, 0] = 127
        return made
    if activations == 8:
        drawn = (torch.randn(rows, width, device=device) * 100).clamp(-448, 448)
        made = drawn.to(torch.float8_e4m3fn).to(torch.bfloat16)
        made[:, ::32] = 448
        return made
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device, dtype=torch.bfloat16)
    made = levels[torch.randint(8, (rows, width), device=device)]
    made *= torch.randint(0, 2, made.shape, device=device) * 2 - 1
    made[:, ::16] = 6
    return made
