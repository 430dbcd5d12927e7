"""AutoQuant's choice kept in the store: cells that differ in cache, decoding or workload choose once.

    choices/<id>.json

Times that a choice rests on are those of the run that made it, and the result says so. They are never
taken for other times: a cell that runs its layers in another way (compiler, engine), with other weights,
on another device or with other versions has another id and chooses anew.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lbi import environment, identity
from lbi.config import LbiConfig
from lbi.files import BadFile, read_json, write_json
from lbi.kept_weights import depends_on
from lbi.process import Phases
from lbi.quantizers import autoquant
from lbi.quantizers.assign import Assignment
from lbi.quantizers.layer_forms import NotKept
from lbi.quantizers.options import PLAIN, option
from lbi.store import SCHEMA
from lbi.typed import plain


def choose(
    config: LbiConfig, model: Any, assignment: Assignment, sample: list[int], kept_in: Path | None, phases: Phases
) -> tuple[Assignment, dict[str, Any]]:
    """The option of each layer and the evidence: what an earlier run has chosen, else chosen now and kept.

    `kept_in` is the folder of kept weights, beside which choices are; None is to keep nothing.
    """
    where, why_not = _where(config, model, sample, kept_in)
    found = _read(where) if where is not None else None
    if found is not None:
        return _assigned(assignment, found["evidence"]), {
            **found["evidence"],
            "from": f"an earlier run ({time.strftime('%Y-%m-%d %H:%M', time.localtime(found['made']))}), times too",
            "choose_s": found["choose_s"],
        }
    started = time.perf_counter()
    with phases("choose"):
        chosen, evidence = autoquant.choose(model, config, assignment, sample)
    choose_s = time.perf_counter() - started
    if where is not None:
        try:
            kept = {"evidence": evidence, "made": time.time(), "choose_s": choose_s}
            write_json(where, {"schema": SCHEMA, **kept})
        except OSError as error:
            why_not = f"not kept: {error.strerror or error}"
    return chosen, {**evidence, "from": f"this run{f', {why_not}' if why_not else ''}", "choose_s": choose_s}


def _where(config: LbiConfig, model: Any, sample: list[int], kept_in: Path | None) -> tuple[Path | None, str]:
    """The file of a choice; None and why not where it is not kept."""
    if kept_in is None or not config.store.quantized_gb:
        return None, "not kept: store.quantized_gb=0" if kept_in else "not kept: there is no store"
    try:
        key = depends_on(config, config.model, model)
    except NotKept as reason:
        return None, f"not kept: {reason}"
    key |= {
        # What times depend on, beside what the weights do.
        "machine": environment.key(config.engine.device),
        "engine": identity.canonical_engine(config.engine),
        "compiler": identity.canonical(plain(config.compiler)),
        "quantizer": identity.canonical_quantizer(config.quantizer),
        "sample": sample,
        # Some may be refused for what the cell is beside its layers.
        "candidates": list(autoquant.usable_candidates(config)[0]),
    }
    return kept_in.with_name("choices") / f"{identity.digest('choice', key)}.json", ""


def _read(where: Path) -> dict[str, Any] | None:
    """A kept choice; a damaged file counts as none and is written anew."""
    try:
        found = read_json(where, SCHEMA)
        if found is not None:
            _assigned({}, found["evidence"])
            float(found["made"]) + float(found["choose_s"])
    except (BadFile, KeyError, TypeError, ValueError, AttributeError) as error:
        print(f"the kept choice is damaged and made anew: {error}", flush=True)
        return None
    return found


def _assigned(assignment: Assignment, evidence: dict[str, Any]) -> Assignment:
    """`assignment` with the option that was chosen for each layer."""
    chosen = {name: text for shape in evidence["by_shape"] for name, text in shape["by_layer"].items()}
    return {**assignment, **{name: PLAIN if text == "none" else option(text) for name, text in chosen.items()}}
