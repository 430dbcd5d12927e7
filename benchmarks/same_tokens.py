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
from dataclasses import dataclass
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
        wanted = expected(given, Path(folder) / "plain")
        wrong = False
        for at, row in enumerate(given.rows.split(",")):
            line = check(row, given, wanted, Path(folder) / str(at))
            print("\n  ".join([line.said, *line.wrong]), flush=True)
            wrong = wrong or bool(line.wrong)
    return int(wrong)


@dataclass(frozen=True)
class Expected:
    """What generate() wrote behind a prompt, and its logits: as it wrote, and (tokens, vocabulary) in one pass."""

    prompt: list[int]
    found: Any
    in_one_pass: Any


@dataclass(frozen=True)
class Checked:
    """What is said of an engine, and what is wrong with it."""

    said: str
    wrong: list[str]


def common(given: argparse.Namespace) -> list[str]:
    return [f"model={given.model}", f"model.dtype={given.dtype}", f"workload.new_tokens={given.new_tokens}"]


def expected(given: argparse.Namespace, folder: Path) -> list[Expected]:
    """generate() with a dynamic cache, eager, once for all engines: it is the slowest of them."""
    from lbi.engines import make
    from lbi.models import load

    plain = _planned([*common(given), "engine=hf", "compiler=eager", "cache=dynamic"], folder)
    loaded = load(plain.model, plain.engine)
    theirs, made = make(plain, loaded.model, slots=0), []
    for prompt in prompts(loaded.encode, given.prompts):
        found = theirs.generate(prompt, given.new_tokens, seed=0, inspect=True)
        in_one_pass = theirs.forward(prompt + found.tokens[:-1])[len(prompt) - 1 :].float().cpu()
        made.append(Expected(prompt, found, in_one_pass))
        print(f"generate(): {len(made)} of {given.prompts} prompts", file=sys.stderr, flush=True)
    return made


def check(row: str, given: argparse.Namespace, wanted: list[Expected], folder: Path) -> Checked:
    """One engine on the same weights."""
    from lbi import lossless
    from lbi.engines import make
    from lbi.errors import BadNumerics
    from lbi.models import load

    engine, compiler = row.split()
    cell = _planned([*common(given), f"engine={engine}", f"compiler={compiler}", "cache=static"], folder)
    loaded = load(cell.model, cell.engine)
    arithmetic = lossless.Arithmetic(loaded.model.dtype, loaded.model.config.num_hidden_layers, plain=True)
    ours = make(cell, loaded.model, max(len(one.prompt) for one in wanted) + given.new_tokens)
    if cell.compiler.backend != "eager":
        ours.compile()
    equal, ties, wrong, worst = 0, 0, [], 0.0
    for number, one in enumerate(wanted):
        found = ours.generate(one.prompt, given.new_tokens, seed=0, inspect=True)
        asked = found.tokens, one.found.tokens, one.found.logits, one.in_one_pass, arithmetic
        try:
            verdict = lossless.compare(*asked)["verdict"]
        except BadNumerics as error:
            verdict, _ = "wrong", wrong.append(f"prompt {number}: {error}")
        equal, ties = equal + (verdict == "equal"), ties + (verdict == "tie")
        worst = max(worst, apart(found, one.found))
    if worst > LARGEST[given.dtype]:
        wrong.append(f"logits are {worst:.1e} off")
    said = f"{row}, {given.dtype}: of {len(wanted)} prompts {equal} equal, {ties} tie; logits at most {worst:.1e} off"
    return Checked(said, wrong)


def apart(found: Any, wanted: Any) -> float:
    """Relative error of the logits as far as the texts are the same, and one token more: those have seen the same."""
    pairs = zip(found.tokens, wanted.tokens, strict=True)
    same = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), -1)
    until = len(wanted.tokens) if same < 0 else same + 1
    difference = found.logits[:until].double() - wanted.logits[:until].double()
    return float(difference.norm() / wanted.logits[:until].double().norm())


def prompts(encode: Any, count: int) -> list[list[int]]:
    """Different stretches of the quality text, of lengths that are multiples of nothing."""
    from lbi.prompts import read_text

    text = encode(read_text("text:quality"))
    return [text[90 * number : 90 * number + 24 + number % 7] for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
