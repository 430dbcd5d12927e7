"""The grammar that an output must follow: what it is, and whether it can be followed at all. Without torch.

llguidance compiles JSON schemas, regular expressions and Lark grammars, and says which tokens may come next.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from lbi.config import DecodingConfig
from lbi.errors import Unsupported

COMPACT: Any = {"whitespace_flexible": False}
"""JSON without white space, unless the schema's own `x-guidance` says otherwise: a small model that may write blank
lines between two values does not stop writing them."""


def text(decoding: DecodingConfig) -> str:
    """The grammar itself, of the knob or of the file that it names. Raises `OSError` for a file that cannot be read."""
    given = str(decoding.grammar)
    # A grammar may be longer than any file's name, which pathlib raises for.
    return Path(given).expanduser().read_text() if os.path.isfile(os.path.expanduser(given)) else given


def compiled(decoding: DecodingConfig) -> str:
    """The grammar in llguidance's own form. Raises `ValueError` for a JSON schema that is no JSON."""
    from llguidance import LLMatcher

    def from_schema(schema: str) -> str:
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=COMPACT))

    makers: dict[str, Any] = {
        "json_schema": from_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    return str(makers[str(decoding.grammar_kind)](text(decoding)))


@cache
def why_not(decoding: DecodingConfig) -> str | None:
    """Why no output can follow the grammar; None if one can."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        return "a grammar needs the package llguidance: pip install llguidance"

    try:
        if decoding.grammar_kind == "json_schema":
            json.loads(text(decoding))
        problem = LLMatcher.validate_grammar(compiled(decoding))
    except (OSError, ValueError) as error:
        problem = str(error)
    if not problem or problem.startswith("WARNING"):
        return None
    first = problem.strip().splitlines()[0].rstrip(": ")
    return f"decoding.grammar is no {decoding.grammar_kind} that can be followed: {first}"


def matcher(decoding: DecodingConfig, tokenizer: Any, vocabulary: int) -> Any:
    """An llguidance matcher for the grammar. Raises `Unsupported` where tokenizer or grammar cannot be had."""
    from llguidance import LLMatcher, LLTokenizer
    from llguidance.hf import from_tokenizer

    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise Unsupported(f"{decoding.name} needs a model with a fast tokenizer of Hugging Face")
    # Groups of tokens whose masks are made ahead: for JSON those that stand in strings.
    slices = LLTokenizer.json_slices() if decoding.grammar_kind == "json_schema" else None
    words = from_tokenizer(tokenizer, n_vocab=vocabulary, slices=slices)
    made = LLMatcher(words, compiled(decoding), log_level=0)
    if made.is_error():
        raise Unsupported(f"decoding.grammar: {made.get_error()}")
    return made
