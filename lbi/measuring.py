"""The timed region of a run, the only one: samples, which of them are void, and what else happened meanwhile."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from lbi.compilers import counters
from lbi.config import LbiConfig, MeasureConfig
from lbi.energy import EnergyMeter
from lbi.engines import Engine, Generation
from lbi.errors import Disturbed, NotApplied, RunFailure, Unsupported
from lbi.gpu_clocks import ClockWatch
from lbi.gpu_processes import ForeignWatch, named
from lbi.metrics import Speculation, Timing, median_interval, summarize, summarize_speculation, summarize_structure
from lbi.process import CpuWatch, PeakMemory, Phases
from lbi.race import Race, Rival
from lbi.record import Record

RECOMPILED = "recompiled"
"""Why a sample is void that compiled something."""


LOWERED = "the GPU lowered its clocks"
"""Begins why a sample is void that a hot GPU, or its board's brake, has slowed down."""


LEFT_SHARE = 0.01
"""A peak is not told where what the process did before has left more than this share of it."""


def measure(
    config: LbiConfig, engine: Engine, prompt: list[int], record: Record, phases: Phases, race: Race | None = None
) -> list[int]:
    """Take the samples, fewer if the cell loses its race; the tokens of the first valid one.

    Raises `NotApplied` or `Disturbed` if too many are void.
    """
    wanted, valid, voids, joules = config.measure.repetitions, [], [], []
    most, winner = _most(config.measure), None
    speculations: list[Speculation] = []
    tokens: list[int] = []
    others, clocks = ForeignWatch(config.engine.device), ClockWatch(config.engine.device)
    with phases("measure"), PeakMemory(config.engine.device) as peak:
        for number in range(most + config.measure.void_budget):
            time.sleep(config.measure.cooldown_s)
            before = counters()
            with others, clocks, CpuWatch() as watch, EnergyMeter(config.engine.device) as meter:
                generation = engine.generate(prompt, config.workload.new_tokens, seed=config.decoding.seed or 0)
            void = RECOMPILED if counters()["graphs"] != before["graphs"] else ""
            if others.during and config.resources.foreign != "ignore":
                void = void or f"{named(others.during)} on the GPU"
            if clocks.slowed:
                void = void or f"{LOWERED}: {clocks.slowed}"
            record.samples += _sample_rows(number, generation.timing, void, watch)
            record.effective.setdefault("samples", []).append(_told(generation.timing, void))
            _check_structure(config, generation)
            if void:
                voids.append(void)
                continue
            tokens = tokens or generation.tokens
            if generation.batch:
                alike = sum(own == generation.tokens for own in generation.batch)
                record.effective["batch"] = {"sequences": len(generation.batch), "same_tokens_as_the_first": alike}
            valid.append(generation.timing)
            joules.append(meter.joules)
            speculations += [generation.speculation] if generation.speculation else []
            winner = _winner(race, valid)
            if winner is not None:
                break
            if len(valid) >= wanted and (len(valid) == most or _is_narrow(valid, config.measure.ci_target)):
                break
    if len(valid) < wanted and winner is None:
        raise _too_few(voids, len(valid), config.measure.void_budget)
    record.metrics |= summarize(valid) | summarize_speculation(speculations)
    if config.decoding.grammar is not None:
        record.metrics |= summarize_structure(speculations)
    _note_target(config.measure, valid, record)
    _note_race(race, winner, len(valid), record)
    record.metrics["void_samples"] = float(len(voids))
    record.cost["samples"] = len(valid) + len(voids)
    _note_memory(peak, record)
    record.effective |= others.report() | clocks.report()
    _note_compile(config, valid, record)
    _note_surroundings(config, joules, len(tokens) * config.workload.batch, record)
    return tokens


def _told(timing: Timing, void: str) -> dict[str, Any]:
    """A sample in short: a report of a thousand cells spends a fifth of its time on their files of samples."""
    speed = timing.speeds()["decode_tok_s"] if len(timing.tokens) > 1 else None
    return {"decode_tok_s": speed, "void": void}


def _winner(race: Race | None, valid: list[Timing]) -> Rival | None:
    """The rival that beats the cell for good, by the samples so far."""
    return race.lost_to([timing.speeds()["decode_tok_s"] for timing in valid]) if race is not None else None


def _note_race(race: Race | None, winner: Rival | None, repetitions: int, record: Record) -> None:
    """Say that the cell was given up, after how many samples, and which result was better on every axis."""
    if race is None:
        return
    record.effective["race"] |= {"repetitions": repetitions, "raced_out_by": winner.run_id if winner else None}
    if winner is not None:
        record.cost |= {"raced_out_by": winner.run_id, "repetitions": repetitions}


