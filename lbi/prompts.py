"""Texts that models are given: found by their names, and cut to a length in tokens; without torch."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

from lbi.errors import InputError, Unsupported
from lbi.long_text import rounds


def read_text(name: str) -> str:
    """The text itself, a text of lbi/texts ("text:chat"), a long one made of it ("rounds:quality"), or a file.

    Raises `Unsupported` for one that is not there.
    """
    if name.startswith("rounds:"):
        return rounds(read_text("text:" + name.removeprefix("rounds:")))
    if not name.startswith("text:"):
        # A prompt may be longer than any file's name, which pathlib raises for.
        path = os.path.expanduser(name)
        return Path(path).read_text() if os.path.isfile(path) else name
    file = Path(__file__).parent / "texts" / f"{name.removeprefix('text:')}.txt"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt")))
        raise Unsupported(f"{name}: there is no such text; there are: {known}")
    return file.read_text()


def fit_tokens(tokens: list[int], wanted: int | None) -> list[int]:
    """Cut or repeat `tokens` to `wanted`; all of them where `wanted` is None. Raises `InputError` for none at all."""
    if not tokens:
        raise InputError("workload.prompt", None, "has no tokens", "Give a text of at least one token")
    if wanted is None:
        return tokens
    return (tokens * (wanted // len(tokens) + 1))[:wanted]


def stand_in_tokens(text: str, vocabulary: int) -> list[int]:
    """Token ids for a model that has no tokenizer: one a word, about as many as a real one makes."""
    words = re.findall(r"\s?\w+|[^\w\s]", text)
    return [0, *(1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words)]
