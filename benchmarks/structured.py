"""Many texts under ten schemas: do all of them parse and validate, and what does a mask cost?

    python benchmarks/structured.py [--texts 1000] [--model tiny|smollm2_135m] [--lookup]

`tiny` is a random model of two layers with SmolLM2's vocabulary of 49,152 tokens and its tokenizer: what it
writes is noise, which a grammar must hold against, and a text takes a fraction of a second. `--tiktoken FILE`
gives it another vocabulary instead: Llama 3's `tokenizer.model` (the package llama-models has one), 128,256 tokens.
Needs jsonschema; --tiktoken needs tiktoken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from engines import _planned

MOST_TOKENS = 600

LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer cuts a text before it merges bytes, as its own source has it."""


def main() -> int:
    """Generate, validate, and print a line for each schema; the exit status is 1 if one text is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--model", default="tiny", choices=("tiny", "smollm2_135m"))
    parser.add_argument("--cpu-time", action="store_true", help="count the thread's seconds, as on a busy machine")
    parser.add_argument("--tiktoken", metavar="FILE", help="a vocabulary for `tiny`")
    parser.add_argument("--lookup", action="store_true", help="with drafts of a lookup as well")
    given = parser.parse_args()
    schemas = json.loads((Path(__file__).parent / "schemas.json").read_text())
    import torch

    from lbi.engines import grammar_drafter

    if given.cpu_time:
        grammar_drafter.now = time.thread_time
    wrong, total, masks = 0, 0, []
    print(
        f"{'schema':12} {'texts':>5} {'wrong':>5} {'distinct':>8} {'tokens':>7} {'forced':>7} {'mask us':>8} {'s':>6}"
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        config, loaded = setting(given, Path(folder))
        for name, schema in schemas.items():
            found = texts(config, loaded, schema, given.texts // len(schemas))
            wrong += found["wrong"]
            total += found["tokens"]
            masks.append((found["mask_s"], found["tokens"]))
            print(
                f"{name:12} {found['texts']:5} {found['wrong']:5} {found['distinct']:8} {found['tokens']:7} "
                f"{found['forced'] / found['tokens']:7.0%} {1e6 * found['mask_s'] / found['tokens']:8.0f} "
                f"{found['seconds']:6.1f}",
                flush=True,
            )
    overall = 1e6 * sum(seconds for seconds, _ in masks) / total
    print(f"{total} tokens, {wrong} texts wrong, {overall:.0f} us of the host for the grammar per token")
    print(f"mean of the schemas: {mean(1e6 * seconds / tokens for seconds, tokens in masks):.0f} us")
    return int(wrong > 0)


def setting(given: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The configuration, and the model with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from lbi.models import load

    option = "structured_lookup" if given.lookup else "structured"
    knobs = [f"decoding={option}", "decoding.kind=sampling", "decoding.temperature=1.0", "decoding.seed=0"]
    common = ["engine=loop", "cache=static", "model=smollm2_135m", "model.dtype=float32"]
    config = _planned([*common, *knobs], folder)
    loaded = load(config.model, config.engine)
    if given.model == "tiny":
        shape = loaded.model.config
        shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size = 2, 64, 128
        shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim = 4, 2, 16
        shape.initializer_range = 0.1
        if given.tiktoken:
            tokenizer = llama3_tokenizer(given.tiktoken)
            shape.vocab_size, shape.eos_token_id = len(tokenizer), tokenizer.eos_token_id
            loaded = replace(loaded, tokenizer=tokenizer)
        torch.manual_seed(0)
        loaded = replace(loaded, model=AutoModelForCausalLM.from_config(shape).float().eval())
    return config, loaded


def llama3_tokenizer(file: str) -> Any:
    """A tokenizer of transformers from the ranks of Llama 3's, with its 256 special tokens."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{at}|>" for at in range(254))]
    made = TikTokenConverter(file, pattern=LLAMA3_PIECES, extra_special_tokens=special).converted()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0], eos_token=special[1])


def texts(config: Any, loaded: Any, schema: dict[str, Any], count: int) -> dict[str, Any]:
    """What `count` texts under a schema are, each from a seed of its own."""
    import jsonschema

    from lbi.engines import make

    cell = replace(config, decoding=replace(config.decoding, grammar=json.dumps(schema, ensure_ascii=False)))
    slots = MOST_TOKENS + 100
    engine = make(cell, loaded.model, slots, tokenizer=loaded.tokenizer)
    prompt = loaded.encode("Write JSON: ")
    engine.generate(prompt, MOST_TOKENS, seed=count)
    start, different = time.perf_counter(), set()
    found = {"texts": count, "wrong": 0, "tokens": 0, "forced": 0, "mask_s": 0.0}
    for seed in range(count):
        made = engine.generate(prompt, MOST_TOKENS, seed=seed)
        text = loaded.tokenizer.decode(made.tokens, skip_special_tokens=True)
        different.add(text)
        try:
            jsonschema.validate(json.loads(text), schema)
            found["wrong"] += not made.finished
        except (ValueError, jsonschema.ValidationError) as error:
            found["wrong"] += 1
            print(f"  seed {seed}: {str(error).splitlines()[0]}: {text[:120]!r}")
        found["tokens"] += len(made.tokens)
        found["forced"] += made.speculation.forced
        found["mask_s"] += made.speculation.mask_s
    return found | {"distinct": len(different), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    sys.exit(main())
