"""What a result's files say beyond its row: read once for the whole report.

A file that is missing or damaged leaves its part empty and is noted in the store's
problems, like everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.collect import Row
from lbi.files import BadFile, read_json
from lbi.metrics import Timing
from lbi.report.figures import finite
from lbi.store import SCHEMA, Store


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition: its decode tok/s, and why it is void, if it is."""

    speed: float
    void: str


@dataclass(frozen=True, slots=True)
class Facts:
    """The attempt's files of one cell; empty where it has none."""

    effective: dict[str, Any]
    environment: dict[str, Any]
    text: dict[str, Any]
    ending: dict[str, Any]
    phase: str
    samples: tuple[Sample, ...] = ()


COLUMNS = ("repetition", "token", "seconds", "void")
"""What is read of samples.parquet."""

NONE = Facts({}, {}, {}, {}, "")


def read_facts(store: Store, rows: Sequence[Row]) -> dict[int, Facts]:
    """The facts by cell."""
    return {row["cell"]: _read(store, row) for row in rows}


def _read(store: Store, row: Row) -> Facts:
    if not row["folder"]:
        return NONE
    folder = Path(row["folder"])
    if row["status"] == "running":
        return Facts({}, {}, {}, {}, str(_file(store, folder / "progress.json").get("phase") or ""))
    effective = _file(store, folder / "effective.json")
    told = effective.get("samples")
    return Facts(
        effective=effective,
        environment=_file(store, folder / "env.json"),
        text=_file(store, folder / "text.json"),
        ending=_file(store, folder / "verdict.json") or _file(store, folder / "metrics.json"),
        phase="",
        samples=_told(told) if isinstance(told, list) else _samples(store, folder / "samples.parquet"),
    )


def _told(samples: Sequence[Any]) -> tuple[Sample, ...]:
    """Every repetition in the order in which it was taken, as effective.json has them."""
    known = [sample for sample in samples if isinstance(sample, dict)]
    return tuple(
        Sample(sample["decode_tok_s"], str(sample.get("void") or ""))
        for sample in known
        if finite(sample.get("decode_tok_s"))
    )


def _samples(store: Store, file: Path) -> tuple[Sample, ...]:
    """The same from the file of all of them, for results from before effective.json had them."""
    if not file.exists():
        return ()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read_table on the file itself, which looks for others and starts threads, takes four times as long.
        whole = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
        columns = whole.read(columns=list(COLUMNS), use_threads=False).to_pydict()
    except (OSError, pa.ArrowException):
        store.problems.append(BadFile(file, "is not whole Parquet"))
        return ()
    moments: dict[int, dict[int, float]] = {}
    voids: dict[int, str] = {}
    for number, token, seconds, void in zip(*(columns[name] for name in COLUMNS), strict=True):
        moments.setdefault(number, {})[token] = seconds
        voids[number] = void
    return tuple(_sample(known, voids[number]) for number, known in moments.items() if len(known) > 2)


def _sample(known: Mapping[int, float], void: str) -> Sample:
    """Token -1 is the end of the call."""
    tokens = tuple(known[token] for token in sorted(known) if token >= 0)
    timing = Timing(start=0.0, tokens=tokens, end=known.get(-1, tokens[-1]), prompt_tokens=0)
    return Sample(1 / timing.tpot_s(), void)


def _file(store: Store, path: Path) -> dict[str, Any]:
    try:
        return read_json(path, SCHEMA) or {}
    except BadFile as bad:
        store.problems.append(bad)
        return {}


def part(known: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside a file; empty where the file holds something else there."""
    value = known.get(name)
    return value if isinstance(value, dict) else {}
