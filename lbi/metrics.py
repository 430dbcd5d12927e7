"""The definition of every number in the table, in one place.

A generation is a start time, the time each new token was known, and an end time.
Everything about speed is computed from those here, and tested on a synthetic
clock; nothing else in lbi divides tokens by seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Metric:
    """A column: its unit, what it means, and which way is better (None: neither)."""

    unit: str
    doc: str
    better: str | None = None


METRICS: dict[str, Metric] = {
    "decode_tok_s": Metric(
        "tok/s", "new tokens after the first, per second between the first and the last; of one sequence", "higher"
    ),
    "decode_tok_s_aggregate": Metric(
        "tok/s", "batch: the same of all its sequences together, workload.batch times that of one", "higher"
    ),
    "prefill_tok_s": Metric("tok/s", "prompt tokens per second until the first new token; of one sequence", "higher"),
    "ttft_s": Metric("s", "time to first token, from the call of generate", "lower"),
    "tpot_s": Metric("s", "time per output token after the first", "lower"),
    "itl_p99_s": Metric("s", "99th percentile of the time between two tokens; needs at least 100 of them", "lower"),
    "generate_tok_s": Metric(
        "tok/s", "new tokens per second of the whole call, prefill included; of one sequence", "higher"
    ),
    "peak_memory_bytes": Metric("B", "peak while generating: GPU allocator, or resident memory on a CPU", "lower"),
    "weight_bytes": Metric("B", "storage of all weights, shared storage counted once", "lower"),
    "bits_per_weight": Metric("bit", "storage of all linear layers, scales and lm_head included, per weight", "lower"),
    "quantized_fraction": Metric("1", "share of the linear layers' weights that are quantized"),
    "bytes_per_token": Metric(
        "B",
        "bytes that decoding must read for a token: weights, scales, lm_head, keys, values; a batch shares the weights",
        "lower",
    ),
    "unpacked_bytes_per_token": Metric(
        "B", "unpacked weights that a decode step of weight-only layers writes before it multiplies by them", "lower"
    ),
    "kv_bytes": Metric("B", "storage of the key-value cache at the end of the workload", "lower"),
    "mbu_measured": Metric(
        "1", "bytes_per_token times decode_tok_s, of all sequences, over the measured read bandwidth", "higher"
    ),
    "mbu_nominal": Metric("1", "the same over the data sheet's bandwidth", "higher"),
    "mfu_measured": Metric("1", "prefill FLOP/s over the measured matmul peak", "higher"),
    "energy_j_per_token": Metric("J", "energy of the device over a whole generation, per new token", "lower"),
    "mean_kld": Metric("nat", "mean KL divergence of the next-token distribution from the unquantized model", "lower"),
    "mean_kld_bound": Metric(
        "nat", "most that storing the unquantized model's logits in float16 can have changed of mean_kld", "lower"
    ),
    "p99_kld": Metric("nat", "99th percentile of the same over positions", "lower"),
    "top1_agreement": Metric("1", "share of positions where both models find the same token likeliest", "higher"),
    "ppl": Metric("1", "perplexity on the quality text", "lower"),
    "ppl_ratio": Metric("1", "perplexity over that of the unquantized model", "lower"),
    "first_divergence": Metric(
        "token", "greedy tokens equal to the unquantized model's before the first that differs", "higher"
    ),
    "one_row_error": Metric(
        "1", "largest relative error of a layer's output for one row, held against its output for a prompt's rows"
    ),
    "acceptance_length": Metric(
        "token", "speculative: new tokens per verification, the model's own included", "higher"
    ),
    "acceptance_rate": Metric("1", "speculative: share of drafted tokens that stood, forced ones aside", "higher"),
    "draft_length": Metric("token", "speculative: tokens drafted per verification"),
    "draft_s": Metric("s", "speculative: time to draft and to prepare it, per verification", "lower"),
    "verify_s": Metric("s", "speculative: time of one verification", "lower"),
    "forced_share": Metric("1", "structured: share of the text's tokens that the grammar left no choice for"),
    "mask_s": Metric("s", "structured: time of the host for the grammar, per token of the text", "lower"),
    "load_s": Metric("s", "reading the weights, by the run that did: of a shared model an earlier one", "lower"),
    "quantize_s": Metric("s", "quantizing them, by the run that did: an earlier one, if kept or shared", "lower"),
    "quantized_load_s": Metric("s", "reading quantized weights that an earlier run has kept", "lower"),
    "compile_s": Metric("s", "the first call less the median of the timed ones", "lower"),
    "total_s": Metric("s", "the whole run, child process start to end", "lower"),
}

WITH_INTERVAL = ("decode_tok_s", "decode_tok_s_aggregate", "prefill_tok_s", "ttft_s", "tpot_s", "generate_tok_s")
"""Metrics with one value a repetition: shown as a median with an interval (`_lo`, `_hi`)."""

WITH_ERROR = ("mean_kld", "top1_agreement", "ppl_ratio")
"""Metrics averaged over positions: shown with a standard error (`_se`)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One generation. Times in seconds on one clock; `tokens[i]` is when new token i was known.

    Tokens that one launch made were known together, at its end. All `sequences` of a batch have the same times.
    """

    start: float
    tokens: tuple[float, ...]
    end: float
    prompt_tokens: int
    sequences: int = 1

    def ttft_s(self) -> float:
        """Time to first token."""
        return self.tokens[0] - self.start

    def tpot_s(self) -> float:
        """Time per output token: mean over the tokens after the first. Needs two tokens."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)

    def between_tokens_s(self) -> list[float]:
        """Time between consecutive tokens."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]

    def speeds(self) -> dict[str, float]:
        """The metrics of `WITH_INTERVAL` for this generation; those of a batch where there is one."""
        batch = {"decode_tok_s_aggregate": self.sequences / self.tpot_s()} if self.sequences > 1 else {}
        return batch | {
            "decode_tok_s": 1.0 / self.tpot_s(),
            "prefill_tok_s": self.prompt_tokens / self.ttft_s(),
            "ttft_s": self.ttft_s(),
            "tpot_s": self.tpot_s(),
            "generate_tok_s": len(self.tokens) / (self.end - self.start),
        }


@dataclass(frozen=True, slots=True)
class Speculation:
    """What drafts came to in one generation of `tokens`. Seconds are those of all its verifications together."""

    tokens: int
    verifications: int
    drafted: int
    accepted: int
    draft_s: float
    verify_s: float
    forced: int = 0
    mask_s: float = 0.0


def summarize_structure(found: Sequence[Speculation]) -> dict[str, float | None]:
    """The metrics of structured decoding over all repetitions."""
    tokens = sum(one.tokens for one in found)
    forced, seconds = sum(one.forced for one in found), sum(one.mask_s for one in found)
    return {"forced_share": forced / tokens, "mask_s": seconds / tokens}


def summarize_speculation(found: Sequence[Speculation]) -> dict[str, float | None]:
    """The metrics of speculative decoding over all repetitions; none where there was no verification."""
    verifications = sum(one.verifications for one in found)
    forced = sum(one.forced for one in found)
    drafted, accepted = sum(one.drafted for one in found), sum(one.accepted for one in found)
    if not verifications:
        return {}
    return {
        "acceptance_length": 1.0 + accepted / verifications,
        "acceptance_rate": (accepted - forced) / (drafted - forced) if drafted > forced else None,
        "draft_length": drafted / verifications,
        "draft_s": sum(one.draft_s for one in found) / verifications,
        "verify_s": sum(one.verify_s for one in found) / verifications,
    }


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with a confidence interval; `coverage` is what the interval really covers."""

    median: float
    low: float | None
    high: float | None
    coverage: float | None


