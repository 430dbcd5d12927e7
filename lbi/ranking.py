"""Puts rows in order, compares them with the baseline, and says which setting wins.

Two cells are a tie when their intervals overlap: then the order of the two means
nothing, and lbi says so instead of naming a winner. Cells of different models or
workloads are never compared with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbi.collect import NO_FUSION, Row
from lbi.config import AXES

SPEED = "decode_tok_s"

AGGREGATE = "decode_tok_s_aggregate"
"""The speed of a whole batch. Cells are ranked by `SPEED`, and batches of different sizes have tables of their own."""

KLD_FLOOR = 1e-6
"""Nats below which a mean KLD says nothing: the reference is stored in 16 bits."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A speed over the baseline's, with the interval that both intervals allow.

    `low` and `high` are None where one of the two has no interval. `tie` is whether
    the two intervals overlap; None where that cannot be said.
    """

    value: float
    low: float | None
    high: float | None
    tie: bool | None


@dataclass(frozen=True, slots=True)
class Ranked:
    """A row with its place. `rank` is None for a cell without a number; `shared` means a tie at that rank."""

    row: Row
    rank: int | None
    shared: bool
    ratio: Ratio | None
    is_baseline: bool
    on_front: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One sentence of the result: `question` is what was asked, `text` the answer, `row` the cell it names."""

    question: str
    text: str
    row: Row | None


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one model and workload: ranked cells best first, then those without a number."""

    model: str
    workload: str
    baseline: Row | None
    ranked: list[Ranked]
    answers: list[Answer]


def tables(rows: Sequence[Row], baseline: str | None, max_kld: float) -> list[Table]:
    """A table per (model, workload), in the order in which they appear in the plan.

    `baseline` is a run id or a part of a name; None, or no match in a table, takes the plainest cell.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["workload"]), []).append(row)
    return [_table(model, workload, group, baseline, max_kld) for (model, workload), group in groups.items()]


def _table(model: str, workload: str, rows: list[Row], wanted: str | None, max_kld: float) -> Table:
    measured = [row for row in rows if row["status"] == "ok" and row[SPEED]]
    base = _baseline(measured, wanted)
    ordered = sorted(measured, key=lambda row: -row[SPEED])
    front = {row["cell"] for row in pareto(ordered)}
    ranks = _ranks(ordered)
    ranked = [Ranked(row, *ranks[row["cell"]], ratio(row, base), row is base, row["cell"] in front) for row in ordered]
    ranked += [Ranked(row, None, False, None, False, False) for row in rows if row["cell"] not in ranks]
    return Table(model, workload, base, ranked, answers(ordered, base, max_kld))


def _baseline(measured: Sequence[Row], wanted: str | None) -> Row | None:
    if wanted:
        named = [row for row in measured if row["run_id"] == wanted or row["name"] == wanted]
        named = named or [row for row in measured if wanted in row["name"]]
        if named:
            return named[0]
    return min(measured, key=_distance_from_plain, default=None)


def _distance_from_plain(row: Row) -> tuple[bool, ...]:
    plain = {"quantizer": "none", "compiler": "eager", "cache": "dynamic", "decoding": "greedy", "engine": "hf"}
    return (*(row[group] != option for group, option in plain.items()), row["cell"])


def interval(row: Row, name: str = SPEED) -> tuple[float, float] | None:
    """The metric's interval, or None where one sample gave none."""
    low, high = row[f"{name}_lo"], row[f"{name}_hi"]
    return None if low is None or high is None else (low, high)


def is_tie(one: Row, other: Row, name: str = SPEED) -> bool | None:
    """Whether the intervals of the two overlap; None where one has none."""
    first, second = interval(one, name), interval(other, name)
    if first is None or second is None:
        return None
    return first[0] <= second[1] and second[0] <= first[1]


