"""A linear layer and an embedding table in int8, one scale a row.

With tied weights the two may be one tensor: a head and a table that share it cost a
quarter of what a bf16 table beside an int8 head costs.
"""

from __future__ import annotations

from typing import Any

import torch


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of a (rows, columns) weight, and a scale a row in the weight's type."""
    wide = weight.detach().float()
    scale = (wide.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    stored = (wide / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return stored, scale


class Int8Linear(torch.nn.Module):
    """y = (x @ weight.T) * scale + bias; `weight` is (out, in) int8, `scale` is (out,) bf16."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: Any) -> Int8Linear:
        """The layer's weights, rounded."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*quantize_rows(linear.weight), bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), by the kernel that reads int8."""
        flat = inputs.reshape(-1, self.in_features)
        product = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        shaped = product.view(*inputs.shape[:-1], self.out_features)
        return shaped if self.bias is None else shaped + self.bias


class Int8Embedding(torch.nn.Module):
    """Rows of an int8 table times their scales: `weight` is (tokens, width) int8, `scale` is (tokens,)."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) token ids to (..., width) in the type of the scales."""
        return self.weight[tokens].to(self.scale.dtype) * self.scale[tokens][..., None]


def quantize_embeddings(model: Any) -> None:
    """Put the input embeddings into int8; a head that was tied to them and is int8 shares the tensor."""
    table = model.get_input_embeddings()
    stored, scale = quantize_rows(table.weight)
    model.set_input_embeddings(Int8Embedding(stored, scale))
    head = model.get_output_embeddings()
    if isinstance(head, Int8Linear) and torch.equal(head.weight, stored):
        head.weight, head.scale = stored, scale
