"""ESS against hand-worked numbers and exact fractions; the step scale never exceeds 1 or takes a NaN."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo import (
    effective_sample_size,
    ess_from_partials,
    ess_partials,
    ess_ratio,
    ess_ratio_from_partials,
    step_scale,
)
from vcpo.errors import ConfigError, NonFiniteError, VcpoError

torch.set_num_threads(1)
examples = settings(deadline=None, max_examples=60)

moderate = st.lists(st.floats(-30, 30), min_size=1, max_size=12)
huge = st.lists(st.floats(-2000, 2000), min_size=1, max_size=12)


def exact_ess(log_weights: list[float]) -> float:
    """(Σ w)² / Σ w² in rational arithmetic on the float64 weights."""
    weights = [Fraction(math.exp(value)) for value in log_weights]
    return float(sum(weights) ** 2 / sum(w * w for w in weights))


@pytest.mark.parametrize(
    ("weights", "size"),
    [([1, 1, 1, 1], 4.0), ([3, 1], 1.6), ([1], 1.0), ([2, 1, 1], 16 / 6), ([1, 2, 3, 4], 100 / 30)],
)
def test_hand_worked(weights: list[float], size: float) -> None:
    logs = torch.tensor(weights, dtype=torch.float64).log()
    assert effective_sample_size(logs).item() == pytest.approx(size, rel=1e-14)
    assert ess_ratio(logs).item() == pytest.approx(size / len(weights), rel=1e-14)


def test_one_dominant_weight_is_exactly_one_and_equal_weights_exactly_all() -> None:
    assert effective_sample_size(torch.tensor([0.0, -1000.0, -1000.0])).item() == 1.0
    for level in (-1000.0, -13.8, 0.0, 1000.0):
        assert ess_ratio(torch.full((20,), level)).item() == 1.0


@examples
@given(moderate)
def test_equals_rational_arithmetic(log_weights: list[float]) -> None:
    size = effective_sample_size(torch.tensor(log_weights, dtype=torch.float64))
    assert size.item() == pytest.approx(exact_ess(log_weights), rel=1e-12)


@examples
@given(moderate, st.sampled_from([-1000.0, -88.8, 1.0, 88.8, 1000.0]))
def test_shift_leaves_the_ratio(log_weights: list[float], shift: float) -> None:
    values = torch.tensor(log_weights, dtype=torch.float64)
    assert ess_ratio(values + shift).item() == pytest.approx(ess_ratio(values).item(), rel=1e-11)


@examples
@given(huge, st.randoms())
def test_bounds_and_permutation(log_weights: list[float], random) -> None:
    size = effective_sample_size(torch.tensor(log_weights, dtype=torch.float64)).item()
    shuffled = random.sample(log_weights, len(log_weights))
    assert 1.0 <= size <= len(log_weights)
    again = effective_sample_size(torch.tensor(shuffled, dtype=torch.float64)).item()
    assert again == pytest.approx(size, rel=1e-12)


@examples
@given(huge, st.lists(st.integers(0, 12), max_size=4))
def test_any_split_over_ranks_gives_the_same(log_weights: list[float], cuts: list[int]) -> None:
    """Cuts may repeat, so some ranks are empty."""
    values = torch.tensor(log_weights, dtype=torch.float64)
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    ranks = [values[a:b] for a, b in pairwise(edges)]
    partials = torch.stack([ess_partials(rank) for rank in ranks])
    assert ess_from_partials(partials).item() == pytest.approx(
        effective_sample_size(values).item(), rel=1e-10
    )
    assert ess_ratio_from_partials(partials).item() == pytest.approx(ess_ratio(values).item(), rel=1e-10)


def test_partials_by_hand() -> None:
    first, second = ess_partials(torch.tensor([3.0]).log()), ess_partials(torch.tensor([1.0]).log())
    assert first.tolist() == pytest.approx([math.log(3), math.log(9), 1])
    both = torch.stack([first, ess_partials(torch.tensor([])), second])
    assert both[1].tolist() == [-math.inf, -math.inf, 0.0]
    assert ess_from_partials(both).item() == pytest.approx(1.6, rel=1e-6)
    assert ess_ratio_from_partials(both).item() == pytest.approx(0.8, rel=1e-6)


def test_gradient_of_the_ess() -> None:
    """For w = (3, 1), ESS = (3+1)²/10: d ESS / d log w_i = 2 w_i S / Q − 2 w_i² S² / Q²."""
    logs = torch.tensor([3.0, 1.0], dtype=torch.float64).log().requires_grad_()
    effective_sample_size(logs).backward()
    expected = [2 * 3 * 4 / 10 - 2 * 9 * 16 / 100, 2 * 1 * 4 / 10 - 2 * 1 * 16 / 100]
    assert logs.grad is not None and logs.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", [effective_sample_size, ess_ratio, ess_partials])
def test_non_finite_is_named(estimator, bad: float) -> None:
    values = torch.zeros(6)
    values[3] = bad
    with pytest.raises(NonFiniteError, match="log-weight at trajectory index 3"):
        estimator(values)


def test_no_trajectories_and_wrong_shapes() -> None:
    with pytest.raises(VcpoError, match="no trajectories"):
        effective_sample_size(torch.tensor([]))
    with pytest.raises(VcpoError, match="no trajectories"):
        ess_from_partials(ess_partials(torch.tensor([]))[None])
    with pytest.raises(VcpoError, match=r"got shape \(2, 2\)"):
        ess_ratio(torch.zeros(2, 2))
    with pytest.raises(VcpoError, match=r"\[ranks, 3\]"):
        ess_from_partials(torch.zeros(3))
    with pytest.raises(NonFiniteError, match="partials"):
        ess_from_partials(torch.tensor([[math.nan, 0.0, 2.0], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize(
    ("ratio", "on_policy", "rule", "scale"),
    [
        (0.25, 1.0, "sqrt", 0.5),
        (0.25, 1.0, "linear", 0.25),
        (0.25, 1.0, "off", 1.0),
        (0.25, 0.5, "linear", 0.5),
        (0.04, 0.64, "sqrt", 0.25),
        (0.9, 0.55, "sqrt", 1.0),
        (0.9, 0.55, "linear", 1.0),
        (1.0 + 1e-8, 1.0, "linear", 1.0),
        (0.0, 1.0, "sqrt", 0.0),
    ],
)
def test_step_scale_by_hand(ratio: float, on_policy: float, rule, scale: float) -> None:
    assert step_scale(ratio, on_policy, rule).item() == pytest.approx(scale, rel=1e-14)
    assert step_scale(torch.tensor(ratio, dtype=torch.float64), on_policy, rule).item() == pytest.approx(
        scale
    )


@examples
@given(huge, st.floats(1e-6, 1.0), st.sampled_from(["sqrt", "linear", "off"]))
def test_scale_of_any_weights_is_a_step(log_weights: list[float], on_policy: float, rule) -> None:
    ratio = ess_ratio(torch.tensor(log_weights))
    assert 0 < step_scale(ratio, on_policy, rule).item() <= 1


@pytest.mark.parametrize("rule", ["sqrt", "linear", "off"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, 1.5])
def test_a_bad_ratio_never_becomes_a_step(bad: float, rule) -> None:
    for value in (bad, torch.tensor(bad)):
        with pytest.raises(VcpoError, match="ESS ratio"):
            step_scale(value, 1.0, rule)


@pytest.mark.parametrize("on_policy", [0.0, -1.0, 1.01, math.nan])
def test_bad_on_policy_ratio(on_policy: float) -> None:
    with pytest.raises(ConfigError, match="on_policy_ratio"):
        step_scale(0.5, on_policy)


def test_unknown_rule_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="sqrt, linear, off"):
        step_scale(0.5, 1.0, "cubic")  # pyright: ignore[reportArgumentType]
