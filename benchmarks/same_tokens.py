"""Do our engines write what transformers writes? Real weights, 20 prompts, 200 greedy tokens each.

    python benchmarks/same_tokens.py [--dtype float32|bfloat16] [--rows 'loop cudagraph,fused cudagraph']
        [--prompts 20] [--new-tokens 200] [--model smollm2_135m]

Prompts are stretches of the quality text, 24 to 30 tokens. In float32 all tokens must be those of
generate(), and the logits within 1e-3 of it; in bfloat16 a difference must be a tie by lbi/lossless.py's
rule. The exit status is 1 if one prompt differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from engines import _planned

LARGEST = {"float32": 1e-3, "bfloat16": 0.1}
"""Relative error of the logits, over a text."""


def main() -> int:
    """Print a line for each engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="loop cudagraph,fused cudagraph", help="engine and compiler")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--dtype", default="float32", choices=tuple(LARGEST))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=200)
    given = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lines = [check(row, given, Path(folder) / str(at)) for at, row in enumerate(given.rows.split(","))]
    for line in lines:
        print(line["said"], flush=True)
    return int(any(line["wrong"] for line in lines))


def check(row: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One engine against generate() with a dynamic cache, eager, on the same weights."""
    from lbi import lossless
    from lbi.engines import make
    from lbi.errors import BadNumerics
    from lbi.models import load

    engine, compiler = row.split()
    common = [f"model={given.model}", f"model.dtype={given.dtype}", f"workload.new_tokens={given.new_tokens}"]
    plain = _planned([*common, "engine=hf", "compiler=eager", "cache=dynamic"], folder / "plain")
    cell = _planned([*common, f"engine={engine}", f"compiler={compiler}", "cache=static"], folder / "cell")
    texts = prompts(load(plain.model, plain.engine).encode, given.prompts)
    slots = max(map(len, texts)) + given.new_tokens
    theirs = make(plain, load(plain.model, plain.engine).model, slots=0)
    loaded = load(cell.model, cell.engine)
    arithmetic = lossless.Arithmetic(loaded.model.dtype, loaded.model.config.num_hidden_layers, plain=True)
    ours = make(cell, loaded.model, slots)
    if cell.compiler.backend != "eager":
        ours.compile()
    equal, ties, wrong, worst = 0, 0, [], 0.0
    for number, prompt in enumerate(texts):
        wanted = theirs.generate(prompt, given.new_tokens, seed=0, inspect=True)
        found = ours.generate(prompt, given.new_tokens, seed=0, inspect=True)
        in_one_pass = theirs.forward(prompt + wanted.tokens[:-1])[len(prompt) - 1 :].float().cpu()
        try:
            verdict = lossless.compare(found.tokens, wanted.tokens, wanted.logits, in_one_pass, arithmetic)["verdict"]
        except BadNumerics as error:
            verdict, _ = "wrong", wrong.append(f"prompt {number}: {error}")
        equal, ties = equal + (verdict == "equal"), ties + (verdict == "tie")
        # As far as the texts are the same, and one token more: the logits before it have seen the same.
        same = next(
            (at for at, pair in enumerate(zip(found.tokens, wanted.tokens, strict=True)) if pair[0] != pair[1]), -1
        )
        until = len(wanted.tokens) if same < 0 else same + 1
        difference = found.logits[:until].double() - wanted.logits[:until].double()
        worst = max(worst, float(difference.norm() / wanted.logits[:until].double().norm()))
    if worst > LARGEST[given.dtype]:
        wrong.append(f"logits are {worst:.1e} off")
    said = f"{row}, {given.dtype}: of {len(texts)} prompts {equal} equal, {ties} tie; logits at most {worst:.1e} off"
    return {"said": "\n  ".join([said, *wrong]), "wrong": bool(wrong)}


def prompts(encode: Any, count: int) -> list[list[int]]:
    """Different stretches of the quality text, of lengths that are multiples of nothing."""
    from lbi.prompts import read_text

    text = encode(read_text("text:quality"))
    return [text[90 * number : 90 * number + 24 + number % 7] for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
