"""Every speed figure on a synthetic clock, and what a median's interval covers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lbi.metrics import (
    METRICS,
    WITH_ERROR,
    WITH_INTERVAL,
    Timing,
    median_interval,
    model_bandwidth_utilization,
    percentile,
    prefill_flop,
    summarize,
)

# A prompt of 100 tokens, the first new token after 2 s, four more half a second apart, 0.5 s to return.
CLOCK = Timing(start=10.0, tokens=(12.0, 12.5, 13.0, 13.5, 14.0), end=14.5, prompt_tokens=100)


def test_speeds_on_a_synthetic_clock() -> None:
    assert CLOCK.speeds() == {
        "decode_tok_s": 2.0,
        "prefill_tok_s": 50.0,
        "ttft_s": 2.0,
        "tpot_s": 0.5,
        "generate_tok_s": 5 / 4.5,
    }
    assert CLOCK.between_tokens_s() == [0.5] * 4
    assert "decode_tok_s_aggregate" not in summarize([CLOCK])


def test_a_batch_has_the_speed_of_one_sequence_and_that_of_all() -> None:
    of_four = replace(CLOCK, sequences=4)
    assert of_four.speeds() == CLOCK.speeds() | {"decode_tok_s_aggregate": 8.0}
    found = summarize([of_four, of_four])
    assert (found["decode_tok_s"], found["decode_tok_s_aggregate"], found["decode_tok_s_aggregate_hi"]) == (
        2.0,
        8.0,
        8.0,
    )


def test_a_summary_takes_medians_and_ranges() -> None:
    slower = Timing(0.0, (4.0, 5.0, 6.0), 6.0, 100)
    middle = Timing(0.0, (4.0, 4.5, 5.0, 5.5), 6.0, 100)
    found = summarize([CLOCK, slower, middle])
    assert (found["decode_tok_s"], found["decode_tok_s_lo"], found["decode_tok_s_hi"]) == (2.0, 1.0, 2.0)
    assert found["ttft_s"] == 4.0
    assert found["repetitions"] == 3
    assert found["interval_coverage"] == 0.75
    assert found["itl_p99_s"] is None


def test_one_sample_has_no_interval() -> None:
    interval = median_interval([3.0])
    assert (interval.median, interval.low, interval.high, interval.coverage) == (3.0, None, None, None)


@pytest.mark.parametrize(
    ("n", "ranks", "coverage"),
    [(5, (0, 4), 0.9375), (6, (0, 5), 0.96875), (9, (1, 7), 0.9609375), (20, (5, 14), 0.9586105346679688)],
)
def test_intervals_are_the_textbooks_order_statistics(n: int, ranks: tuple[int, int], coverage: float) -> None:
    interval = median_interval([float(i) for i in range(n)])
    assert (interval.low, interval.high) == ranks
    assert interval.coverage == pytest.approx(coverage)


def test_an_interval_covers_the_median_as_often_as_it_says() -> None:
    """On a skewed distribution, whose median is 1."""
    generator = random.Random(7)
    hits, tries = 0, 4000
    for _ in range(tries):
        interval = median_interval([2 ** generator.gauss(0, 1) for _ in range(9)])
        hits += (interval.low or 0) <= 1.0 <= (interval.high or 0)
    assert hits / tries == pytest.approx(0.961, abs=0.012)


def test_a_percentile_needs_enough_samples() -> None:
    assert percentile([1.0] * 99, 99) is None
    assert percentile([float(i) for i in range(100)], 99) == 98.0
    assert percentile([float(i) for i in range(200)], 50) == 99.0
    assert percentile([], 50) is None


def test_bandwidth_utilization() -> None:
    assert model_bandwidth_utilization(2e9, 50.0, 200e9) == 0.5


def test_prefill_flop_by_hand() -> None:
    """Llama-3.1-8B at 2048 tokens: 28.6 TFLOP in the weights and 1.1 in attention (research notes, section 2)."""
    arch = {"body_params": 6.979e9, "head_params": 0.525e9, "layers": 32.0, "attention_width": 4096.0}
    weights = 2 * 6.979e9 * 2048 + 2 * 0.525e9
    assert prefill_flop(arch, 2048) == pytest.approx(weights + 1.1e12, rel=1e-3)
    assert weights == pytest.approx(28.6e12, rel=1e-3)


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(metric.unit and metric.doc for metric in METRICS.values())
    assert set(WITH_INTERVAL) | set(WITH_ERROR) <= set(METRICS)
    assert {metric.better for metric in METRICS.values()} <= {"higher", "lower", None}
