"""Compares a sweep with another one, or with its own results in another environment, cell by cell.

A cell's counterpart is the result of the same run id; where there is none, the cell whose options and overrides are
the same. A difference counts where the intervals of the two do not overlap; otherwise it is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbi.collect import Row, in_environment, rows
from lbi.config import AXES
from lbi.errors import InputError
from lbi.ranking import SPEED, Ratio, ratio
from lbi.store import Store
from lbi.sweep_folder import find

SLOWER, TIE, FASTER, UNKNOWN = "slower", "tie", "faster", "noise unknown"


@dataclass(frozen=True, slots=True)
class Pair:
    """A measured cell and its counterpart there; `ratio` is this one's speed over that one's."""

    row: Row
    other: Row
    ratio: Ratio

    @property
    def verdict(self) -> str:
        if self.ratio.tie is None:
            return UNKNOWN
        return TIE if self.ratio.tie else FASTER if self.ratio.value > 1 else SLOWER


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pairs with `what`, from the largest loss to the largest gain; `alone` are cells without a counterpart."""

    what: str
    pairs: list[Pair]
    alone: list[Row]

    def summary(self) -> str:
        """How many cells are faster, slower, tied."""
        if not self.pairs:
            return f"No measured cell has a counterpart in {self.what}."
        verdicts = [pair.verdict for pair in self.pairs]
        counts = [f"{verdicts.count(verdict)} {words}" for verdict, words in _WORDS.items() if verdicts.count(verdict)]
        alone = f" {len(self.alone)} measured here alone." if self.alone else ""
        return f"Of {len(self.pairs)} cells measured here and in {self.what}: {', '.join(counts)}.{alone}"


_WORDS = {
    FASTER: "faster beyond noise",
    SLOWER: "slower beyond noise",
    TIE: "within noise",
    UNKNOWN: "without an interval, so the noise is unknown",
}


def resolve(store: Store, name: str) -> str:
    """A sweep's whole name, or an env_id of the store. Raises `InputError` for what is neither."""
    if _is_environment(store, name):
        return name
    try:
        return find(store, name)
    except InputError as error:
        raise InputError("against", name, "is neither a sweep nor an env_id of the store", error.way_out) from error


def compare(store: Store, sweep: str, table: Sequence[Row], against: str) -> Comparison:
    """The measured rows of `table`, which is the sweep's, with their counterparts in `against`."""
    if _is_environment(store, against):
        others, what = in_environment(store, sweep, against), f"environment {against}"
    else:
        others, what = rows(store, against), f"sweep {against}"
    known = [other for other in others if _has_speed(other)]
    by_run = {other["run_id"]: other for other in known}
    by_name = {_setting(other): other for other in known}
    pairs, alone = [], []
    for row in filter(_has_speed, table):
        other = by_run.get(row["run_id"]) or by_name.get(_setting(row))
        found = ratio(row, other) if other else None
        if other is None or found is None:
            alone.append(row)
        else:
            pairs.append(Pair(row, other, found))
    return Comparison(what, sorted(pairs, key=lambda pair: pair.ratio.value), alone)


def _has_speed(row: Row) -> bool:
    return bool(row["status"] == "ok" and row[SPEED])


def _setting(row: Row) -> tuple[str, ...]:
    return (*(str(row[group]) for group in AXES), row["name"])


def _is_environment(store: Store, name: str) -> bool:
    return any((store.root / "runs").glob(f"*/{name}")) if name and "/" not in name and "*" not in name else False
