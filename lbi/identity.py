"""When are two cells the same measurement, and when is an old result still good?

`run_id` names a setting: what is measured, without where the result goes.
`env_id` names the machine and the software that can change a number.
A result in the store belongs to one pair of the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lbi import structured
from lbi.config import (
    IDENTITY,
    CacheConfig,
    DecodingConfig,
    EngineConfig,
    LbiConfig,
    MeasureConfig,
    ModelConfig,
    QuantizerConfig,
    WorkloadConfig,
)
from lbi.errors import InputError
from lbi.model_files import ModelFacts, inspect
from lbi.quantizers.options import content, draft_model, option
from lbi.typed import plain

VERSION = 1
"""Part of every run_id: raised when the same configuration comes to mean another measurement."""

FIRST_DECODING_KNOBS = frozenset({"name", "kind", "temperature", "top_k", "top_p", "seed"})
"""Knobs that have always been part of a run's identity, used or not."""

LATER_MEASURE: Mapping[str, Any] = {"ci_target": None, "max_repetitions": None, "race": False}
"""Knobs that the first runs did not have, and what they are where they are not used."""

DISPLAY_ONLY = frozenset({"name", "note"})


def canonical(section: Mapping[str, Any]) -> str:
    """A section of a config as JSON that two spellings of one setting share.

    Keys are sorted and the knobs that only label a table are left out.
    """
    kept = {key: value for key, value in section.items() if key not in DISPLAY_ONLY}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_model(model: ModelConfig, facts: ModelFacts) -> str:
    """The model section by what its weights are: content where it is at hand, else the hub's name for it."""
    known = plain(model)
    if model.source == "random":
        return canonical({key: known[key] for key in ("source", "dtype", "seed", "arch")})
    kept = {key: known[key] for key in ("source", "dtype")}
    if facts.fingerprint:
        return canonical(kept | {"fingerprint": facts.fingerprint})
    return canonical(kept | {"path": known["path"], "revision": known["revision"]})


def canonical_quantizer(quantizer: QuantizerConfig) -> str:
    """The quantizer section with what the options that it names came to."""
    return canonical(content(quantizer))


def canonical_engine(engine: EngineConfig) -> str:
    """The engine section by what its kind reads: a knob that came with another kind leaves older runs their ids."""
    known = plain(engine)
    if engine.kind == "hf":
        del known["tokens_per_graph"]
    return canonical(known)


def canonical_decoding(decoding: DecodingConfig) -> str:
    """The decoding section without what was added to it later and is not used: older runs keep their ids."""
    known = plain(decoding)
    later = {spec.name: spec.default for spec in fields(DecodingConfig) if spec.name not in FIRST_DECODING_KNOBS}
    kept = {name: value for name, value in known.items() if name not in later or value != later[name]}
    if decoding.grammar is not None:
        kept["grammar"] = structured.text(decoding)
    if decoding.draft_quantizer is not None:
        kept["draft_quantizer"] = content(option(decoding.draft_quantizer))
    if decoding.draft is not None:
        # In the target's own type, which is in the model's section.
        model = draft_model(decoding.draft, "bfloat16")
        try:
            kept["draft"] = canonical_model(model, inspect(model))
        except InputError as error:
            raise InputError("decoding.draft", decoding.draft, error.problem, error.way_out) from error
    return canonical(kept)


def canonical_workload(workload: WorkloadConfig) -> str:
    """The workload section without a batch of one: runs from before there were batches keep their ids."""
    known = plain(workload)
    if workload.batch == 1:
        del known["batch"]
    return canonical(known)


def canonical_measure(measure: MeasureConfig) -> str:
    """The measure section without knobs that are not set and that the first runs did not have."""
    known = plain(measure)
    kept = {name: value for name, value in known.items() if name not in LATER_MEASURE or value != LATER_MEASURE[name]}
    return canonical(kept)


def canonical_cache(cache: CacheConfig) -> str:
    """The cache section without knobs that are not set, except those that the first caches had."""
    return canonical({key: value for key, value in plain(cache).items() if value is not None or key == "max_len"})


def run_id(sections: Mapping[str, str]) -> str:
    """12 hex digits over the `canonical` text of each section in `IDENTITY`."""
    text = "\n".join(f"{name}:{sections[name]}" for name in sorted(IDENTITY))
    return _digest(f"lbi-run-{VERSION}\n{text}")


def run_id_of(config: LbiConfig, facts: ModelFacts) -> str:
    """The run_id of a whole config, as the plan works it out section by section."""
    made = {name: canonical(plain(getattr(config, name))) for name in IDENTITY}
    made["model"] = canonical_model(config.model, facts)
    made["quantizer"] = canonical_quantizer(config.quantizer)
    made["engine"] = canonical_engine(config.engine)
    made["decoding"] = canonical_decoding(config.decoding)
    made["cache"] = canonical_cache(config.cache)
    made["workload"] = canonical_workload(config.workload)
    made["measure"] = canonical_measure(config.measure)
    return run_id(made)


def digest(kind: str, key: Mapping[str, Any]) -> str:
    """12 hex digits that name something of this `kind` by its key: an environment, a reference."""
    return _digest(f"lbi-{kind}-1\n" + json.dumps(key, sort_keys=True, separators=(",", ":")))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