def ratio(row: Row, base: Row | None) -> Ratio | None:
    """The row's speed over the other's; None where there is no other."""
    if base is None:
        return None
    ours, theirs = interval(row), interval(base)
    value = row[SPEED] / base[SPEED]
    if row is base:
        return Ratio(1.0, 1.0, 1.0, None)
    if ours is None or theirs is None:
        return Ratio(value, None, None, None)
    return Ratio(value, ours[0] / theirs[1], ours[1] / theirs[0], is_tie(row, base))


def _ranks(ordered: Sequence[Row]) -> dict[int, tuple[int, bool]]:
    """Rank and whether it is shared, by cell: a row that ties with the leader of a rank shares it."""
    leaders: list[tuple[Row, list[Row]]] = []
    for row in ordered:
        if leaders and is_tie(leaders[-1][0], row):
            leaders[-1][1].append(row)
        else:
            leaders.append((row, [row]))
    ranks, place = {}, 1
    for _, members in leaders:
        for row in members:
            ranks[row["cell"]] = (place, len(members) > 1)
        place += len(members)
    return ranks


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row beats in both speed and mean KLD; those without a KLD are left out.

    Divergences below `KLD_FLOOR` are rounding, and equal.
    """
    known = [(max(row["mean_kld"], KLD_FLOOR), row) for row in rows if row["mean_kld"] is not None]
    front: list[Row] = []
    best = float("inf")
    for kld, row in sorted(known, key=lambda pair: (-pair[1][SPEED], pair[0])):
        if kld < best:
            best = kld
            front.append(row)
    return front


def answers(ordered: Sequence[Row], base: Row | None, max_kld: float) -> list[Answer]:
    """The sweep's result in words: the fastest, and the fastest and the smallest that are good enough."""
    if not ordered:
        return [Answer("Fastest", "No cell has a number.", None)]
    good = [row for row in ordered if row["mean_kld"] is not None and row["mean_kld"] <= max_kld]
    bound = f"within {max_kld:g} nats of the unquantized model (mean KLD)"
    found = [_fastest("Fastest", ordered, base)]
    if not good:
        scored = any(row["mean_kld"] is not None for row in ordered)
        why = "No cell is" if scored else "Quality was not measured, so no cell is known to be"
        return [*found, Answer(f"Fastest {bound}", f"{why} within the bound.", None)]
    return [*found, _fastest(f"Fastest {bound}", good, base), _smallest(f"Smallest {bound}", good, base)]


CONTENDED = 0.1
"""Others took more of the CPU than this, and left less than this idle: a timing is not the setting's own."""


def disturbance(rows: Sequence[Row]) -> str:
    """Which timings others on the CPU have spoilt, in words; empty if none."""
    measured = [row for row in rows if row["foreign_cpu"] is not None and row["idle_cpu"] is not None]
    spoilt = [row for row in measured if row["foreign_cpu"] > CONTENDED and row["idle_cpu"] < CONTENDED]
    if not spoilt:
        return ""
    worst = max(row["foreign_cpu"] for row in spoilt)
    cells = f"{len(spoilt)} of {len(measured)} cells" if len(spoilt) > 4 else ", ".join(row["name"] for row in spoilt)
    return (
        f"Others took up to {worst:.0%} of the CPU, with none to spare, while these were timed: {cells}. "
        "Their speeds are too low and not to be compared."
    )


def unfused(rows: Sequence[Row]) -> str:
    """Which cells write out whole weights at every token, and how much, in words; empty if none."""
    flagged = [row for row in rows if row["unpacked_bytes_per_token"]]
    if not flagged:
        return ""
    listed = sorted(flagged, key=lambda row: -row["unpacked_bytes_per_token"])
    parts = [f"the decode step of {row['name']} writes {_beside(row)}" for row in listed[:4]]
    rest = f"; and so do {len(listed) - 4} other cells" if len(listed) > 4 else ""
    return (
        f"{NO_FUSION.capitalize()}: {'; '.join(parts)}{rest}. A kernel that unpacks while it multiplies "
        "would not write them: such a speed is that of the missing kernel, not of the number of bits."
    )


