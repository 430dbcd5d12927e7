"""Options named inside an option: the parts of a mix, the candidates of autoquant, the int8 lm_head.

A part is written as a cell's name is: "int4_wo group_size=64". It is read from the same
YAML that `quantizer=int4_wo` composes, so that a word means one thing everywhere; and what
it came to belongs to the identity of the setting that names it (`content`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from lbi.config import DecodingConfig, ModelConfig, QuantizerConfig
from lbi.errors import InputError
from lbi.places import conf_folder
from lbi.quantizers import loaders, target
from lbi.typed import build, plain

PLAIN = QuantizerConfig(name="none", family="none", method="none")
"""The weights as they are."""

HEAD_OPTION = "int8_pack"
"""What `lm_head=int8` makes of the output projection."""

COMPOSITE = frozenset({"mix", "autoquant", "checkpoint"})
"""Families that cannot be a part of another option."""


@cache
def option(text: str) -> QuantizerConfig:
    """The option that `text` names, with its knobs. Raises `InputError` for one that is not there."""
    import yaml

    name, *settings = text.split()
    file = conf_folder() / "quantizer" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError("quantizer", text, f"there is no option {name}", f"There are: {known}")
    content = yaml.safe_load(file.read_text())
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in content:
            raise InputError("quantizer", text, f"{name} has no knob {key}", f"It has: {', '.join(content)}")
        content[key] = yaml.safe_load(value)
    made: QuantizerConfig = build(QuantizerConfig, content, "quantizer")
    if made.family in COMPOSITE:
        raise InputError("quantizer", text, f"{name} cannot be a part of another option", "Name a plain quantizer")
    return replace(made, name=text)


def part_names(config: QuantizerConfig) -> list[str]:
    """The options that `config` names, in order, each once."""
    named = [str(value) for value in (config.mix or {}).values()] + list(config.candidates)
    if config.lm_head == "int8":
        named.append(HEAD_OPTION)
    return list(dict.fromkeys(named))


def parts(config: QuantizerConfig) -> Iterator[QuantizerConfig]:
    """The options that must work for `config` to work: not the candidates, of which some may fail."""
    for name in part_names(config):
        if name not in config.candidates:
            yield option(name)


@cache
def draft_model(text: str, dtype: str) -> ModelConfig:
    """The model that `decoding.draft` names: an option of the group model, or a folder or hub id in `dtype`."""
    import yaml

    file = conf_folder() / "model" / f"{text}.yaml"
    if file.is_file():
        found: ModelConfig = build(ModelConfig, yaml.safe_load(file.read_text()), "model")
        return replace(found, dtype=dtype)  # type: ignore[arg-type]
    return ModelConfig(name=text, source="hf", path=text, dtype=dtype)  # type: ignore[arg-type]


def parts_of_draft(decoding: DecodingConfig) -> Iterator[QuantizerConfig]:
    """The options that must work for the draft of speculative decoding to be made."""
    if decoding.draft_quantizer is not None:
        named = option(decoding.draft_quantizer)
        yield named
        yield from parts(named)


def content(config: QuantizerConfig) -> dict[str, Any]:
    """Everything that decides what `config` does: its knobs, those of the options it names, the files they name.

    Raises `InputError` for a `base` that is not there.
    """
    known: dict[str, Any] = plain(config)
    if config.family == "custom":
        known["source"] = target.content(config.target)
    if config.base is not None:
        known["base"] = loaders.base_facts(config.base).fingerprint or config.base
    named = {name: content(option(name)) for name in part_names(config)}
    return known | ({"parts": named} if named else {})


def layer_config(name: str, config: QuantizerConfig) -> QuantizerConfig:
    """How the linear layer `name` is to be stored: `PLAIN` where the config leaves it alone."""
    if any(ends_with(name, ending) for ending in config.skip) or config.family == "none":
        return PLAIN
    if config.family == "checkpoint":
        return config
    named = next((value for ending, value in (config.mix or {}).items() if ends_with(name, ending)), None)
    if named is not None:
        return option(str(named))
    if ends_with(name, "lm_head") and config.lm_head != "same":
        return option(HEAD_OPTION) if config.lm_head == "int8" else PLAIN
    if config.family == "mix":
        return option(str((config.mix or {}).get("default", "none")))
    return config


def ends_with(name: str, ending: str) -> bool:
    """Whether a layer's dotted name ends with these whole parts."""
    return name == ending or name.endswith(f".{ending}")