def median_interval(samples: Sequence[float], wanted: float = 0.95) -> Interval:
    """Median and its order-statistic confidence interval.

    The interval between the k-th smallest and the k-th largest of n samples covers the
    median with probability 1 - 2 * P(Binomial(n, 1/2) < k), whatever the distribution
    (David & Nagaraja, Order Statistics, 7.1). The largest k that reaches `wanted` is
    taken; where none does (n < 6 for 95%), the whole range, with its true coverage.
    One sample has no interval.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if n < 2:
        return Interval(ordered[0], None, None, None)
    best, best_coverage = 1, _coverage(n, 1)
    for k in range(2, n // 2 + 1):
        if _coverage(n, k) < wanted:
            break
        best, best_coverage = k, _coverage(n, k)
    return Interval(median(ordered), ordered[best - 1], ordered[n - best], best_coverage)


def _coverage(n: int, k: int) -> float:
    return 1.0 - 2.0 * sum(math.comb(n, i) for i in range(k)) / 2.0**n


def percentile(samples: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0-100) by the nearest-rank rule; None where n is too small for it.

    A percentile needs at least one sample beyond it on average: p99 needs 100.
    """
    n = len(samples)
    if n == 0 or n * (1 - q / 100) < 1 - 1e-9:
        return None
    return sorted(samples)[max(0, math.ceil(q / 100 * n) - 1)]


def summarize(timings: Sequence[Timing]) -> dict[str, float | None]:
    """Speed metrics over all repetitions, with `_lo` and `_hi` for those of `WITH_INTERVAL`."""
    per_repetition = [timing.speeds() for timing in timings]
    summary: dict[str, float | None] = {}
    for name in [name for name in WITH_INTERVAL if name in per_repetition[0]]:
        interval = median_interval([speeds[name] for speeds in per_repetition])
        summary |= {name: interval.median, f"{name}_lo": interval.low, f"{name}_hi": interval.high}
        summary["interval_coverage"] = interval.coverage
    gaps = [gap for timing in timings for gap in timing.between_tokens_s()]
    summary["itl_p99_s"] = percentile(gaps, 99)
    summary["repetitions"] = float(len(timings))
    return summary


def model_bandwidth_utilization(bytes_per_token: float, tok_s: float, bandwidth: float) -> float:
    """MBU: bytes a second that decoding must read, over the bytes a second the memory can give."""
    return bytes_per_token * tok_s / bandwidth


def prefill_flop(arch: dict[str, float], tokens: int) -> float:
    """Floating point operations of a prefill that computes the last position's logits only.

    2 * N_body * T + 2 * N_head + 4 * L * d * T^2 / 2: two per weight and token, and the causal
    half of attention's two T x T products, with d the width of all heads together.
    `arch` has body_params, head_params, layers, attention_width.
    """
    attention = 2.0 * arch["layers"] * arch["attention_width"] * tokens**2
    return 2.0 * arch["body_params"] * tokens + 2.0 * arch["head_params"] + attention