def _beside(row: Row) -> str:
    read = row["bytes_per_token"]
    beside = "" if read is None else f" beside the {read / 1e6:.1f} MB it would have to read"
    return f"{row['unpacked_bytes_per_token'] / 1e6:.1f} MB of unpacked weights per token{beside}"


def outrun(rows: Sequence[Row]) -> str:
    """Which drafts cost more than they save, and why, in words; empty if none, or where there is no greedy cell."""
    greedy = {_beside_decoding(row): row for row in rows if row["decoding"] == "greedy"}
    parts = []
    for row in rows:
        plain = greedy.get(_beside_decoding(row))
        if row["acceptance_length"] and plain is not None and row[SPEED] < plain[SPEED] and not is_tie(row, plain):
            turn = (row["draft_s"] or 0.0) + (row["verify_s"] or 0.0)
            parts.append(
                f"{row['name']} gives {row['acceptance_length']:.2f} tokens in {turn * 1e3:.1f} ms "
                f"({(row['draft_s'] or 0.0) * 1e3:.1f} ms to draft, {(row['verify_s'] or 0.0) * 1e3:.1f} to verify), "
                f"the time of {turn * plain[SPEED]:.2f} greedy steps"
            )
    if not parts:
        return ""
    rest = f"; and so it is with {len(parts) - 4} other cells" if len(parts) > 4 else ""
    return f"Slower than greedy on the same engine: {'; '.join(parts[:4])}{rest}."


def _beside_decoding(row: Row) -> tuple[str, ...]:
    """What a row has in common with another that differs in how it decodes alone."""
    others = [part for part in row["overrides"].split() if not part.startswith(("decoding=", "decoding."))]
    return (*(str(row[group]) for group in AXES if group != "decoding"), *others)


def _fastest(question: str, candidates: Sequence[Row], base: Row | None) -> Answer:
    best = candidates[0]
    text = f"{best['name']}, {speed_of(best)}{_against(best, base)}"
    tied = [row for row in candidates[1:] if is_tie(best, row)]
    if tied:
        names = ", ".join(row["name"] for row in tied[:4]) + (" and others" if len(tied) > 4 else "")
        text += f" It is a tie with {names}."
    elif len(candidates) > 1 and interval(best) is None:
        text += " Whether others are as fast cannot be said: one repetition gives no interval."
    return Answer(question, text, best)


def _smallest(question: str, good: Sequence[Row], base: Row | None) -> Answer:
    sized = [row for row in good if row["weight_bytes"]]
    if not sized:
        return Answer(question, "No result says how large its weights are.", None)
    best = min(sized, key=lambda row: (row["weight_bytes"], -row[SPEED]))
    text = f"{best['name']}, {best['weight_bytes'] / 1e6:.1f} MB of weights"
    if base is not None and best is not base and base["weight_bytes"]:
        text += f", {best['weight_bytes'] / base['weight_bytes']:.2f}x the baseline's, at {speed_of(best)}"
    text += _against(best, base)
    same = [row for row in sized if row is not best and row["weight_bytes"] == best["weight_bytes"]]
    if same:
        text += (
            f" {len(same)} other {'cell is' if len(same) == 1 else 'cells are'} of the same size; this is the fastest."
        )
    return Answer(question, text, best)


def speed_of(row: Row) -> str:
    """Its speed with its unit; of a batch, whose speed that is."""
    together = row[AGGREGATE]
    speed = f"{row[SPEED]:.1f} tok/s"
    return f"{speed} a sequence, {together:.1f} tok/s all together" if together else speed


def _against(row: Row, base: Row | None) -> str:
    found = ratio(row, base)
    if found is None or base is None:
        return "."
    if row is base:
        return ": the baseline itself."
    spread = "" if found.low is None else f" ({found.low:.2f} to {found.high:.2f})"
    speed = f", {found.value:.2f}x{spread} the speed of the baseline {base['name']}"
    if found.tie:
        return speed + ": a tie with it."
    return speed + ("." if found.tie is False else "; one repetition, so the noise is unknown.")
