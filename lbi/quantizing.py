"""Quantized weights had: read from the store where an earlier run has kept them, else made, and kept if that pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbi.config import LbiConfig, ModelConfig
from lbi.kept_weights import Kept, address, names_of
from lbi.process import Phases
from lbi.quantizers.assign import Assignment
from lbi.quantizers.layer_forms import NotKept


@dataclass(frozen=True, slots=True)
class Weights:
    """Which weights are to be had: those of a model loaded as `of` says, and how each layer is to be stored."""

    of: ModelConfig
    assignment: Assignment
    embeddings: str = "keep"


@dataclass(slots=True)
class Had:
    """How weights were had. `quantize_s`: what quantizing took, in this run or the one that kept them."""

    origin: str
    quantize_s: float
    load_s: float | None
    notes: list[str] = field(default_factory=list)
    _kept: Kept | None = None

    def keep(self, model: Any, weights: Weights, phases: Phases) -> None:
        """Keep weights that this run has made, once the audit has found them to be what was asked for."""
        if self._kept is None or self.load_s is not None:
            return
        with phases("keep quantized"):
            self._kept.keep(model, names_of(model, weights.assignment, weights.embeddings), self.quantize_s)

    def effective(self) -> dict[str, Any]:
        """For the result."""
        return {"quantized": self.origin, "quantized_notes": self.notes}


def have(
    config: LbiConfig,
    model: Any,
    weights: Weights,
    kept_in: Path | None,
    phases: Phases,
    phase: str,
    make: Callable[[], object],
) -> Had:
    """Put quantized layers into `model`: those kept under the folder `kept_in`, else what `make` puts there."""
    if not names_of(model, weights.assignment, weights.embeddings):
        with phases(phase):
            make()
        return Had("nothing to quantize", 0.0, None)
    notes: list[str] = []
    kept = _entry(config, model, weights, kept_in, notes)
    started = time.perf_counter()
    if kept is not None and kept.exists():
        with phases("load quantized"):
            cold_s = kept.load(model)
        if cold_s is not None:
            return Had(f"cached ({kept.address.id})", cold_s, time.perf_counter() - started, notes, kept)
        started = time.perf_counter()
    with phases(phase):
        make()
    return Had("fresh", time.perf_counter() - started, None, notes, kept)


def _entry(config: LbiConfig, model: Any, weights: Weights, kept_in: Path | None, notes: list[str]) -> Kept | None:
    """Where these weights are or will be kept; None, with the reason in `notes`, where they are not."""
    if kept_in is None or not config.store.quantized_gb:
        notes.append("not kept: store.quantized_gb=0" if kept_in else "not kept: there is no store")
        return None
    try:
        where = address(config, weights.of, model, weights.assignment, weights.embeddings)
    except NotKept as reason:
        notes.append(f"not kept: {reason}")
        return None
    return Kept(kept_in, where, config.store, notes)
