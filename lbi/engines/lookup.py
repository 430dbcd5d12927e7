"""Drafts without a model: what followed the last time that the text ended as it ends now.

Answers repeat their prompt (summaries, edits, code), and there an n-gram that was seen before is
likely to go on as it did then (Saxena, Prompt Lookup Decoding, 2023). The host has every token
that was verified, so it looks here, in a table that costs microseconds a token.
"""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """Every n-gram of a text of up to `ngram` tokens, with what followed it last."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text. An n-gram is noted with the index of the token after it, so the last one is not."""
        for token in tokens:
            end = len(self.tokens)
            for length in range(1, min(self.ngram, end) + 1):
                self._after[tuple(self.tokens[end - length : end])] = end
            self.tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """`count` tokens that may come next, or none: the continuation of the longest ending that is known.

        Where that runs into the end of the text, it goes on as a text does that repeats itself.
        """
        for length in range(min(self.ngram, len(self.tokens)), 0, -1):
            start = self._after.get(tuple(self.tokens[-length:]))
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + index % period] for index in range(count)]
        return []
