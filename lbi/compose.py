"""Composes the cells of a grid: exactly Hydra's configs, at a fraction of Hydra's time.

Hydra takes about 40 ms to compose one configuration, and its sweeper does it
twice. A grid of 10,000 cells is made of a few dozen options, though. Hydra's
result is an ordered merge of the files on the defaults list, followed by the
value overrides; each of them writes below a few top-level keys. If two axes never
write below the same key, the subtree under each key depends on one axis alone.
So: compose each value of each axis once with Hydra itself, keep the subtrees it
may write, and assemble cells from shared subtrees.

What makes this exact is checked, not assumed. Axes that may write below a common
key are joined into one axis (their product is composed by Hydra). A defaults list
with an interpolation, where one axis could choose another's files, turns assembly
off, and every cell is composed by Hydra. `tests/test_compose.py` compares random
cells of several configuration trees with Hydra's own compose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import GroupDefault, InputDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from lbi.interpolation import Resolver

Section = Any
"""The subtree below one top-level key, as plain containers; shared between cells, never modified."""


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

    overrides: dict[str, str]
    written: dict[str, Section]
    error: str | None = None


@dataclass(slots=True)
class _Whole:
    """One configuration composed by Hydra."""

    sections: dict[str, Section]
    files: list[tuple[str, str]]
    keys: dict[tuple[str, str], frozenset[str]]
    entangled: bool


class _Entangled(Exception):
    """The grid cannot be taken apart by top-level keys."""


class Composer:
    """Composes the product of `axes` over the `fixed` overrides.

    `order` is the order of all override keys as given, which Hydra's result may depend on.
    Iterating gives a `Composed` for each cell, the last axis varying fastest.
    """

    def __init__(
        self, loader: ConfigLoader, config_name: str, fixed: dict[str, str], axes: Sequence[Axis], order: Sequence[str]
    ) -> None:
        self.loader, self.config_name = loader, config_name
        self.fixed, self.axes, self.order = fixed, tuple(axes), tuple(order)
        self.composed_by_hydra = 0
        self.assembled = True
        self._cache: dict[tuple[str, ...], _Whole | str] = {}
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

    def _take_apart(self) -> tuple[list[tuple[tuple[str, ...], dict[tuple[str, ...], _Choice]]], dict[str, Section]]:
        groups = self._join([({axis.key}, {_top_level(axis.key)}) for axis in self.axes])
        while True:
            base_chosen, base = self._base(groups)
            touched = [(keys, self._may_write(keys, own, base_chosen, base)) for keys, own in groups]
            joined = self._join(touched)
            if len(joined) == len(groups):
                break
            groups = joined
        parts = []
        for keys, written in touched:
            ordered = tuple(axis.key for axis in self.axes if axis.key in keys)
            parts.append((ordered, self._choices(ordered, written, base_chosen)))
        return parts, base.sections

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

    def _base(self, groups: list[tuple[set[str], set[str]]]) -> tuple[dict[str, str], _Whole]:
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
            if isinstance(whole, _Whole):
                return chosen, whole
        raise HydraException(self._compose(first))

    def _may_write(self, keys: set[str], own: set[str], base_chosen: dict[str, str], base: _Whole) -> set[str]:
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

    def _choices(
        self, keys: tuple[str, ...], written: set[str], base_chosen: dict[str, str]
    ) -> dict[tuple[str, ...], _Choice]:
        choices = {}
        for chosen in self._combinations(keys):
            whole = self._compose(base_chosen | chosen)
            if isinstance(whole, str):
                choice = _Choice(chosen, {}, whole)
            else:
                choice = _Choice(chosen, {key: whole.sections.get(key, _ABSENT) for key in written})
            choices[tuple(chosen[key] for key in keys)] = choice
        return choices

    def _compose(self, chosen: dict[str, str]) -> _Whole | str:
        """Hydra's own result for these values, or its complaint."""
        overrides = self._in_order(chosen)
        if overrides not in self._cache:
            self.composed_by_hydra += 1
            try:
                self._cache[overrides] = self._compose_with_hydra(list(overrides))
            except HydraException as error:
                self._cache[overrides] = explain(error)
        return self._cache[overrides]

    def _compose_with_hydra(self, overrides: list[str]) -> _Whole:
        config = self.loader.load_configuration(self.config_name, overrides, run_mode=RunMode.RUN)
        defaults = self.loader.compute_defaults_list(self.config_name, overrides, RunMode.RUN).defaults
        container = OmegaConf.to_container(config, resolve=False)
        if not isinstance(container, dict):
            raise HydraException(f"{self.config_name} is not a mapping")
        files, keys, entangled = [], {}, False
        for default in defaults:
            name = (str(default.config_path), str(default.package))
            files.append(name)
            keys[name], interpolated = self._file(default)
            entangled = entangled or interpolated
        sections = {str(key): value for key, value in container.items() if key != "hydra"}
        return _Whole(sections, files, keys, entangled)

    @cached_property
    def _files(self) -> dict[tuple[str, str], tuple[frozenset[str], bool]]:
        return {}

    def _file(self, default: ResultDefault) -> tuple[frozenset[str], bool]:
        """Top-level keys one file writes below, and whether its defaults list holds an interpolation."""
        name = (str(default.config_path), str(default.package))
        if name not in self._files:
            loaded = self.loader.repository.load_config(str(default.config_path))  # type: ignore[attr-defined]
            entries: list[InputDefault] = loaded.defaults_list or []
            # An empty package is the global one; None leaves the choice to the file's header.
            package = (loaded.header.get("package") if default.package is None else default.package) or ""
            package = package.removeprefix("_global_").lstrip(".")
            content = loaded.config if OmegaConf.is_dict(loaded.config) else {}
            below = {package.split(".")[0]} if package else {str(key) for key in content}
            # An `override` entry makes this file choose another group's option: it writes there too.
            for entry in entries:
                if isinstance(entry, GroupDefault) and entry.is_override():
                    below |= _overridden(entry, name[0])
            tangled = any(not entry.is_self() and entry.is_interpolation() for entry in entries)
            self._files[name] = (frozenset(below) - {"defaults"}, tangled)
        return self._files[name]


