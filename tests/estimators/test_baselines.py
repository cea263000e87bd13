"""Baselines against rational arithmetic, perturbation and hand-worked numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo import group_mean, group_std, leave_one_out, optimal_baseline, zero_baseline
from vcpo.errors import NonFiniteError, VcpoError

torch.set_num_threads(1)
examples = settings(deadline=None, max_examples=60)

Member = tuple[int, float, float, float]
"""Group, reward, log-weight, squared norm."""

members = st.lists(
    st.tuples(st.integers(-2, 2), st.floats(-10, 10), st.floats(-20, 20), st.floats(1e-6, 1e6)),
    min_size=1,
    max_size=12,
)
GROUP_BASELINES = [zero_baseline, group_mean, leave_one_out, group_std]


def columns(batch: list[Member]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rewards, log-weights, squared norms in float64, and groups."""
    groups, rewards, logs, norms = zip(*batch, strict=True)
    numbers = [torch.tensor(column, dtype=torch.float64) for column in (rewards, logs, norms)]
    return numbers[0], numbers[1], numbers[2], torch.tensor(groups)


def exact_optimum(batch: list[Member], group: int) -> float:
    own = [(Fraction(r), Fraction(math.exp(2 * w)) * Fraction(n)) for g, r, w, n in batch if g == group]
    return float(sum(r * omega for r, omega in own) / sum(omega for _, omega in own))


