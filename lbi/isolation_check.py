"""Pairs of runs that an A/B check has held against isolation: which may share a process, and which may not.

    <store>/isolation/<env_id>.json     pairs (before, run, agrees, why), and when they were last added to

Written by benchmarks/isolation_ab.py, read by the worker before it lets a run follow others in their process. A pair
is about the run that comes after another one, at whatever distance; a pair that was never compared is allowed and
the result says that it was not compared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lbi.files import BadFile, read_json, write_json
from lbi.store import SCHEMA


@dataclass(frozen=True, slots=True)
class Pair:
    """What the check says of `run` after `before` in one process (both run_ids); `why` has its figures."""

    before: str
    run: str
    agrees: bool
    why: str


@dataclass(frozen=True, slots=True)
class Checked:
    """The pairs of one environment. `problem` says why the file could not be read; then nothing may be shared."""

    pairs: Mapping[tuple[str, str], Pair]
    problem: str = ""

    def refusal(self, before: Sequence[str], run: str) -> str:
        """Why `run` must not follow the runs `before` in their process; empty if it may."""
        if self.problem:
            return self.problem
        wrong = next((pair for name in before if (pair := self.pairs.get((name, run))) and not pair.agrees), None)
        return f"the A/B check refuses it after {wrong.before}: {wrong.why}" if wrong else ""

    def said(self, before: Sequence[str], run: str) -> str:
        """What a result is to say of the check: that of the run right before it."""
        if not before:
            return ""
        pair = self.pairs.get((before[-1], run))
        return f"agrees with isolation: {pair.why}" if pair else "this pair was not compared with isolation"


def file_of(store: Path, env_id: str) -> Path:
    """Where the pairs of an environment are kept."""
    return store / "isolation" / f"{env_id}.json"


def read(store: Path, env_id: str) -> Checked:
    """The pairs of an environment; none where nothing was checked."""
    file = file_of(store, env_id)
    try:
        known = read_json(file, SCHEMA)
        rows = known["pairs"] if known else []
        pairs = [Pair(row["before"], row["run"], bool(row["agrees"]), str(row["why"])) for row in rows]
    except BadFile as bad:
        return Checked({}, f"{file} {bad.reason}, so what the A/B check refused is not known")
    except (KeyError, TypeError) as error:
        return Checked({}, f"{file} is no list of pairs ({error!r}), so what the A/B check refused is not known")
    return Checked({(pair.before, pair.run): pair for pair in pairs})


def add(store: Path, env_id: str, pairs: Sequence[Pair]) -> Path:
    """Put pairs beside those that are there, in place of older words about the same two runs; the file."""
    known = {**read(store, env_id).pairs, **{(pair.before, pair.run): pair for pair in pairs}}
    rows = [{"before": pair.before, "run": pair.run, "agrees": pair.agrees, "why": pair.why} for pair in known.values()]
    file = file_of(store, env_id)
    write_json(file, {"schema": SCHEMA, "pairs": rows, "checked": time.time()})
    return file
