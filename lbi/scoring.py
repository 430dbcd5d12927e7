"""How far a run's text and logits are from those of the unquantized model.

The teacher-forced pass is done once for cells that would have the same, and compared with logits that the
unquantized model's own run has left in the store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lbi import quality
from lbi.config import LbiConfig
from lbi.cost import OWN, REPLAYED, SHARED
from lbi.engines import Engine
from lbi.files import BadFile, read_json, write_json
from lbi.process import Phases
from lbi.record import Record
from lbi.store import SCHEMA


def compare_text(config: LbiConfig, request: dict[str, Any], tokens: list[int], record: Record) -> None:
    """Where the greedy text leaves that of the unquantized model."""
    folders = {name: Path(folder) for name, folder in request["references"].items()}
    no_reference = request["reference_problem"] or "there is no reference"
    greedy = read_json(folders["greedy"] / "greedy.json", SCHEMA)
    if config.decoding.kind != "greedy":
        record.missing["first_divergence"] = "sampled tokens are not compared"
    elif config.decoding.grammar is not None:
        record.missing["first_divergence"] = "tokens that follow a grammar are not compared"
    elif greedy is None:
        record.missing["first_divergence"] = no_reference
    else:
        record.metrics["first_divergence"] = float(quality.first_divergence(tokens, greedy["tokens"]))


def score_quality(config: LbiConfig, request: dict[str, Any], engine: Engine, record: Record, phases: Phases) -> None:
    """The teacher-forced pass, or one that would be the same, against the unquantized model's logits."""
    folders = {name: Path(folder) for name, folder in request["references"].items()}
    no_reference = request["reference_problem"] or "there is no reference"
    if not config.quality.enabled:
        record.missing["mean_kld"] = "quality=off"
    elif not folders["logits"].exists():
        record.missing["mean_kld"] = no_reference
    else:
        with phases("quality"):
            own_pass = config.compiler.prefill or config.engine.kind == "fused" or not config.cache.lossless
            shares = config.resources.shared_quality
            is_reference = config.quantizer.family == "none" and not own_pass and shares
            forward = None if is_reference else engine.forward
            # What autoquant chose rests on times, and may be another choice in another cell of the same setting.
            target = folders["quality"] if shares and config.quantizer.family != "autoquant" else None
            found, origin, pass_s = _quality(forward, folders["logits"], target)
        record.metrics |= found
        record.effective["quality_from"] = origin
        record.cost |= {"quality": origin, "quality_pass_s": pass_s}


def _quality(
    forward: Callable[[list[int]], Any] | None, reference: Path, target: Path | None
) -> tuple[dict[str, float | None], str, float | None]:
    """Quality metrics, where they are from (this run, or a pass that would be the same), and the seconds of that pass.

    Cells that differ only in how they decode (cache, decode compiler, workload) have one
    teacher-forced pass in common, so it is done once and kept in `target`; None is not to
    share it. `forward` is None where that pass is the reference's own: its stored logits are
    then compared with themselves.
    """
    try:
        known = read_json(target / "quality.json", SCHEMA) if target else None
    except BadFile:
        known = None
    if known is not None:
        return known["metrics"], SHARED, known.get("seconds")
    start = time.perf_counter()
    pieces = json.loads((reference / "pieces.json").read_text())
    stored = np.load(reference / "logits.npy", mmap_mode="r")
    found = quality.score(forward or quality.replay(stored), pieces, stored)
    seconds = time.perf_counter() - start
    if target:
        write_json(target / "quality.json", {"schema": SCHEMA, "metrics": found, "seconds": seconds})
    return found, OWN if forward else REPLAYED, seconds
