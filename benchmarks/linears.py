"""How fast each option multiplies one token, at the shapes of a model, side by side in one run.

    python benchmarks/linears.py [--options none,int8_pack,...] [--model 8b|1b|135m] [--compiler cudagraph]

Layers are timed as AutoQuant times them (lbi/quantizers/layer_timing.py): a pass goes through
more weights than a cache holds, and all options take turns. GB/s counts what is stored: packed
weights, scales and zeros. "one row" is the relative error of the output for one row against
that for six equal rows, which another kernel makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
import yaml

from lbi.config import CompilerConfig
from lbi.errors import RunFailure
from lbi.places import conf_folder
from lbi.quantizers import audit, method
from lbi.quantizers.layer_timing import LayerPass, in_turn, layers_in_a_pass
from lbi.quantizers.one_row import one_row_error
from lbi.quantizers.options import option

SHAPES = {
    "8b": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "1b": [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)],
    "135m": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
}
"""(inputs, outputs) of a Llama's linear layers."""

GPU = "none,int8_pack,int8_wo,fp8_wo,int4_wo group_size=128,gemlite_a16w8_int8,gemlite_a16w4"
CPU = "none,int8_pack,int8_wo,int4_wo,bitnet"


def made(text: str, weights: list[torch.Tensor]) -> tuple[list[Any], int, float]:
    """Layers stored as the option says, their bytes, and their kernel's error against what they store."""
    config = option(text)
    block = torch.nn.ModuleDict()
    for index, weight in enumerate(weights):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        block[str(index)] = layer
    if config.family != "none":
        method(config).apply(block, config, frozenset(block))
    layers = audit.read_layers(block, frozenset(block))
    assert {layer.name for layer in layers} == set(block)
    x = torch.randn(1, weights[0].shape[1], device=weights[0].device, dtype=weights[0].dtype)
    error = one_row_error(block["0"], x, 6)
    return [block[str(index)] for index in range(len(weights))], sum(layer.stored_bytes for layer in layers), error


def compare(shape: tuple[int, int], options: list[str], compiler: CompilerConfig, device: str) -> list[dict[str, Any]]:
    """A row per option for one shape."""
    inputs, outputs = shape
    count = layers_in_a_pass(32, 2 * inputs * outputs)
    weights = [torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5 for _ in range(count)]
    x = torch.randn(1, 1, inputs, device=device, dtype=torch.bfloat16)
    passes, rows = {}, {}
    for text in options:
        try:
            layers, stored, error = made(text, weights)
            passes[text] = LayerPass(layers, x, compiler)
            rows[text] = {"option": text, "shape": list(shape), "bytes": stored / count, "kernel_error": error}
        except (RunFailure, RuntimeError, NotImplementedError, AssertionError, ImportError) as problem:
            print(f"{text} {shape}: {type(problem).__name__}: {str(problem).strip()[:300]}", file=sys.stderr)
    for text, (seconds, spread) in in_turn(passes).items():
        rows[text] |= {"us": seconds * 1e6, "spread_us": spread * 1e6, "gb_s": rows[text]["bytes"] / seconds / 1e9}
    return list(rows.values())


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--options", default=GPU if cuda else CPU)
    parser.add_argument("--model", choices=SHAPES, default="8b" if cuda else "135m")
    parser.add_argument("--compiler", default="cudagraph" if cuda else "eager")
    parser.add_argument("--json")
    given = parser.parse_args()
    content = yaml.safe_load((conf_folder() / "compiler" / f"{given.compiler}.yaml").read_text())
    torch._dynamo.config.recompile_limit = 256
    found = []
    with torch.no_grad():
        for shape in SHAPES[given.model]:
            rows = compare(shape, given.options.split(","), CompilerConfig(**content), "cuda" if cuda else "cpu")
            plain = next((row["us"] for row in rows if row["option"] == "none"), None)
            for row in sorted(rows, key=lambda row: row["us"]):
                ratio = f"{plain / row['us']:5.2f}x" if plain else ""
                print(
                    f"{shape!s:15} {row['option']:32} {row['us']:8.1f} us ±{row['spread_us']:5.1f} "
                    f"{row['gb_s']:7.0f} GB/s {ratio} one row {row['kernel_error']:.1e}",
                    flush=True,
                )
            found += rows
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
