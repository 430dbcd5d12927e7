"""measure.race: a cell that a result of its sweep beats on every axis is not repeated further.

The axes are those that an answer is chosen by: decode tok/s, mean KLD, and the bytes of weights and cache. Beaten is
what lies beyond noise on each: the cell's fastest sample so far is slower than the low end of the rival's interval, its
KLD is more than two standard errors of the difference above the rival's, and it holds more bytes. Such a cell cannot
be on the front of the three, however often it is repeated.

The worker finds the rivals, results of the same model, workload and environment; the run asks after each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot
from typing import TYPE_CHECKING, Any

from lbi.config import LbiConfig
from lbi.ranking import KLD_FLOOR
from lbi.store import Result, Store
from lbi.sweep_folder import read_plan
from lbi.typed import plain

if TYPE_CHECKING:
    from lbi.engines import Engine
    from lbi.process import Phases
    from lbi.record import Record

LEAST = 3
"""Samples that a cell has before it is given up: fewer have no interval to speak of."""

ERRORS = 2.0
"""Standard errors by which two divergences must differ."""

ALIKE = ("model", "workload", "quality")
"""Groups that a rival has in common with a cell, beside the device and the environment."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a cell stands: mean KLD in nats with its standard error, and the bytes of its weights and cache."""

    kld: float
    kld_se: float
    held_bytes: float


@dataclass(frozen=True, slots=True)
class Rival:
    """A finished result; `slowest` is the low end of its interval of decode tok/s, the rest as in `Standing`."""

    run_id: str
    slowest: float
    kld: float
    kld_se: float
    held_bytes: float

    def beats(self, own: Standing, fastest: float) -> bool:
        """Whether it is better on every axis beyond noise than a cell whose fastest sample is `fastest` tok/s."""
        apart = own.kld - self.kld > ERRORS * hypot(own.kld_se, self.kld_se)
        return fastest < self.slowest and own.kld > KLD_FLOOR and apart and self.held_bytes < own.held_bytes


@dataclass(frozen=True, slots=True)
class Race:
    """A cell's standing and those that it races against."""

    own: Standing
    rivals: Sequence[Rival]

    def lost_to(self, speeds: Sequence[float]) -> Rival | None:
        """The rival that beats a cell with these samples (decode tok/s), the one with the least KLD; None so far."""
        if len(speeds) < LEAST:
            return None
        won = [rival for rival in self.rivals if rival.beats(self.own, max(speeds))]
        return min(won, key=lambda rival: rival.kld, default=None)


def why_not(config: LbiConfig) -> str:
    """Why a cell that was to race cannot; empty if it can."""
    if not config.quality.enabled:
        return "quality=off: there is no KLD to race with"
    if config.compiler.prefill:
        return "compiler.prefill: a pass over the quality's text would compile more before the samples are taken"
    if config.engine.kind == "fused":
        return "engine=fused: a pass over the quality's text would capture more before the samples are taken"
    return ""


def rivals(store: Store, sweep: str, config: LbiConfig, run_id: str, env_id: str) -> list[dict[str, Any]]:
    """What a run of this sweep is to race against: good results of comparable cells, in this environment, if any."""
    runs = dict.fromkeys(row["run_id"] for row in read_plan(store, sweep)) if sweep and config.measure.race else {}
    found = (store.result(other, env_id) for other in runs if other and other != run_id)
    return [asdict(rival) for result in found if result and result.ok and (rival := _rival(store, result, config))]


def _rival(store: Store, result: Result, config: LbiConfig) -> Rival | None:
    """A result as a rival; None for one of another model, workload or device, or without one of the numbers.

    One that was raced out itself has too few samples, and is behind the one that it lost to.
    """
    if result.cost.get("raced_out_by"):
        return None
    known = (store.read(result, "config.json") or {}).get("config", {})
    same = all(known.get(name) == plain(getattr(config, name)) for name in ALIKE)
    if not same or known.get("engine", {}).get("device") != config.engine.device:
        return None
    metrics = (store.read(result, "metrics.json") or {}).get("metrics", {})
    own, slowest = standing(metrics), metrics.get("decode_tok_s_lo")
    if own is None or not isinstance(slowest, int | float):
        return None
    return Rival(result.run_id, float(slowest), own.kld, own.kld_se, own.held_bytes)


def standing(metrics: Mapping[str, Any]) -> Standing | None:
    """Where a cell with these metrics stands; None where one of the numbers is missing."""
    numbers = [metrics.get(name) for name in ("mean_kld", "mean_kld_se", "weight_bytes", "kv_bytes")]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    kld, error, weights, cache = (float(number) for number in numbers if number is not None)
    return Standing(kld, error, weights + cache)


def enter(
    config: LbiConfig, request: Mapping[str, Any], engine: Engine, prompt: list[int], record: Record, phases: Phases
) -> Race | None:
    """What the cell races against, once its own quality is known; None where it does not race, which the record says.

    So the pass over the quality's text comes before the samples, and leaves caches cold and memory in use: the one
    is made good by another warm-up, the other is measured.
    """
    if not config.measure.race:
        return None
    about: dict[str, Any] = {"rivals": len(request["rivals"])}
    record.effective["race"] = about
    why = why_not(config)
    if why:
        about["why_not"] = why
        return None
    from lbi import scoring
    from lbi.shared_model import give_memory_back, held_bytes

    before = held_bytes()
    scoring.score_quality(config, dict(request), engine, record, phases)
    with phases("warm again"):
        give_memory_back()
        engine.generate(prompt, config.workload.new_tokens, seed=0)
    now, own = held_bytes(), standing(record.metrics)
    about["left_bytes"] = None if now is None or before is None else max(0, now - before)
    if own is None:
        about["why_not"] = "the cell has no KLD to race with"
        return None
    return Race(own, [Rival(**rival) for rival in request["rivals"]])
