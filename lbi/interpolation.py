"""Resolves ${...} in configs that share subtrees, each distinct case once.

Resolving a whole configuration takes OmegaConf milliseconds; in a grid nearly all
of that work is the same from cell to cell. The value of a subtree depends on
itself and on the subtrees its interpolations name, so it is remembered under the
identity of those.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_EVERYTHING = "*"


class Resolver:
    """Resolves configs given as a mapping from top-level key to subtree.

    Subtrees must be immutable in practice: results are remembered by identity,
    and the remembered subtrees are kept alive so that identities stay unique.
    """

    def __init__(self) -> None:
        self._references: dict[tuple[str, int], tuple[Any, frozenset[str]]] = {}
        self._resolved: dict[tuple[Any, ...], Any] = {}
        self._alive: list[Any] = []

    def resolve(self, raw: dict[str, Any]) -> dict[str, Any]:
        """`raw` with every interpolation replaced. Raises `ValueError` for one that has no value."""
        pending = [name for name, section in raw.items() if self._refers(name, section)]
        if not pending:
            return raw
        resolved = dict(raw)
        root = None
        for name in pending:
            key = (name, *((other, id(raw[other])) for other in sorted(self._closure(name, raw))))
            if key not in self._resolved:
                root = root if root is not None else OmegaConf.create(raw)
                self._resolved[key] = self._resolve_one(root, name)
                self._alive.extend(raw.values())
            resolved[name] = self._resolved[key]
        return resolved

    @staticmethod
    def _resolve_one(root: Any, name: str) -> Any:
        try:
            node = root[name]
            return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            raise ValueError(str(error).strip()) from error

    def _closure(self, name: str, raw: dict[str, Any]) -> set[str]:
        """Top-level keys that the value of `name` may depend on, itself included."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            current = todo.pop()
            if current in seen or current not in raw:
                continue
            seen.add(current)
            references = self._refers(current, raw[current])
            if _EVERYTHING in references:
                return set(raw)
            todo.extend(references)
        return seen

    def _refers(self, name: str, section: Any) -> frozenset[str]:
        """Top-level keys that interpolations in this subtree name; empty where it holds none."""
        known = self._references.get((name, id(section)))
        if known is None:
            found: set[str] = set()
            _collect(section, [name], found)
            known = self._references[name, id(section)] = (section, frozenset(found))
        return known[1]


def _collect(node: Any, path: list[str], found: set[str]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _collect(value, [*path, str(key)], found)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _collect(value, [*path, str(index)], found)
    elif isinstance(node, str) and "${" in node:
        found.add(path[0])
        found |= _named(node, path)


def _named(text: str, path: list[str]) -> set[str]:
    """Top-level keys named by the interpolations in one string at `path`."""
    simple = _REFERENCE.findall(text)
    if len(simple) != text.count("${"):
        # Nested: what is named is known only after resolving.
        return {_EVERYTHING}
    names = set()
    for reference in simple:
        if ":" in reference:
            # Of the resolvers only oc.env is known to look at nothing in the config.
            if not reference.startswith("oc.env:"):
                return {_EVERYTHING}
            continue
        target = _target(reference, path)
        if target is None:
            return {_EVERYTHING}
        names.add(target)
    return names


def _target(reference: str, path: list[str]) -> str | None:
    dots = len(reference) - len(reference.lstrip("."))
    rest = [part for part in re.split(r"[.\[\]]", reference.lstrip(".")) if part]
    if dots:
        if dots > len(path):
            return None
        rest = path[: len(path) - dots] + rest
    return rest[0] if rest else None
