"""The answer: who is first, who ties, what the baseline is, and what is said in words."""

from __future__ import annotations

from typing import Any

from lbi.collect import Row, metric_columns
from lbi.ranking import answers, disturbance, is_tie, outrun, pareto, tables, unfused


def row(cell: int, speed: float | None, noise: float = 0.0, kld: float | None = 0.0, **more: Any) -> Row:
    base: Row = {
        "cell": cell,
        "name": f"cell {cell}",
        "status": "ok" if speed else "oom",
        "reason": "",
        "run_id": f"run{cell}",
        "model": "m",
        "engine": "hf",
        "quantizer": "none" if cell == 0 else f"q{cell}",
        "compiler": "eager",
        "decoding": "greedy",
        "cache": "dynamic",
        "workload": "w",
        "overrides": "",
        "flags": [],
        **dict.fromkeys(metric_columns()),
    }
    if speed:
        base |= {"decode_tok_s": speed, "mean_kld": kld, "weight_bytes": 100e6}
        base |= {"decode_tok_s_lo": speed - noise, "decode_tok_s_hi": speed + noise}
    return base | more


def test_best_first_ties_share_a_rank_and_failures_come_last() -> None:
    cells = [row(0, 10, 0.5), row(1, 20, 1), row(2, None), row(3, 19, 1), row(4, 12, 0.1)]
    (table,) = tables(cells, None, 0.05)
    assert [(item.row["cell"], item.rank, item.shared) for item in table.ranked] == [
        (1, 1, True),
        (3, 1, True),
        (4, 3, False),
        (0, 4, False),
        (2, None, False),
    ]
    assert table.baseline is cells[0]
    by_cell = {item.row["cell"]: item for item in table.ranked}
    assert by_cell[1].ratio is not None
    assert (by_cell[1].ratio.value, by_cell[1].ratio.tie) == (2.0, False)
    assert (by_cell[1].ratio.low, by_cell[1].ratio.high) == (19 / 10.5, 21 / 9.5)
    assert by_cell[0].is_baseline


def test_a_chain_of_overlaps_is_not_one_tie() -> None:
    """A rank is shared with its leader, not with whoever overlaps somebody in it."""
    cells = [row(0, 20, 1), row(1, 18.5, 1), row(2, 17, 1)]
    (table,) = tables(cells, None, 0.05)
    assert [item.rank for item in table.ranked] == [1, 1, 3]


def test_a_single_repetition_ties_with_nothing_and_says_so() -> None:
    lone = row(1, 20, decode_tok_s_lo=None, decode_tok_s_hi=None)
    assert is_tie(lone, row(0, 20)) is None
    (table,) = tables([row(0, 10), lone], None, 0.05)
    assert "noise is unknown" in table.answers[0].text


def test_the_baseline_is_the_plainest_cell_or_the_one_that_is_named() -> None:
    cells = [
        row(0, 30, quantizer="none", compiler="inductor", cache="static"),
        row(1, 20, quantizer="none", cache="static"),
        row(2, 10, quantizer="int8"),
    ]
    assert tables(cells, None, 0.05)[0].baseline is cells[1]
    assert tables(cells, "run2", 0.05)[0].baseline is cells[2]
    assert tables(cells, "cell 0", 0.05)[0].baseline is cells[0]
    assert tables(cells, "no such", 0.05)[0].baseline is cells[1]


def test_models_and_workloads_are_not_compared_with_each_other() -> None:
    cells = [row(0, 10), row(1, 20, model="other"), row(2, 5, workload="other")]
    made = tables(cells, None, 0.05)
    assert [(table.model, table.workload, len(table.ranked)) for table in made] == [
        ("m", "w", 1),
        ("other", "w", 1),
        ("m", "other", 1),
    ]
    assert all(item.rank == 1 for table in made for item in table.ranked)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    cells = [row(0, 10, kld=0.0), row(1, 20, kld=0.01), row(2, 15, kld=0.02), row(3, 30, kld=0.5), row(4, 40, kld=None)]
    assert [item["cell"] for item in pareto(cells)] == [3, 1, 0]
    # Divergences below what the reference can show are equal: the slower of two is not on the front.
    rounding = [row(0, 10, kld=1e-9), row(1, 20, kld=1e-8)]
    assert [item["cell"] for item in pareto(rounding)] == [1]


