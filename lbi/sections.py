"""The subtree of one top-level key, made the way Hydra makes it but without the rest of the config.

Most axes are plain: a group whose options are single files, or a knob of such a group.
If exactly one file of the composed config writes below a top-level key, then the subtree
under that key is that file's content with the value overrides of that key applied, and
nothing else in the config can change it. Hydra spends its 50 to 100 ms on everything else.

Whatever is not plain in this sense is left to Hydra: `section` then answers None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

File = tuple[str, str]
"""A config file on a defaults list: its path in the search path, and the package it is merged into."""


class Sections:
    """Subtrees straight from files. One per loader; files and overrides are read once."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        self._loaded: dict[str, ConfigResult | None] = {}
        self._overrides: dict[str, Override] = {}

    def load(self, path: str) -> ConfigResult | None:
        """A config file as Hydra reads it; None where there is none."""
        if path not in self._loaded:
            self._loaded[path] = self.loader.repository.load_config(path)  # type: ignore[attr-defined]
        return self._loaded[path]

    def section(self, key: str, writers: Sequence[File], overrides: Mapping[str, str]) -> Any:
        """The unresolved subtree below top-level `key`, or None if only Hydra can tell.

        `writers` are the files of some cell that write below `key`, `overrides` all overrides of
        the wanted cell by key, in order. Raises `HydraException` for an override that does not fit.
        """
        values = [text for name, text in overrides.items() if name != key and top_level(name) == key]
        content = self._content(key, writers, overrides.get(key))
        if content is None:
            return None
        parsed = [self._override(text) for text in values]
        if any(item.package is not None or self._is_group(item.key_or_group) for item in parsed):
            return None
        if not parsed:
            return content
        config = OmegaConf.create({key: content})
        OmegaConf.set_struct(config, True)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
        return OmegaConf.to_container(config, resolve=False)[key]  # type: ignore[index, call-overload]

    def _content(self, key: str, writers: Sequence[File], choice: str | None) -> Any:
        """What the one file that writes below `key` writes there, with `choice` ("key=option") made."""
        if len(writers) != 1:
            return None
        path, package = writers[0]
        if choice is not None:
            if package != key or not path.startswith(f"{key}/"):
                return None
            option = self._override(choice).value()
            if not isinstance(option, str):
                return None
            path = f"{key}/{option}"
        loaded = self.load(path)
        if loaded is None or not isinstance(loaded.config, DictConfig):
            return None
        if package == key and not self._is_plain(key, loaded):
            return None
        node = loaded.config if package == key else loaded.config.get(key) if not package else None
        return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else None

    def may_be_plain(self, name: str) -> bool:
        """Whether an override with this key may be applied to a subtree alone: a group's choice, or a knob's value."""
        bare = name.lstrip("+")
        if name.startswith("~") or "@" in name or bare.startswith("hydra"):
            return False
        return name == bare or not self._is_group(bare)

    @staticmethod
    def _is_plain(key: str, loaded: ConfigResult) -> bool:
        """Whether the file brings nothing but its own content, and that to its own group's key."""
        alone = all(entry.is_self() for entry in loaded.defaults_list or [])
        # A ConfigStore node of the same name would be merged in as its schema.
        has_schema = key in ConfigStore.instance().repo
        return alone and loaded.header.get("package") in (None, key) and not loaded.is_schema_source and not has_schema

    def _override(self, text: str) -> Override:
        if text not in self._overrides:
            (self._overrides[text],) = OverridesParser.create(self.loader).parse_overrides([text])
        return self._overrides[text]

    def _is_group(self, name: str) -> bool:
        exists: bool = self.loader.repository.group_exists(name)  # type: ignore[attr-defined]
        return exists


def top_level(key: str) -> str:
    """The top-level key that an override's key, or a group's name, writes below."""
    return key.lstrip("+~").split("@")[-1].split(":")[0].replace("/", ".").split(".")[0]