def _overridden(entry: GroupDefault, config_path: str) -> set[str]:
    """Top-level keys of the group that an `override` entry chooses for, seen from the file that holds it."""
    group = str(entry.group)
    folder = config_path.rpartition("/")[0]
    absolute = group[1:] if group.startswith("/") else f"{folder}/{group}" if folder else group
    return {_top_level(absolute)} | ({_top_level(entry.package)} if entry.package else set())


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


NO_SUCH_KNOB = "there is no such knob here"


def explain(error: BaseException) -> str:
    """Hydra's complaint in a form that says what to do, without the advice about stack traces."""
    lines = [str(error).strip()]
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and "not in struct" in str(cause):
            return _no_such_knob(cause)
        text = str(cause).strip()
        if text and text not in lines[-1]:
            lines.append(text)
        cause = cause.__cause__
    text = "\n".join(line for line in lines if line).split("\nConfig search path:")[0]
    if "Could not find" in text and "\n\t" in text:
        text, *options = (part.strip() for part in text.split("\n\t"))
        text = f"{text.replace(chr(10), ' ').replace('  ', ' ')} {', '.join(options)}"
    return text.strip()


def _no_such_knob(error: ConfigKeyError | ConfigAttributeError) -> str:
    """The full name of the missing knob, and the knobs that are there."""
    name = str(error.full_key)
    group = name.rpartition(".")[0]
    parent = error.parent_node
    keys = [str(key) for key in parent if key not in ("name", "hydra")] if isinstance(parent, DictConfig) else []
    known = ", ".join(keys)
    option = f"{group}={parent['name']}" if group and isinstance(parent, DictConfig) and "name" in parent else group
    has = f"; {option or 'the config'} has: {known}" if known else ""
    return f"{name}: {NO_SUCH_KNOB}{has}"


def _top_level(key: str) -> str:
    """The top-level key that an override's key, or a group's name, writes below."""
    return key.lstrip("+~").split("@")[-1].split(":")[0].replace("/", ".").split(".")[0]
