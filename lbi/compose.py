"""Composes the cells of a grid: exactly Hydra's configs, at a fraction of Hydra's time.

Hydra takes about 40 ms to compose one configuration, and its sweeper does it
twice. A grid of 10,000 cells is made of a few dozen options, though. Hydra's
result is an ordered merge of the files on the defaults list, followed by the
value overrides; each of them writes below a few top-level keys. If two axes never
write below the same key, the subtree under each key depends on one axis alone.
So: compose one cell with Hydra itself, find the subtrees of each value of each axis
(straight from its file where that is all there is to it, else by Hydra again), and
assemble cells from shared subtrees.

What makes this exact is checked, not assumed. Axes that may write below a common
key are joined into one axis, whose values are the product of theirs. A defaults list
with an interpolation, where one axis could choose another's files, turns assembly
off, and every cell is composed by Hydra. `tests/test_compose.py` compares random
cells of several configuration trees with Hydra's own compose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lbi.hydra_compose import Hydra, Section, Whole, explain
from lbi.interpolation import Resolver
from lbi.sections import top_level


@dataclass(frozen=True, slots=True)
class Axis:
    """One swept knob: its key as written (with + or ~), and its overrides, a value each."""

    key: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Composed:
    """One cell: its overrides, and its config by top-level key, or why it does not compose.

    `raw` keeps interpolations, `sections` is resolved.
    """

    overrides: tuple[str, ...]
    raw: dict[str, Section]
    sections: dict[str, Section]
    error: str | None = None


@dataclass(slots=True)
class _Choice:
    """What one value of a (joined) axis writes."""

    written: dict[str, Section]
    error: str | None = None


_Choices = dict[tuple[str, ...], _Choice]
"""What each value of a (joined) axis writes, by its overrides."""


class _Entangled(Exception):
    """The grid cannot be taken apart by top-level keys."""


class Composer:
    """Composes the product of `axes` over the `fixed` overrides.

    `order` is the order of all override keys as given, which Hydra's result may depend on.
    Iterating gives a `Composed` for each cell, the last axis varying fastest.
    """

    def __init__(
        self,
        hydra: Hydra,
        fixed: dict[str, str],
        axes: Sequence[Axis],
        order: Sequence[str],
    ) -> None:
        self.hydra = hydra
        self.fixed, self.axes, self.order = fixed, tuple(axes), tuple(order)
        self.assembled = True
        self._resolver = Resolver()

    def __iter__(self) -> Iterator[Composed]:
        try:
            joined, base = self._take_apart()
        except _Entangled:
            self.assembled = False
            yield from self._one_by_one()
            return
        for combination in itertools.product(*(axis.overrides for axis in self.axes)):
            chosen = dict(zip((axis.key for axis in self.axes), combination, strict=True))
            raw, error = dict(base), None
            for keys, choices in joined:
                choice = choices[tuple(chosen[key] for key in keys)]
                error = error or choice.error
                for section, content in choice.written.items():
                    if content is _ABSENT:
                        raw.pop(section, None)
                    else:
                        raw[section] = content
            yield self._finish(chosen, raw, error)

    def __len__(self) -> int:
        count = 1
        for axis in self.axes:
            count *= len(axis.overrides)
        return count

    def _finish(self, chosen: dict[str, str], raw: dict[str, Section], error: str | None) -> Composed:
        overrides = self._in_order(chosen)
        if error is None:
            try:
                return Composed(overrides, raw, self._resolver.resolve(raw))
            except ValueError as problem:
                error = str(problem)
        return Composed(overrides, {}, {}, error)

    def _in_order(self, chosen: dict[str, str]) -> tuple[str, ...]:
        given = {**self.fixed, **chosen}
        return tuple(given[key] for key in self.order if key in given)

    def _one_by_one(self) -> Iterator[Composed]:
        for combination in itertools.product(*(axis.overrides for axis in self.axes)):
            chosen = dict(zip((axis.key for axis in self.axes), combination, strict=True))
            whole = self._compose(chosen)
            if isinstance(whole, str):
                yield self._finish(chosen, {}, whole)
            else:
                yield self._finish(chosen, whole.sections, None)

    def _take_apart(self) -> tuple[list[tuple[tuple[str, ...], _Choices]], dict[str, Section]]:
        return self._all_plain() or self._with_hydra()

    def _all_plain(self) -> tuple[list[tuple[tuple[str, ...], _Choices]], dict[str, Section]] | None:
        """All overrides by top-level key over one configuration without them; None where some need Hydra.

        That configuration is the same for every grid of a sweep, and composed once.
        """
        plain = [name for name in self.order if self.hydra.sections.may_be_plain(name)]
        in_base = frozenset(self.order) - set(plain)
        if not in_base <= set(self.fixed):
            return None
        base = self.hydra.compose(tuple(self.fixed[name] for name in self.order if name in in_base))
        if isinstance(base, str) or base.entangled:
            return None
        parts = []
        for key in dict.fromkeys(top_level(name) for name in plain):
            keys = {axis.key for axis in self.axes if top_level(axis.key) == key}
            choices = self._plain_choices(keys, {key}, base, in_base)
            if choices is None:
                return None
            parts.append((self._in_axis_order(keys), choices))
        return parts, base.sections

    def _with_hydra(self) -> tuple[list[tuple[tuple[str, ...], _Choices]], dict[str, Section]]:
        """The same by composing each value of an axis that is not plain, over a cell of the grid."""
        groups = self._join([({axis.key}, {top_level(axis.key)}) for axis in self.axes])
        chosen, base = self._base(groups)
        if base.entangled:
            raise _Entangled
        while True:
            plain = [self._plain_choices(keys, own, base) for keys, own in groups]
            touched = [
                (keys, own if choices is not None else self._may_write(keys, own, chosen, base))
                for (keys, own), choices in zip(groups, plain, strict=True)
            ]
            joined = self._join(touched)
            if len(joined) == len(groups):
                break
            groups = joined
        parts = []
        for (keys, written), choices in zip(touched, plain, strict=True):
            ordered = self._in_axis_order(keys)
            parts.append((ordered, self._choices(ordered, written, chosen) if choices is None else choices))
        return parts, base.sections

    def _in_axis_order(self, keys: set[str]) -> tuple[str, ...]:
        return tuple(axis.key for axis in self.axes if axis.key in keys)

    def _plain_choices(
        self, keys: set[str], own: set[str], base: Whole, in_base: frozenset[str] = frozenset()
    ) -> _Choices | None:
        """The subtrees of a group's axes without Hydra; None where only Hydra can tell.

        Overrides named in `in_base` have had their effect on `base` already.
        """
        if len(own) != 1:
            return None
        (key,) = own
        ordered = self._in_axis_order(keys)
        choices = {}
        for chosen in self._combinations(ordered):
            given = {**self.fixed, **chosen}
            overrides = {name: given[name] for name in self.order if name in given and name not in in_base}
            try:
                content = self.hydra.sections.section(key, base.writers(key), overrides)
            except HydraException as error:
                choice = _Choice({}, explain(error))
            else:
                if content is None:
                    return None
                choice = _Choice({key: content})
            choices[tuple(chosen[name] for name in ordered)] = choice
        return choices

    @staticmethod
    def _join(groups: list[tuple[set[str], set[str]]]) -> list[tuple[set[str], set[str]]]:
        """Unite groups of axes that may write below a common key, until none do."""
        joined: list[tuple[set[str], set[str]]] = []
        for keys, written in groups:
            keys, written = set(keys), set(written)
            for other in [other for other in joined if other[1] & written]:
                joined.remove(other)
                keys |= other[0]
                written |= other[1]
            joined.append((keys, written))
        return joined

    def _combinations(self, keys: Sequence[str]) -> Iterator[dict[str, str]]:
        axes = [axis for axis in self.axes if axis.key in keys]
        for values in itertools.product(*(axis.overrides for axis in axes)):
            yield dict(zip((axis.key for axis in axes), values, strict=True))

    def _base(self, groups: list[tuple[set[str], set[str]]]) -> tuple[dict[str, str], Whole]:
        """A cell that composes: the first, or one near it.

        Raises `HydraException` with the first cell's complaint if none is found.
        """
        first = {axis.key: axis.overrides[0] for axis in self.axes}
        near = (first | chosen for keys, _ in groups for chosen in self._combinations(sorted(keys)))
        anywhere = (
            {key: value for chosen in chosens for key, value in chosen.items()}
            for chosens in itertools.product(*(list(self._combinations(sorted(keys))) for keys, _ in groups))
        )
        for chosen in itertools.chain([first], near, itertools.islice(anywhere, 200)):
            whole = self._compose(chosen)
            if isinstance(whole, Whole):
                return chosen, whole
        raise HydraException(self._compose(first))

    def _may_write(self, keys: set[str], own: set[str], base_chosen: dict[str, str], base: Whole) -> set[str]:
        """Top-level keys below which some value of these axes may write."""
        written = set(own)
        for chosen in self._combinations(sorted(keys)):
            whole = self._compose(base_chosen | chosen)
            if isinstance(whole, str):
                continue
            if whole.entangled:
                raise _Entangled
            ours, theirs = set(whole.files), set(base.files)
            if [f for f in whole.files if f in theirs] != [f for f in base.files if f in ours]:
                raise _Entangled
            for file in ours ^ theirs:
                written |= (whole.keys if file in ours else base.keys)[file]
        return written - {"hydra"}

    def _choices(self, keys: tuple[str, ...], written: set[str], base_chosen: dict[str, str]) -> _Choices:
        choices = {}
        for chosen in self._combinations(keys):
            whole = self._compose(base_chosen | chosen)
            if isinstance(whole, str):
                choice = _Choice({}, whole)
            else:
                choice = _Choice({key: whole.sections.get(key, _ABSENT) for key in written})
            choices[tuple(chosen[key] for key in keys)] = choice
        return choices

    def _compose(self, chosen: dict[str, str]) -> Whole | str:
        return self.hydra.compose(self._in_order(chosen))


_ABSENT = object()


def parse(arguments: Sequence[str], loader: ConfigLoader) -> tuple[dict[str, str], list[Axis], list[str]]:
    """Split override strings into fixed ones, axes, and the order of their keys.

    A later override of a key replaces an earlier one, as in Hydra's own sweeper.
    Raises `HydraException` for what is not an override, or sweeps over an interval.
    """
    parsed: dict[str, tuple[str, ...]] = {}
    swept = set()
    for override in OverridesParser.create(loader).parse_overrides(list(arguments)):
        key = override.get_key_element()
        parsed.pop(key, None)
        swept.discard(key)
        if not override.is_sweep_override():
            # A deletion may come without a value ("~key").
            parsed[key] = (str(override.input_line),)
            continue
        if not override.is_discrete_sweep():
            raise HydraException(f"{override.input_line}: an interval has no grid; use a choice or a range")
        parsed[key] = tuple(f"{key}={value}" for value in override.sweep_string_iterator())
        swept.add(key)
    fixed = {key: values[0] for key, values in parsed.items() if key not in swept}
    axes = [Axis(key, values) for key, values in parsed.items() if key in swept]
    return fixed, axes, list(parsed)
