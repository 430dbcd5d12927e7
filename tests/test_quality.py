"""Quality figures against a second computation in float64, and the tie rule of lossless options."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lbi import lossless, quality
from lbi.errors import BadNumerics


def by_hand(ours: np.ndarray, theirs: np.ndarray, following: list[int]) -> dict[str, float]:
    """Mean KLD, top-1 agreement and perplexities, in float64, position by position."""
    kld, same, nll, reference_nll = [], [], [], []
    for mine, other, token in zip(ours, theirs, following, strict=True):
        p = np.exp(other - other.max()) / np.exp(other - other.max()).sum()
        q = np.exp(mine - mine.max()) / np.exp(mine - mine.max()).sum()
        kld.append(float((p * (np.log(p) - np.log(q))).sum()))
        same.append(float(p.argmax() == q.argmax()))
        nll.append(-math.log(q[token]))
        reference_nll.append(-math.log(p[token]))
    n = len(kld)
    ratio = math.exp(np.mean(nll) - np.mean(reference_nll))
    return {
        "mean_kld": float(np.mean(kld)),
        "mean_kld_se": float(np.std(kld, ddof=1) / math.sqrt(n)),
        "p99_kld": sorted(kld)[math.ceil(0.99 * (n - 1))],
        "top1_agreement": float(np.mean(same)),
        "ppl": math.exp(np.mean(nll)),
        "ppl_ratio": ratio,
        "ppl_ratio_se": ratio * float(np.std(np.array(nll) - np.array(reference_nll), ddof=1) / math.sqrt(n)),
    }


def test_scores_equal_a_float64_computation() -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ()).item()))
    tokens = torch.randint(0, 50, (100,), generator=generator).tolist()
    reference = 4 * torch.randn(100, 50, generator=generator)
    cell = reference + 0.5 * torch.randn(100, 50, generator=generator)
    pieces = quality.windows(tokens, 100, 32)
    starts = {tuple(piece): 32 * index for index, piece in enumerate(pieces)}

    def forward(logits: torch.Tensor):
        return lambda piece: logits[starts[tuple(piece)] : starts[tuple(piece)] + len(piece)]

    stored = quality.reference_logits(forward(reference), pieces)
    assert stored.dtype == np.float16
    found = quality.score(forward(cell), pieces, stored)
    scored = [i for index, piece in enumerate(pieces) for i in range(32 * index, 32 * index + len(piece) - 1)]
    expected = by_hand(
        cell.double().numpy()[scored], reference.double().numpy()[scored], [tokens[i + 1] for i in scored]
    )
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert found["quality_positions"] == len(scored) == 96


def exact_kld(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KLD of each position, in float64."""
    p, q = torch.log_softmax(theirs.double(), dim=-1), torch.log_softmax(ours.double(), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def scored(theirs: torch.Tensor, ours: torch.Tensor) -> quality.Score:
    score = quality.Score()
    score.add(ours, quality.shifted(theirs), torch.zeros(len(ours), dtype=torch.long))
    return score


@pytest.mark.parametrize("vocabulary", [8, 1000, 30000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0])
def test_storing_the_reference_changes_a_kld_by_no_more_than_the_bound(
    vocabulary: int, scale: float, noise: float
) -> None:
    reference = scale * torch.randn(80, vocabulary)
    cell = reference + noise * scale * torch.randn(80, vocabulary)
    exact, stored = exact_kld(reference, cell), exact_kld(quality.shifted(reference), cell)
    found = scored(reference, cell)
    bound = torch.tensor(found.bound, dtype=torch.float64)
    assert bool(((stored - exact).abs() <= bound).all())
    # Adding up in float32 comes on top, and is far less than a difference anyone would see.
    assert bool(((torch.tensor(found.kld).double() - stored).abs() <= 1e-5 * (1 + stored)).all())
    # First order: twice the rounding, times two deviations under p.
    p = torch.log_softmax(quality.shifted(reference).double(), dim=-1)
    apart = p - torch.log_softmax(cell.double(), dim=-1) - stored[:, None]
    distance = (p.exp() * quality.shifted(reference).double() ** 2).sum(dim=-1).sqrt()
    first = 2.0**-10 * distance * (p.exp() * apart**2).sum(dim=-1).sqrt()
    assert bool((bound <= 1.05 * first + 1e-5).all())


def test_errors_of_storing_that_all_point_one_way_are_within_the_bound() -> None:
    """The worst there is: each distance rounded by half a step, up where the cell has too little, else down."""
    steps = torch.arange(1025, 1200, 2, dtype=torch.float64) / 1024
    stored = torch.cat([torch.zeros(1, dtype=torch.float64), -steps]).half()
    cell = stored.double() + 0.5 * torch.randn(len(stored))
    apart = torch.log_softmax(stored.double(), dim=-1) - torch.log_softmax(cell, dim=-1)
    way = torch.where(apart > exact_kld(stored[None], cell[None]), -1.0, 1.0)
    way[0] = 0.0
    true = stored.double() + way * 0.499 * 2.0**-10
    assert torch.equal(true.float().half(), stored)
    found = scored(true.float()[None], cell.float()[None])
    moved = float((exact_kld(stored[None], cell[None]) - exact_kld(true[None], cell[None])).abs())
    assert 0.05 * found.bound[0] < moved <= found.bound[0]


def test_logits_that_no_float16_reaches_are_stored_as_far_away() -> None:
    reference = torch.tensor([[0.0, -1.0, -1e5, -torch.inf]])
    stored = quality.shifted(reference)
    assert torch.isfinite(stored).all()
    found = scored(reference, torch.tensor([[0.0, -1.5, -20.0, -20.0]]))
    assert 0 < found.kld[0] < 0.1
    assert 0 < found.bound[0] < 1e-3


def test_the_reference_against_itself_is_zero_up_to_its_storage() -> None:
    reference = 6 * torch.randn(64, 1000)
    tokens = torch.randint(0, 1000, (64,)).tolist()
    pieces = quality.windows(tokens, 64, 64)
    stored = quality.reference_logits(lambda piece: reference, pieces)
    found = quality.score(lambda piece: reference, pieces, stored)
    exact = reference[:-1].double().numpy()
    exact -= exact.max(axis=-1, keepdims=True)
    rounding = float(np.abs(stored - exact).max())
    # Half a float16 step at a distance of 32 to 64 from the top, and a float32 subtraction.
    assert 0 < rounding <= 2**-6 + 1e-5
    # Logits that move by at most d move a log probability by at most 2 d; the tokens
    # that carry the probability lie near the top, where the steps are far smaller.
    assert 0 <= found["mean_kld"] < 1e-6
    assert found["top1_agreement"] == 1.0
    replayed = quality.score(quality.replay(stored), pieces, stored)
    assert replayed["mean_kld"] == 0
    assert math.log(replayed["ppl"]) == pytest.approx(math.log(found["ppl"]), abs=2 * rounding)


def test_logits_that_are_not_finite_are_an_error() -> None:
    logits = torch.zeros(8, 10)
    logits[3, 4] = float("nan")
    with pytest.raises(BadNumerics):
        quality.Score().add(logits, torch.zeros(8, 10), torch.zeros(8, dtype=torch.long))


def test_a_perplexity_beyond_floats_is_left_out() -> None:
    score = quality.Score()
    logits = torch.zeros(4, 10)
    logits[:, 0] = 5000.0
    score.add(logits, torch.zeros(4, 10), torch.ones(4, dtype=torch.long))
    found = score.metrics()
    assert found["ppl"] is None
    assert found["ppl_ratio"] is None
    assert found["mean_nll"] == pytest.approx(5000.0)


def test_windows_cut_the_text() -> None:
    assert quality.windows(range(10), 7, 3) == [[0, 1, 2], [3, 4, 5]]
    assert quality.windows(range(10), 100, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_first_divergence_counts_equal_tokens() -> None:
    assert quality.first_divergence([1, 2, 3], [1, 2, 4]) == 2
    assert quality.first_divergence([1, 2], [1, 2, 3]) == 2
    assert quality.first_divergence([5], [1]) == 0


HALF = lossless.Arithmetic(torch.bfloat16, layers=20, plain=True)


def two_ways(gap: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three steps computed in two ways; at step 1 token 7 leads token 3 by `gap`."""
    stepwise = torch.zeros(3, 10)
    stepwise[:, 7], stepwise[:, 3] = 5.0, 5.0 - gap
    at_once = stepwise.clone()
    at_once[2, 7] -= noise
    return stepwise, at_once


def test_equal_tokens_are_equal() -> None:
    stepwise, at_once = two_ways(1.0, 0.1)
    assert lossless.compare([7, 7, 7], [7, 7, 7], stepwise, at_once, HALF) == {"verdict": "equal", "tokens": 3}


def test_a_difference_within_the_models_own_noise_is_a_tie() -> None:
    stepwise, at_once = two_ways(gap=0.15, noise=0.1)
    found = lossless.compare([7, 3, 1], [7, 7, 7], stepwise, at_once, HALF)
    assert found["verdict"] == "tie"
    assert found["first_divergence"] == 1
    assert found["logit_gap"] == pytest.approx(0.15)
    assert found["logit_noise"] == pytest.approx(0.1)


def test_a_difference_beyond_the_noise_is_an_error() -> None:
    stepwise, at_once = two_ways(gap=0.5, noise=0.1)
    with pytest.raises(BadNumerics, match="token 1"):
        lossless.compare([7, 3, 7], [7, 7, 7], stepwise, at_once, HALF)


def test_two_ways_that_are_far_apart_make_nothing_a_tie() -> None:
    """One of them is wrong then: what is called noise is bounded by what rounding explains."""
    stepwise, at_once = two_ways(gap=3.0, noise=20.0)
    for arithmetic in (HALF, replace(HALF, plain=False), replace(HALF, layers=500)):
        with pytest.raises(BadNumerics, match="up to 20 apart"):
            lossless.compare([7, 3, 7], [7, 7, 7], stepwise, at_once, arithmetic)
    near, _ = two_ways(gap=1e-4, noise=0.0)
    exact = replace(HALF, dtype=torch.float32)
    assert lossless.compare([7, 3, 7], [7, 7, 7], near, near, exact)["verdict"] == "tie"
    with pytest.raises(BadNumerics):
        lossless.compare([7, 3, 7], [7, 7, 7], *two_ways(gap=0.01, noise=0.1), exact)


def test_noise_grows_with_layers_and_roundings_and_not_without_end() -> None:
    shares = [replace(HALF, layers=layers).largest_share() for layers in (2, 10, 1000)]
    assert shares == pytest.approx([3 / 128, 11 / 128, 0.125])
    assert replace(HALF, dtype=torch.float32).largest_share() == pytest.approx(21 * 16 * 2.0**-23)
    assert replace(HALF, dtype=torch.float32, plain=False).largest_share() == 0.125
