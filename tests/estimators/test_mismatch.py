"""The mismatch of sampler and learner, against sums by hand, enumeration and simulation in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vcpo.errors import NonFiniteError, VcpoError
from vcpo.estimators.ess import ess_ratio
from vcpo.estimators.mismatch import (
    LARGEST_VARIANCE,
    ess_ratio_interval,
    expected_ess_ratio,
    measure_mismatch,
)

DRAWS = 4_000_000


def simulated(variances: Tensor) -> tuple[float, float, Tensor]:
    """Mean ESS ratio of log-normal weights, its standard error, and the ratios."""
    count = DRAWS // len(variances)
    generator = torch.Generator().manual_seed(len(variances))
    normal = torch.randn(count, len(variances), generator=generator, dtype=torch.float64)
    logs = normal * variances.sqrt() - variances / 2
    weights = (logs - logs.amax(1, keepdim=True)).exp()
    ratios = weights.sum(1) ** 2 / weights.square().sum(1) / len(variances)
    return float(ratios.mean()), float(ratios.std() / count**0.5), ratios


def alike(count: int, variance: float) -> Tensor:
    return torch.full((count,), variance, dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 3, 32, 256])
@pytest.mark.parametrize("variance", [1e-4, 0.1, 1.0, 4.0, 16.0, 80.0])
def test_the_expected_ess_ratio_is_that_of_a_simulation(count: int, variance: float) -> None:
    mean, error, _ = simulated(alike(count, variance))
    assert expected_ess_ratio(alike(count, variance)) == pytest.approx(mean, abs=4.5 * error + 1e-6)


@pytest.mark.parametrize("rate", [0.001, 0.01])
@pytest.mark.parametrize("count", [5, 64, 300])
def test_lengths_of_all_kinds_in_one_minibatch(count: int, rate: float) -> None:
    """More sequences than bins of variances, and lengths from 1 to 2000."""
    lengths = torch.randint(1, 2000, (count,), generator=torch.Generator().manual_seed(count)).double()
    mean, error, _ = simulated(rate * lengths)
    assert expected_ess_ratio(rate * lengths) == pytest.approx(mean, abs=4.5 * error, rel=0.005)


def test_the_formula_of_many_sequences_is_its_limit_and_breaks_where_one_weight_owns_the_sum() -> None:
    lengths = torch.linspace(50, 1500, 20_000, dtype=torch.float64)
    for_many = len(lengths) / float((0.0005 * lengths).exp().sum())
    assert expected_ess_ratio(0.0005 * lengths) == pytest.approx(for_many, rel=1e-3)
    assert math.exp(-16) < 1e-6
    assert 1 / 128 < expected_ess_ratio(alike(128, 16.0)) < 0.04


def test_equal_numerics_give_one_and_a_single_trajectory_too() -> None:
    assert expected_ess_ratio(torch.zeros(64)) == pytest.approx(1.0, abs=2e-6)
    assert expected_ess_ratio(alike(64, 1e-13)) == pytest.approx(1.0, abs=2e-6)
    for variance in (0.0, 1.0, 1e6):
        assert expected_ess_ratio(alike(1, variance)) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 2000), min_size=1, max_size=80))
def test_it_is_an_ess_ratio_whatever_the_order(variances: list[float]) -> None:
    values = torch.tensor(variances, dtype=torch.float64)
    ratio = expected_ess_ratio(values)
    assert 1 / len(variances) <= ratio <= 1
    assert expected_ess_ratio(values.flip(0)) == ratio


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 100), st.floats(1.0, 5.0))
def test_it_falls_as_answers_of_one_length_grow(count: int, variance: float, factor: float) -> None:
    assert expected_ess_ratio(alike(count, factor * variance)) <= (
        expected_ess_ratio(alike(count, variance)) + 1e-5
    )


def test_what_cannot_be_a_variance_is_refused() -> None:
    with pytest.raises(VcpoError, match="no trajectories"):
        expected_ess_ratio(torch.tensor([]))
    with pytest.raises(VcpoError, match="at least 0"):
        expected_ess_ratio(torch.tensor([1.0, -0.5]))
    with pytest.raises(NonFiniteError, match="index 1"):
        expected_ess_ratio(torch.tensor([1.0, math.inf]))
    assert expected_ess_ratio(alike(8, 1e30)) == expected_ess_ratio(alike(8, LARGEST_VARIANCE))


def test_the_interval_has_95_percent_of_ess_ratios() -> None:
    variances = torch.linspace(0.1, 3, 40, dtype=torch.float64)
    low, high = ess_ratio_interval(variances)
    ratios = simulated(variances)[2]
    assert float(((ratios >= low) & (ratios <= high)).double().mean()) == pytest.approx(0.95, abs=0.02)


# Measuring


def by_hand(rows: list[list[float]]) -> dict[str, float]:
    """The formulas of the docstring, with numpy and one token after another."""
    tokens = np.array([d for row in rows for d in row], np.float64)
    mean = tokens.mean()
    variance = (tokens**2).mean() - mean**2
    sums = np.array([sum(row) - mean * len(row) for row in rows])
    return {
        "mean": mean,
        "rms": np.sqrt((tokens**2).mean()),
        "variance": variance,
        "rate": np.log(np.exp(2 * tokens).mean()) - 2 * np.log(np.exp(tokens).mean()),
        "drift": np.log(np.exp(tokens).mean()),
        "correlation": (sums**2).sum() / (len(tokens) * variance),
    }


def table(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length, with rubbish where there is no token."""
    width = max(map(len, rows))
    ratios = torch.full((len(rows), width), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ratios[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[i, : len(row)] = True
    return ratios, mask


def test_figures_are_those_of_the_formulas() -> None:
    rows = [[0.3, -0.1, 0.2], [0.05], [], [-0.4, 0.1], [0.0, 0.02, -0.03, 0.3]]
    ratios, mask = table(rows)
    found = measure_mismatch(ratios, mask, torch.tensor([7, 7, 3, 3, 9]))
    expected = by_hand([row for row in rows if row])
    for name, value in expected.items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-12), name
        low, high = getattr(found, name)[1:]
        assert low <= high
    assert (found.sequences, found.clusters, found.tokens, found.longest) == (4, 3, 10, 4)
    assert found.largest == pytest.approx(0.4)


def test_a_token_alone_is_the_ess_ratio_of_tokens() -> None:
    values = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure_mismatch(values, torch.ones_like(values) > 0, torch.arange(500))
    assert math.exp(-found.rate.value) == pytest.approx(float(ess_ratio(values[:, 0])), rel=1e-12)


def test_the_last_digits_of_equal_numerics_are_measured_too() -> None:
    deltas = 1e-8 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure_mismatch(deltas, torch.ones_like(deltas) > 0, torch.arange(200))
    assert found.rate.value == pytest.approx(float(deltas.var(unbiased=False)), rel=1e-3)


class Pair:
    """A sampler and a learner that are Markov chains over V tokens; what each says is known exactly."""

    def __init__(self, seed: int, *, noise: float, tokens: int = 12) -> None:
        rng = np.random.default_rng(seed)
        logits = 1.5 * rng.standard_normal((tokens, tokens))
        self.sampler = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        other = logits + noise * rng.standard_normal((tokens, tokens))
        self.learner = other - np.log(np.exp(other).sum(-1, keepdims=True))
        self.rng, self.tokens = rng, tokens

    def log_ratios(self, count: int, length: int) -> Tensor:
        """[count, length], tokens drawn by the sampler."""
        state = np.zeros(count, int)
        columns = []
        for _ in range(length):
            cumulative = np.exp(self.sampler[state]).cumsum(-1)
            drawn = (self.rng.random((count, 1)) > cumulative).sum(-1).clip(max=self.tokens - 1)
            columns.append(self.learner[state, drawn] - self.sampler[state, drawn])
            state = drawn
        return torch.from_numpy(np.stack(columns, -1))

    def endless_ess_ratio(self, length: int) -> float:
        """1 / E w², by the chain's own recursion: E[w² from a state] = Σ_y μ(y) (π/μ)² E[w² from y]."""
        squares = np.ones(self.tokens)
        for _ in range(length):
            squares = np.exp(2 * self.learner - self.sampler) @ squares
        return 1 / squares[0]


def test_tokens_that_depend_on_each_other_are_still_uncorrelated_in_their_log_ratios() -> None:
    """What the sampler draws is a martingale difference to first order: 20 pairs, 19 of them or so within."""
    within, values = 0, []
    for seed in range(20):
        deltas = Pair(seed, noise=0.1).log_ratios(400, 64)
        found = measure_mismatch(deltas, torch.ones_like(deltas) > 0, torch.arange(400))
        within += found.uncorrelated
        values.append(found.correlation.value)
    assert within >= 16
    assert float(np.mean(values)) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("length", [16, 64, 256])
def test_the_ess_ratio_of_long_sequences_follows_from_single_tokens(length: int) -> None:
    """Measured on tokens of short sequences; the truth at other lengths by enumeration of the chain."""
    pair = Pair(5, noise=0.1)
    deltas = pair.log_ratios(2000, 40)
    found = measure_mismatch(deltas, torch.ones_like(deltas) > 0, torch.arange(2000))
    assert math.exp(-found.rate.value * length) == pytest.approx(pair.endless_ess_ratio(length), rel=0.1)


def test_a_minibatch_of_the_pair_has_the_ess_ratio_that_is_expected() -> None:
    """The log-normal model against true weights of a chain, at a length where the limit is far off."""
    pair = Pair(8, noise=0.25)
    deltas = pair.log_ratios(64 * 400, 128)
    rate = measure_mismatch(deltas, torch.ones_like(deltas) > 0, torch.arange(len(deltas))).rate.value
    ratios = [float(ess_ratio(batch)) for batch in deltas.sum(-1).split(64)]
    expected = expected_ess_ratio(alike(64, rate * 128))
    assert math.exp(-rate * 128) < 0.5 * expected
    assert expected == pytest.approx(np.mean(ratios), rel=0.15)


def test_intervals_cover_what_is_true() -> None:
    """The rate of one-token sequences is exactly log Σ π²/μ."""
    pair = Pair(3, noise=0.2)
    true = float(np.log(np.exp(2 * pair.learner[0] - pair.sampler[0]).sum()))
    covered = 0
    for _ in range(60):
        deltas = pair.log_ratios(300, 1)
        rate = measure_mismatch(deltas, torch.ones_like(deltas) > 0, torch.arange(300)).rate
        covered += rate.low <= true <= rate.high
    assert covered >= 50


def test_the_rollouts_of_a_prompt_are_drawn_together() -> None:
    """Eight copies of each sequence are no more evidence than one."""
    deltas = Pair(1, noise=0.1).log_ratios(60, 20)
    mask = torch.ones_like(deltas) > 0
    once = measure_mismatch(deltas, mask, torch.arange(60)).rate
    copies = torch.arange(60).repeat_interleave(8)
    copied = measure_mismatch(deltas[copies], mask[copies], copies).rate
    assert copied == pytest.approx(once, rel=1e-9)


def test_a_sampler_that_is_off_by_the_same_in_a_whole_sequence_is_found() -> None:
    rng = torch.Generator().manual_seed(2)
    noise = 0.03 * torch.randn(300, 64, generator=rng, dtype=torch.float64)
    offsets = 0.02 * torch.randn(300, 1, generator=rng, dtype=torch.float64)
    found = measure_mismatch(noise + offsets, torch.ones_like(noise) > 0, torch.arange(300))
    assert not found.uncorrelated
    # Var S = 64·0.03² + 64²·0.02², so a token adds 0.03² + 64·0.02².
    assert found.sequence_rate.value == pytest.approx(0.03**2 + 64 * 0.02**2, rel=0.2)


def test_a_sampler_that_records_other_log_probs_than_it_samples_from_is_found() -> None:
    """top_p = 0.9 without telling: every recorded log-prob is log 0.9 too low, and the ratio 1/0.9."""
    honest = Pair(4, noise=0.05).log_ratios(300, 32)
    mask = torch.ones_like(honest) > 0
    assert measure_mismatch(honest, mask, torch.arange(300)).honest
    found = measure_mismatch(honest - math.log(0.9), mask, torch.arange(300))
    assert not found.honest
    assert found.drift.value == pytest.approx(-math.log(0.9), abs=0.002)


def test_broken_input_is_named() -> None:
    ratios, mask = table([[0.1], [0.2, 0.3]])
    ratios[1, 1] = math.nan
    with pytest.raises(NonFiniteError, match="log-ratio at trajectory index 1"):
        measure_mismatch(ratios, mask, torch.tensor([0, 1]))
    with pytest.raises(VcpoError, match="two prompts or more"):
        measure_mismatch(*table([[0.1], [0.2]]), torch.tensor([4, 4]))
    with pytest.raises(VcpoError, match="one shape"):
        measure_mismatch(torch.zeros(2, 3), torch.ones(2, 2) > 0, torch.tensor([0, 1]))
