"""Ways of decoding side by side in one run: tokens/s, tokens a verification, and the ratio to greedy.

    python benchmarks/speculation.py [--rows 'speculative_lookup,structured,...'] [--engine loop]
        [--prompt repetitive|chat|FILE] [--compiler eager] [--quantizer none] [--dtype float32]
        [--require 1.8]

One model in one process; each round runs every row once, one after the other, and the ratio is the median of
the rounds' own ratios, so that what a neighbour takes from the machine hits all rows alike. `same` says
that the tokens are greedy's, or at which token they part, which a grammar's do; --require fails where the first row is
slower. A turn, a draft and its verification, is worth it where it takes less than its tokens' number of greedy steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from engines import _planned

ROWS = (
    "speculative_lookup",
    "speculative_lookup decoding.draft_tokens=4",
    "speculative_lookup decoding.draft_tokens=16",
    "speculative_lookup decoding.draft_tokens=16 decoding.adaptive=true",
)
REPETITIVE = (
    "Repeat this list three times.\n"
    + "apples 3, pears 5, plums 7, cherries 11, grapes 13, lemons 17, oranges 19, melons 23\n" * 3
)


def main() -> int:
    """Measure the rows and print a line for each; the exit status is that of --require."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="decoding options, each with overrides, after a comma")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--engine", default="loop")
    parser.add_argument("--compiler", default="eager")
    parser.add_argument("--quantizer", default="none")
    parser.add_argument("--dtype", default="float32", help="torch multiplies few rows of bfloat16 one by one on AVX2")
    parser.add_argument("--prompt", default="repetitive", help="repetitive, a text of lbi/texts, or a file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--require", type=float, help="exit with 1 unless the first row is this much faster")
    given = parser.parse_args()
    rows = ["greedy", *(row.strip() for row in given.rows.split(","))]
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = measure(rows, given, Path(folder))
    print(f"{'decoding':70} {'tok/s':>7} {'ratio':>6} {'range':>12} {'tok/ver':>8} {'stood':>6} {'same':>8}")
    for row, line in found.items():
        print(
            f"{row:70} {line['speed']:7.1f} {line['ratio']:6.2f} {line['low']:5.2f} to {line['high']:<4.2f} "
            f"{line['length']:8.2f} {line['rate']:6.0%} {line['same']:>8}  draft {line['draft_ms']:.1f} ms, "
            f"verify {line['verify_ms']:.1f} ms: {line['turn']:.2f} greedy steps",
            flush=True,
        )
    return int(given.require is not None and found[rows[1]]["ratio"] < given.require)


def measure(rows: list[str], given: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of each row. All engines have one model; the first call of each does not count."""
    from lbi import steps
    from lbi.draft_models import load_draft
    from lbi.engines import make
    from lbi.metrics import summarize_speculation
    from lbi.models import load
    from lbi.process import Phases
    from lbi.prompts import read_text
    from lbi.record import Record

    common = [f"engine={given.engine}", f"compiler={given.compiler}", f"quantizer={given.quantizer}", "cache=static"]
    common += [f"model={given.model}", f"model.dtype={given.dtype}", f"workload.new_tokens={given.new_tokens}"]
    configs = {row: _planned([*common, *f"decoding={row}".split()], folder / str(at)) for at, row in enumerate(rows)}
    first = configs["greedy"]
    loaded = load(first.model, first.engine)
    phases = Phases(folder)
    drafts = {row: load_draft(config, loaded.model) for row, config in configs.items()}
    steps.quantize(first, loaded.model, [1, 2, 3], folder / "tuning.json", Record(folder, phases), phases)
    name = "text:chat" if given.prompt == "chat" else given.prompt
    prompt = loaded.encode(REPETITIVE if given.prompt == "repetitive" else read_text(name))
    engines = {}
    for row, config in configs.items():
        slots = len(prompt) + given.new_tokens + (config.decoding.draft_tokens or 0)
        steps.quantize_draft(config, drafts[row], Record(folder, phases), phases)
        engines[row] = make(config, loaded.model, slots, drafts[row], loaded.tokenizer)
        if config.compiler.backend != "eager":
            engines[row].compile()
        engines[row].generate(prompt, given.new_tokens, seed=0)
    rounds = [
        {row: engine.generate(prompt, given.new_tokens, seed=0) for row, engine in engines.items()}
        for _ in range(given.rounds)
    ]
    table = {}
    for row in rows:
        ratios = [each["greedy"].timing.tpot_s() / each[row].timing.tpot_s() for each in rounds]
        tallies = [each[row].speculation for each in rounds if each[row].speculation]
        about = summarize_speculation(tallies)
        same = rounds[0][row].tokens, rounds[0]["greedy"].tokens
        part = next((at for at, pair in enumerate(zip(*same, strict=False)) if pair[0] != pair[1]), None)
        turn_s = (about.get("draft_s") or 0.0) + (about.get("verify_s") or 0.0)
        table[row] = {
            "speed": median(1 / each[row].timing.tpot_s() for each in rounds),
            "ratio": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "length": about.get("acceptance_length") or 1.0,
            "rate": about.get("acceptance_rate") or 0.0,
            "draft_ms": 1e3 * (about.get("draft_s") or 0.0),
            "verify_ms": 1e3 * (about.get("verify_s") or 0.0),
            "same": "yes" if part is None else f"to {part}",
            "turn": turn_s / median(each["greedy"].timing.tpot_s() for each in rounds),
        }
    print(loaded.decode(rounds[0]["greedy"].tokens)[:200].replace("\n", " / "), "\n")
    return table


if __name__ == "__main__":
    sys.exit(main())
