"""A long text made of a short one, by a rule: what is shipped stays small, and no run of it repeats word for word.

A text that were only repeated would be the easiest there is: from its second round on every token
could be copied. Here each round takes the paragraphs in another order and numbers them on.
"""

from __future__ import annotations

from math import gcd

ROUNDS = 24
"""Of the 2,063 tokens of lbi/texts/quality.txt (SmolLM2's tokenizer), numbers aside: some 50,000."""


def rounds(text: str, count: int = ROUNDS) -> str:
    """`count` rounds over the paragraphs of `text`, numbered through.

    Of n paragraphs round r begins with paragraph r and takes every s-th from there on, s being the
    r-th number from 1 on that has no divisor in common with n.
    """
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    total = len(paragraphs)
    strides = [step for step in range(1, count * total + 1) if gcd(step, total) == 1]
    order = [(turn + index * strides[turn]) % total for turn in range(count) for index in range(total)]
    return "\n\n".join(f"{number}. {paragraphs[place]}" for number, place in enumerate(order, start=1))