def _note_memory(peak: PeakMemory, record: Record) -> None:
    """The peak, unless much of it may be what the process has kept of other runs."""
    record.metrics["peak_memory_bytes"] = None if peak.bytes is None else float(peak.bytes)
    isolation, race = record.effective.get("isolation", {}), record.effective.get("race", {})
    before = {"other runs": isolation} if isolation.get("after") else {}
    before |= {"a pass over the quality's text": race} if "left_bytes" in race else {}
    for what, about in before.items():
        about["peak_with_left_bytes"] = peak.bytes
        left, why = about.get("left_bytes"), ""
        if not peak.reset:
            why = "the kernel refuses to reset the peak before"
        elif left is None or peak.bytes is None or left > LEFT_SHARE * peak.bytes:
            why = f"more than {LEFT_SHARE:.0%} of the peak was left by it, or may be (left_bytes in effective.json)"
        if why:
            record.metrics["peak_memory_bytes"] = None
            record.missing["peak_memory_bytes"] = f"the process has done {what}, and {why}"


def _most(measure: MeasureConfig) -> int:
    """The most samples that are taken."""
    if measure.ci_target is None:
        return measure.repetitions
    return max(measure.repetitions, measure.max_repetitions or 10 * measure.repetitions)


def _is_narrow(valid: list[Timing], target: float | None) -> bool:
    """Whether the interval is as narrow as wanted; without a target there is nothing to wait for."""
    if target is None:
        return True
    found = median_interval([timing.speeds()["decode_tok_s"] for timing in valid])
    return found.low is not None and found.high is not None and (found.high - found.low) / 2 <= target * found.median


def _note_target(measure: MeasureConfig, valid: list[Timing], record: Record) -> None:
    """Whether the target was reached, and that the interval's coverage is not exact where samples stop by it."""
    if measure.ci_target is None:
        return
    reached = _is_narrow(valid, measure.ci_target)
    record.effective["ci_target"] = {"target": measure.ci_target, "reached": reached, "samples": len(valid)}


def _check_structure(config: LbiConfig, generation: Generation) -> None:
    """Raises `NotApplied` for a text that stops in the middle of its grammar, `Unsupported` for one of a token."""
    if config.decoding.grammar is None:
        return
    if not generation.finished:
        raise NotApplied(
            f"the grammar is not complete after {config.workload.new_tokens} tokens: raise workload.new_tokens"
        )
    if len(generation.tokens) < 2:
        raise Unsupported("the grammar is complete after one token, and the time between tokens needs two")


def _too_few(voids: list[str], valid: int, budget: int) -> RunFailure:
    """What too many void samples mean: that of the setting itself if its own alone are too many."""
    foreign = [void for void in voids if void != RECOMPILED]
    kind, example = (Disturbed, foreign[0]) if len(voids) - len(foreign) <= budget else (NotApplied, RECOMPILED)
    return kind(f"{len(voids)} of {len(voids) + valid} samples were void: {example} while timed")


def _note_compile(config: LbiConfig, valid: list[Timing], record: Record) -> None:
    if config.compiler.backend == "eager":
        record.missing["compile_s"] = "nothing is compiled"
        return
    usual = median(timing.end - timing.start for timing in valid)
    record.metrics["compile_s"] = compile_s = max(0.0, record.first_call_s - usual)
    isolation = record.effective.get("isolation", {})
    if isolation.get("after"):
        isolation["compile_s"] = compile_s
        record.metrics["compile_s"] = None
        record.missing["compile_s"] = "the process has done other runs, and its compiler need not start anew"


def _note_surroundings(config: LbiConfig, joules: list[float | None], new_tokens: int, record: Record) -> None:
    """What others took of the CPU, and what the device took of energy."""
    foreign = [row["foreign_cpu"] for row in record.samples if row["foreign_cpu"] is not None]
    record.metrics["foreign_cpu"] = max(foreign, default=None)
    idle = [row["idle_cpu"] for row in record.samples if row["idle_cpu"] is not None]
    record.metrics["idle_cpu"] = min(idle, default=None)
    known = [value for value in joules if value is not None]
    if len(known) < len(joules):
        record.missing["energy_j_per_token"] = EnergyMeter.why_not(config.engine.device)
    else:
        record.metrics["energy_j_per_token"] = sum(known) / len(known) / new_tokens


def _sample_rows(number: int, timing: Timing, void: str, watch: CpuWatch) -> list[dict[str, Any]]:
    """One row a token with its time since the call, and one (token -1) for the end of the call."""
    common = {
        "repetition": number,
        "void": void,
        "foreign_cpu": watch.foreign_share,
        "idle_cpu": watch.idle_share,
    }
    rows = [{**common, "token": index, "seconds": at - timing.start} for index, at in enumerate(timing.tokens)]
    return [*rows, {**common, "token": -1, "seconds": timing.end - timing.start}]
