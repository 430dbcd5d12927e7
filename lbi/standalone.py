"""lbi as a library, for a script without the command line: layers stored as an option says, and an engine.

Recipes use it where lbi's own packing, kernels or engine are what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from lbi.config import LbiConfig, QuantizerConfig
from lbi.draft_models import Draft, load_draft
from lbi.engines import Engine, make
from lbi.places import conf_folder
from lbi.quantizers import assign, method
from lbi.quantizers.options import option
from lbi.typed import build


def store_as(model: Any, names: Iterable[str], knobs: Mapping[str, Any]) -> None:
    """Replace the linear layers `names` of `model` as a quantizer with these knobs does (see conf/quantizer)."""
    config: QuantizerConfig = build(QuantizerConfig, knobs, "quantizer")
    method(config).apply(model, config, frozenset(names))


def setting(**groups: Mapping[str, Any]) -> LbiConfig:
    """A whole config from the groups that matter; the others are the defaults of conf/config.yaml."""
    conf = conf_folder()
    chosen = [entry for entry in yaml.safe_load((conf / "config.yaml").read_text())["defaults"] if entry != "_self_"]
    sections = {
        group: yaml.safe_load((conf / group / f"{name}.yaml").read_text())
        for entry in chosen
        for group, name in entry.items()
        if " " not in group
    }
    made: LbiConfig = build(LbiConfig, {**sections, **groups})
    return made


def drafter(model: Any, config: LbiConfig) -> Draft | None:
    """The model that drafts, if the decoding has one. Call it before the model itself is quantized."""
    draft = load_draft(config, model)
    if draft is not None and config.decoding.draft_quantizer:
        assign.apply(draft.model, assign.by_name(draft.model, option(config.decoding.draft_quantizer)))
    return draft


def engine(
    model: Any,
    config: LbiConfig,
    prompt_tokens: int,
    new_tokens: int,
    draft: Draft | None = None,
    tokenizer: Any = None,
) -> Engine:
    """The engine of a quantized model, compiled if the compiler says so, with room for that many tokens."""
    slots = config.cache.max_len or prompt_tokens + new_tokens + (config.decoding.draft_tokens or 0)
    made = make(config, model, slots, draft, tokenizer)
    if config.compiler.backend != "eager":
        made.compile()
    return made
