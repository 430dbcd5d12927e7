"""Whether a decode step multiplies by the same weights as the prefill.

Libraries take one kernel for a single row and another for many. Quality is scored with many
rows at once, so a one-row kernel that is wrong would leave the quality figures of a model
that never wrote a token: GemLite's untuned 1-bit kernel was off by 101%.
"""

from __future__ import annotations

from typing import Any

import torch

from lbi.errors import BadNumerics
from lbi.quantizers.audit import Layer

LARGEST = 0.1
"""Relative error that ends the run. Kernels that add up in bfloat16 are off by 0.04 at most."""


def worst_layer(model: torch.nn.Module, layers: list[Layer], rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The layer whose output for one row differs most from its output for `rows` equal rows, as JSON.

    One layer of each kind and shape is tried, on random normal inputs; equal rows have equal
    scales, so layers that quantize their inputs must agree too. The error is relative,
    ||y1 - y|| / ||y|| in float64. Raises `BadNumerics` where it is above `LARGEST`.
    """
    found: list[tuple[float, Layer]] = []
    tried: set[tuple[str, int, int]] = set()
    for layer in layers:
        key = (layer.seen.kind, layer.inputs, layer.params)
        if key not in tried:
            tried.add(key)
            inputs = torch.randn(1, layer.inputs, generator=torch.Generator().manual_seed(0))
            row = inputs.to(layer.seen.tensors[0].device, dtype)
            found.append((one_row_error(model.get_submodule(layer.name), row, rows), layer))
    error, layer = max(found, key=lambda pair: pair[0])
    shape = f"{layer.inputs} x {layer.params // layer.inputs}"
    if not error <= LARGEST:
        raise BadNumerics(
            f"{layer.name} ({layer.seen.kind}, {shape}): its product with one row is {error:.0%} off "
            f"its product with {rows} rows, so a decode step does not run the model whose quality is scored"
        )
    return {"error": error, "layer": layer.name, "kind": layer.seen.kind, "shape": shape, "rows": rows}


def one_row_error(layer: Any, row: torch.Tensor, rows: int) -> float:
    """||y1 - y|| / ||y|| of the outputs for `row`, (1, inputs): alone, and as the first of `rows` equal ones."""
    with torch.no_grad():
        alone, among = layer(row).double()[0], layer(row.repeat(max(rows, 2), 1)).double()[0]
    return float((alone - among).norm() / among.norm())