def test_answers_name_the_fastest_and_the_smallest_that_are_good_enough() -> None:
    cells = [
        row(1, 30, 1, kld=0.5, weight_bytes=10e6),
        row(2, 20, 1, kld=0.01, weight_bytes=50e6),
        row(3, 15, 1, kld=0.02, weight_bytes=40e6),
        row(0, 10, 1),
    ]
    found = answers(cells, cells[3], 0.05)
    assert [answer.row and answer.row["cell"] for answer in found] == [1, 2, 3]
    assert "3.00x (2.64 to 3.44) the speed of the baseline cell 0" in found[0].text
    assert "0.40x the baseline's" in found[2].text
    assert "within 0.05 nats" in found[1].question


def test_a_tie_is_called_a_tie() -> None:
    cells = [row(1, 20, 2), row(2, 19, 2), row(0, 18.5, 2)]
    found = answers(cells, cells[2], 0.05)
    assert "It is a tie with cell 2, cell 0." in found[0].text
    assert "a tie with it" in found[0].text


def test_no_good_cell_and_no_cell_at_all() -> None:
    assert "No cell is within the bound" in answers([row(1, 20, kld=1.0)], None, 0.05)[1].text
    assert "Quality was not measured" in answers([row(1, 20, kld=None)], None, 0.05)[1].text
    assert "No cell has a number" in answers([], None, 0.05)[0].text


def test_timings_that_others_spoilt_are_named() -> None:
    def row(name: str, foreign: float | None, idle: float | None) -> dict[str, object]:
        return {"name": name, "foreign_cpu": foreign, "idle_cpu": idle}

    alone, beside = row("alone", 0.02, 0.0), row("beside", 0.5, 0.01)
    # Many cores are free: the others took nothing away. Older results do not say.
    roomy, unknown = row("roomy", 0.5, 0.4), row("unknown", 0.5, None)
    text = disturbance([alone, beside, roomy, unknown])
    assert "up to 50% of the CPU" in text
    assert "beside" in text
    assert all(name not in text for name in ("alone", "roomy", "unknown"))
    assert disturbance([alone, roomy, unknown]) == ""


def test_only_the_worst_of_many_unfused_cells_are_named() -> None:
    assert unfused([row(0, 10), row(1, 20, unpacked_bytes_per_token=0.0)]) == ""
    cells = [row(index, 10, unpacked_bytes_per_token=index * 1e6) for index in range(1, 8)]
    text = unfused(cells)
    assert text.startswith("Weight-only without fusion: the decode step of cell 7 writes 7.0 MB of unpacked weights")
    assert "beside" not in text
    assert "; and so do 3 other cells." in text


def test_drafts_that_lose_to_greedy_say_what_they_cost() -> None:
    turn = {"acceptance_length": 2.0, "draft_s": 0.3, "verify_s": 0.1, "decoding": "speculative_draft"}
    greedy = row(0, 10, 0.5, quantizer="q", overrides="decoding=greedy quantizer=q")
    slow = row(1, 5, 0.1, quantizer="q", overrides="quantizer=q decoding=speculative_draft decoding.draft=x", **turn)
    text = outrun([greedy, slow])
    assert "cell 1 gives 2.00 tokens in 400.0 ms (300.0 ms to draft, 100.0 to verify)" in text
    assert "the time of 4.00 greedy steps" in text
    # A tie, a faster one, or another engine's greedy is no loss.
    for other in (
        row(1, 9.8, 0.5, quantizer="q", overrides=slow["overrides"], **turn),
        row(1, 20, 0.1, quantizer="q", overrides=slow["overrides"], **turn),
        row(1, 5, 0.1, quantizer="q", engine="loop", overrides=slow["overrides"], **turn),
    ):
        assert outrun([greedy, other]) == ""
