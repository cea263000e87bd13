"""Importance weights against hand-worked numbers; what lies outside the mask never matters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo import keep_within, length_normalised_log_weights, log_importance_weights, log_ratios, truncate
from vcpo.errors import ConfigError, NonFiniteError, VcpoError
from vcpo.estimators.importance import soften, taper

torch.set_num_threads(1)
examples = settings(deadline=None, max_examples=60)

LEARNER = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.25, -4.0], [-1.0, -1.0, -1.0]])
BEHAVIOUR = torch.tensor([[-1.5, -1.0, -3.5], [-0.75, -0.75, -2.0], [-2.0, -2.0, -2.0]])
MASK = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])


def test_hand_worked_levels() -> None:
    assert log_ratios(LEARNER, BEHAVIOUR, MASK).tolist() == [[0.5, -1.0, 0.0], [0.0, 0.5, -2.0], [0.0] * 3]
    assert log_importance_weights(LEARNER, BEHAVIOUR, MASK).tolist() == [-0.5, -1.5, 0.0]
    assert length_normalised_log_weights(LEARNER, BEHAVIOUR, MASK).tolist() == [-0.25, -0.75, 0.0]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38])
def test_values_outside_the_mask_never_matter(garbage: float) -> None:
    learner = LEARNER.masked_fill(~MASK, garbage).requires_grad_()
    behaviour = BEHAVIOUR.masked_fill(~MASK, -garbage).requires_grad_()
    weights = log_importance_weights(learner, behaviour, MASK)
    (weights * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert weights.tolist() == [-0.5, -1.5, 0.0]
    expected = torch.tensor([[2.0, 2.0, 0.0], [0.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    assert learner.grad is not None and torch.equal(learner.grad, expected)
    assert behaviour.grad is not None and torch.equal(behaviour.grad, -expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "estimator", [log_ratios, log_importance_weights, length_normalised_log_weights], ids=lambda f: f.__name__
)
def test_non_finite_inside_the_mask_names_the_trajectory(estimator, side: int, bad: float) -> None:
    pair = [torch.full((6, 2), -1.0), torch.full((6, 2), -1.0)]
    pair[side][3, 1] = bad
    pair[side][5, 0] = bad
    with pytest.raises(NonFiniteError, match="trajectory index 3") as caught:
        estimator(*pair, torch.ones(6, 2, dtype=torch.bool))
    assert caught.value.index == 3
    assert ("learner", "behaviour")[side] in caught.value.quantity


def test_half_precision_is_subtracted_in_float32() -> None:
    """In bfloat16 the sum of 1024 ratios of 1/64 would stop growing long before 16."""
    learner = torch.full((1, 1024), -1.0, dtype=torch.bfloat16)
    behaviour = torch.full((1, 1024), -1.015625, dtype=torch.bfloat16)
    weights = log_importance_weights(learner, behaviour, torch.ones(1, 1024, dtype=torch.bool))
    assert weights.dtype == torch.float32
    assert weights.item() == 1024 * (behaviour[0, 0].float().neg().item() - 1.0)


def test_float64_stays_float64() -> None:
    weights = log_importance_weights(LEARNER.double() + 1e-12, BEHAVIOUR.double(), MASK)
    assert weights[0].item() == pytest.approx(-0.5 + 2e-12, abs=1e-15)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(VcpoError, match=r"log_probs \(3, 3\), behaviour_log_probs \(1, 3\)"):
        log_ratios(LEARNER, BEHAVIOUR[:1], MASK)


@examples
@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_truncation_is_a_minimum_in_weight_space(log_weights: list[float], ceiling: float) -> None:
    truncated = truncate(torch.tensor(log_weights, dtype=torch.float64), ceiling)
    for value, raw in zip(truncated.tolist(), log_weights, strict=True):
        weight = math.exp(raw) if raw < 700 else math.inf
        assert math.exp(value) == pytest.approx(min(weight, ceiling), rel=1e-12)


def test_truncation_of_tokens_and_its_gradient() -> None:
    values = torch.tensor([[0.0, 3.0], [-1.0, 1.0]], requires_grad=True)
    truncated = truncate(values, math.e**2)
    truncated.sum().backward()
    assert truncated.tolist() == [[0.0, 2.0], [-1.0, 1.0]]
    assert values.grad is not None and values.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_rejection_keeps_both_ends() -> None:
    weights = torch.tensor([0.49, 0.5, 1.0, 2.0, 2.01], dtype=torch.float64)
    assert keep_within(weights.log(), 0.5, 2.0).tolist() == [False, True, True, True, False]
    assert keep_within(torch.tensor([-1000.0, 0.0, 1000.0]), 0.0, 1.0).tolist() == [True, True, False]


@pytest.mark.parametrize("ceiling", [0.0, -1.0, math.nan])
def test_bad_ceiling(ceiling: float) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        truncate(torch.zeros(1), ceiling)


@pytest.mark.parametrize(
    ("low", "high"), [(2.0, 1.0), (-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (0.0, math.nan)]
)
def test_bad_interval(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="low"):
        keep_within(torch.zeros(1), low, high)


def test_non_finite_log_weight_is_never_limited_in_silence() -> None:
    values = torch.tensor([0.0, math.inf])
    for limit in (lambda: truncate(values, 8.0), lambda: keep_within(values, 0.5, 2.0)):
        with pytest.raises(NonFiniteError, match="trajectory index 1"):
            limit()


def test_tapered_and_softened_weights_by_hand() -> None:
    """Weights 4, 4, 1/2; the first two above their reference, the last below."""
    logs, excess = torch.tensor([4.0, 4.0, 0.5]).log(), torch.tensor([0.1, 2.0, -1.0])
    assert taper(logs, excess).exp().tolist() == pytest.approx([1.0, 1.0, 0.5])
    assert taper(logs, excess, (0.0, 3.0), (0.75, 1.0)).exp().tolist() == pytest.approx([3.0, 3.0, 0.75])
    # At its reference a trajectory counts as not above it.
    assert taper(logs[:1], torch.zeros(1)).exp().tolist() == pytest.approx([1.0])
    soft = [16 * math.exp(-9), 16 * math.exp(-9), 0.125 * math.exp(1)]
    assert soften(logs, excess).exp().tolist() == pytest.approx(soft, rel=1e-5)
    assert soften(torch.tensor([500.0, -900.0]), excess[:2]).exp().tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match=r"low 2\.0 and high 1\.0"):
        taper(logs, excess, (2.0, 1.0))
    with pytest.raises(NonFiniteError, match="index 1"):
        soften(torch.tensor([0.0, math.inf]), excess[:2])
