"""Hydra's own compose, with what its files write noted, and its complaints in plain words.

Together with sections.py and the plugin the only place that touches Hydra's internals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import GroupDefault, InputDefault, ResultDefault
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from lbi.sections import File, Sections, top_level

Section = Any
"""The subtree below one top-level key, as plain containers; shared between cells, never modified."""


@dataclass(slots=True)
class Whole:
    """One configuration composed by Hydra."""

    sections: dict[str, Section]
    files: list[File]
    keys: dict[File, frozenset[str]]
    entangled: bool

    def writers(self, key: str) -> list[File]:
        """Files that write below a top-level key."""
        return [file for file in self.files if key in self.keys[file]]


class Hydra:
    """Hydra's own compose, each configuration once, with what its files write noted.

    `composed` counts the configurations. One for all grids of a sweep.
    """

    def __init__(self, loader: ConfigLoader, config_name: str) -> None:
        self.loader, self.config_name = loader, config_name
        self.sections = Sections(loader)
        self.composed = 0
        self._cache: dict[tuple[str, ...], Whole | str] = {}
        self._files: dict[File, tuple[frozenset[str], bool]] = {}

    def compose(self, overrides: tuple[str, ...]) -> Whole | str:
        """Hydra's result, or its complaint."""
        if overrides not in self._cache:
            self.composed += 1
            try:
                self._cache[overrides] = self._compose(list(overrides))
            except HydraException as error:
                self._cache[overrides] = explain(error)
        return self._cache[overrides]

    def _compose(self, overrides: list[str]) -> Whole:
        config = self.loader.load_configuration(self.config_name, overrides, run_mode=RunMode.RUN)
        defaults = self.loader.compute_defaults_list(self.config_name, overrides, RunMode.RUN).defaults
        container = OmegaConf.to_container(config, resolve=False)
        if not isinstance(container, dict):
            raise HydraException(f"{self.config_name} is not a mapping")
        files, keys, entangled = [], {}, False
        for default in defaults:
            name = (str(default.config_path), "" if default.package is None else default.package)
            files.append(name)
            keys[name], interpolated = self._file(name, default)
            entangled = entangled or interpolated
        sections = {str(key): value for key, value in container.items() if key != "hydra"}
        return Whole(sections, files, keys, entangled)

    def _file(self, name: File, default: ResultDefault) -> tuple[frozenset[str], bool]:
        """Top-level keys one file writes below, and whether its defaults list holds an interpolation."""
        if name not in self._files:
            loaded = self.sections.load(name[0])
            if loaded is None:
                raise HydraException(f"{name[0]} is on the defaults list and cannot be read")
            entries: list[InputDefault] = loaded.defaults_list or []
            # An empty package is the global one; None leaves the choice to the file's header.
            package = (loaded.header.get("package") if default.package is None else default.package) or ""
            package = package.removeprefix("_global_").lstrip(".")
            content: Any = loaded.config if OmegaConf.is_dict(loaded.config) else {}
            below = {package.split(".")[0]} if package else {str(key) for key in content}
            # An `override` entry makes this file choose another group's option: it writes there too.
            for entry in entries:
                if isinstance(entry, GroupDefault) and entry.is_override():
                    below |= _overridden(entry, name[0])
            tangled = any(not entry.is_self() and _interpolated(entry) for entry in entries)
            self._files[name] = (frozenset(below) - {"defaults"}, tangled)
        return self._files[name]


def _interpolated(entry: InputDefault) -> bool:
    """Whether an entry's own text holds an interpolation; Hydra's is_interpolation needs it placed in a tree."""
    return any("${" in str(getattr(entry, name, "")) for name in ("group", "value", "path", "package"))


def _overridden(entry: GroupDefault, config_path: str) -> set[str]:
    """Top-level keys of the group that an `override` entry chooses for, seen from the file that holds it."""
    group = str(entry.group)
    folder = config_path.rpartition("/")[0]
    absolute = group[1:] if group.startswith("/") else f"{folder}/{group}" if folder else group
    return {top_level(absolute)} | ({top_level(entry.package)} if entry.package else set())


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
    if group.startswith("compiler.options"):
        return f"{name}: an inductor option is added with a plus sign: +{name}=VALUE"
    parent = error.parent_node
    keys = [str(key) for key in parent if key not in ("name", "hydra")] if isinstance(parent, DictConfig) else []
    known = ", ".join(keys)
    option = f"{group}={parent['name']}" if group and isinstance(parent, DictConfig) and "name" in parent else group
    has = f"; {option or 'the config'} has: {known}" if known else ""
    return f"{name}: {NO_SUCH_KNOB}{has}"
