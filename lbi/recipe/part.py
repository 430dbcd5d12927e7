"""A part of a recipe: what it imports, and its code."""

from __future__ import annotations

import pprint
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """`imports` are whole lines; `code` is what stands at the top level of the script."""

    imports: tuple[str, ...]
    code: str


def literal(value: Any, indent: int = 0) -> str:
    """A value as Python source, on lines of at most 100 characters where it is a collection."""
    text = pprint.pformat(value, width=100 - indent, compact=True, sort_dicts=False)
    return text.replace("\n", "\n" + " " * indent)


def arguments(known: dict[str, Any]) -> str:
    """Keyword arguments as Python source."""
    return ", ".join(f"{name}={value!r}" for name, value in known.items())