def test_hand_worked_interleaved_groups() -> None:
    """Group 7: (1·1·R=1 + 4·2·R=0) / 9 = 1/9. Group 3: (1·3·2 + 9·1·4) / 12 = 3.5."""
    rewards = torch.tensor([1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    log_weights = torch.tensor([1.0, 1.0, 2.0, 3.0], dtype=torch.float64).log()
    norms = torch.tensor([1.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([7, 3, 7, 3])
    optimum = optimal_baseline(rewards, log_weights, norms, groups)
    assert optimum.tolist() == pytest.approx([1 / 9, 3.5, 1 / 9, 3.5], rel=1e-14)
    assert group_mean(rewards, groups).tolist() == [0.5, 3.0, 0.5, 3.0]
    assert leave_one_out(rewards, groups).tolist() == [0.0, 4.0, 1.0, 2.0]
    assert group_std(rewards, groups).tolist() == pytest.approx([0.5**0.5, 2**0.5, 0.5**0.5, 2**0.5])
    assert zero_baseline(rewards, groups).tolist() == [0.0] * 4


@examples
@given(members)
def test_optimal_equals_rational_arithmetic(batch: list[Member]) -> None:
    rewards, logs, norms, groups = columns(batch)
    for value, (group, *_) in zip(
        optimal_baseline(rewards, logs, norms, groups).tolist(), batch, strict=True
    ):
        assert value == pytest.approx(exact_optimum(batch, group), rel=1e-9, abs=1e-9)


@examples
@given(members)
def test_optimal_minimises_the_second_moment(batch: list[Member]) -> None:
    """No perturbed b makes Σ ω² ‖u‖² (R − b)² of its group smaller."""
    rewards, logs, norms, groups = columns(batch)
    baseline = optimal_baseline(rewards, logs, norms, groups)
    omega = (2 * logs).exp() * norms
    for group in groups.unique():
        own = groups == group

        def moment(b: torch.Tensor, own: torch.Tensor = own) -> float:
            return (omega[own] * (rewards[own] - b) ** 2).sum().item()

        least = moment(baseline[own])
        for step in (1e-3, -1e-3, 0.1, -0.1, 3.0, -3.0):
            assert least <= moment(baseline[own] + step) * (1 + 1e-12)


@examples
@given(members, st.sampled_from([-1000.0, 1000.0]), st.sampled_from([1e-30, 1e30]))
def test_magnitude_of_weights_and_norms_cancels(batch: list[Member], shift: float, factor: float) -> None:
    rewards, logs, norms, groups = columns(batch)
    plain = optimal_baseline(rewards, logs, norms, groups)
    moved = optimal_baseline(rewards, logs + shift, norms * factor, groups)
    assert torch.allclose(moved, plain, rtol=1e-9, atol=1e-9)


@examples
@given(members, st.randoms())
def test_order_of_trajectories_does_not_matter(batch: list[Member], random) -> None:
    order = random.sample(range(len(batch)), len(batch))
    plain, moved = columns(batch), columns([batch[i] for i in order])
    assert torch.allclose(optimal_baseline(*moved), optimal_baseline(*plain)[order], rtol=1e-12, atol=1e-12)
    for baseline in (group_mean, group_std):
        expected = baseline(plain[0], plain[3])[order]
        assert torch.allclose(baseline(moved[0], moved[3]), expected, rtol=1e-12, atol=1e-12)


@examples
@given(
    st.lists(st.tuples(st.floats(-1000, 1000), st.floats(0, 1e30)), min_size=2, max_size=9),
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equal_rewards_get_exactly_zero_advantage(evidence, reward: float, dtype: torch.dtype) -> None:
    logs, norms = torch.tensor(evidence, dtype=torch.float64).unbind(1)
    rewards = torch.full((len(evidence),), reward).to(dtype)
    groups = torch.zeros(len(evidence), dtype=torch.long)
    for baseline in (
        optimal_baseline(rewards, logs, norms, groups),
        group_mean(rewards, groups),
        leave_one_out(rewards, groups),
    ):
        assert (rewards - baseline == 0).all()
    assert (group_std(rewards, groups) == 0).all()


def test_one_third_in_a_group_of_seven() -> None:
    """A plain float mean of seven times 0.1 is not 0.1."""
    rewards, groups = torch.full((7,), 0.1, dtype=torch.float64), torch.zeros(7, dtype=torch.long)
    assert (sum(rewards.tolist()) / 7) != 0.1
    for baseline in (group_mean, leave_one_out):
        assert torch.equal(baseline(rewards, groups), rewards)


def test_extreme_weights_and_norms() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    dominant = optimal_baseline(
        rewards, torch.tensor([1000.0, -1000.0, -1000.0, 1000.0]), torch.ones(4), groups
    )
    assert dominant.tolist() == [1.0, 1.0, 0.0, 0.0]
    norms = torch.tensor([0.0, 1e-30, 1e30, 1e30])
    assert optimal_baseline(rewards, torch.zeros(4), norms, groups).tolist() == [0.0, 0.0, 0.5, 0.5]


def test_a_group_of_zero_norms_gets_its_mean_whatever_the_weights() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    logs, norms = torch.tensor([900.0, 0.0, -3.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0])
    baseline = optimal_baseline(rewards, logs, norms, groups)
    assert baseline.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2.5, 2.5])


@examples
@given(members)
def test_leave_one_out_is_the_mean_of_the_others(batch: list[Member]) -> None:
    batch = batch + batch  # at least two in each group
    rewards, _, _, groups = columns(batch)
    for i, value in enumerate(leave_one_out(rewards, groups).tolist()):
        others = [r for j, (g, r, _, _) in enumerate(batch) if g == batch[i][0] and j != i]
        assert value == pytest.approx(math.fsum(others) / len(others), rel=1e-12, abs=1e-12)


def test_a_single_member() -> None:
    rewards, groups = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4, 4, 9])
    assert group_std(rewards, groups)[2].item() == 0.0
    assert group_mean(rewards, groups)[2].item() == 5.0
    with pytest.raises(VcpoError, match="trajectory index 2 is alone"):
        leave_one_out(rewards, groups)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_non_finite_is_named(argument: int, bad: float) -> None:
    inputs = [torch.ones(6), torch.zeros(6), torch.ones(6)]
    inputs[argument][3] = bad
    quantity = ("reward", "log-weight", "squared score norm")[argument]
    with pytest.raises(NonFiniteError, match=f"{quantity} at trajectory index 3"):
        optimal_baseline(inputs[0], inputs[1], inputs[2], torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("baseline", GROUP_BASELINES, ids=lambda f: f.__name__)
def test_non_finite_rewards_are_named(baseline) -> None:
    rewards = torch.ones(6)
    rewards[3] = math.nan
    with pytest.raises(NonFiniteError, match="reward at trajectory index 3"):
        baseline(rewards, torch.zeros(6, dtype=torch.long))


def test_negative_norms_and_wrong_shapes_are_refused() -> None:
    groups = torch.zeros(3, dtype=torch.long)
    with pytest.raises(VcpoError, match="trajectory index 1 is negative"):
        optimal_baseline(torch.ones(3), torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), groups)
    with pytest.raises(VcpoError, match=r"squared_score_norms \(1,\)"):
        optimal_baseline(torch.ones(3), torch.zeros(3), torch.ones(1), groups)
    with pytest.raises(VcpoError, match=r"groups \(3,\)"):
        group_mean(torch.ones(2), groups)


def test_baselines_are_constants_to_the_gradient() -> None:
    logs = torch.zeros(4, requires_grad=True)
    norms = torch.tensor([0.0, 1.0, 2.0, 3.0], requires_grad=True)
    rewards, groups = torch.tensor([1.0, 0.0, 2.0, 1.0], requires_grad=True), torch.zeros(4, dtype=torch.long)
    assert not optimal_baseline(rewards, logs, norms, groups).requires_grad
    assert not group_mean(rewards, groups).requires_grad
