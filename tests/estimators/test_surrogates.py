"""Coefficients against the gradient of the real objectives in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo import policy_gradient_coefficients, ppo_clip_active, ppo_clip_coefficients
from vcpo.errors import ConfigError, NonFiniteError, VcpoError
from vcpo.estimators.surrogates import kl_coefficients

torch.set_num_threads(1)
examples = settings(deadline=None, max_examples=60)

rows = st.lists(
    st.tuples(st.floats(-3, 3), st.lists(st.floats(-2, 2), min_size=4, max_size=4)), min_size=1, max_size=5
)
masks = st.integers(0, 2**20 - 1)


def unpack(batch, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    advantages = torch.tensor([a for a, _ in batch], dtype=torch.float64)
    log_ratios = torch.tensor([r for _, r in batch], dtype=torch.float64)
    flags = [(bits >> place) & 1 == 1 for place in range(log_ratios.numel())]
    return advantages, log_ratios, torch.tensor(flags).view_as(log_ratios)


@examples
@given(rows, masks, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_ppo_is_the_gradient_of_its_objective(batch, bits: int, low: float, high: float) -> None:
    advantages, log_ratios, mask = unpack(batch, bits)
    # At a kink the objective has no gradient; autograd's choice there is not a truth to test against.
    kinks = torch.tensor([1 - low, 1 + high], dtype=torch.float64).log()
    mask &= ((log_ratios[..., None] - kinks).abs() > 1e-9).all(-1)
    log_probs = log_ratios.clone().requires_grad_()
    ratio = log_probs.exp()
    gain = advantages[:, None]
    objective = torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
    (objective * mask).sum().backward()
    coefficients = ppo_clip_coefficients(log_ratios, advantages, mask, low, high)
    assert log_probs.grad is not None
    assert torch.allclose(coefficients, log_probs.grad, rtol=1e-12, atol=1e-12)


def test_ppo_by_hand() -> None:
    """Ratios 0.5, 1, 2 for a good and a bad trajectory: the clip only ever stops a finished move."""
    ratios = torch.tensor([[0.5, 1.0, 2.0]] * 3, dtype=torch.float64)
    advantages, mask = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64), torch.ones(3, 3, dtype=torch.bool)
    coefficients = ppo_clip_coefficients(ratios.log(), advantages, mask)
    assert coefficients.tolist() == [[1.0, 2.0, 0.0], [0.0, -2.0, -4.0], [0.0, 0.0, 0.0]]
    active = ppo_clip_active(ratios.log(), advantages, mask)
    assert active.tolist() == [[False, False, True], [True, False, False], [False] * 3]
    assert not ppo_clip_active(ratios.log(), advantages, mask & False).any()


@examples
@given(rows, masks)
def test_policy_gradient_is_the_gradient_of_the_weighted_log_prob(batch, bits: int) -> None:
    """At token and at sequence level: ∇ Σ sg(w) A log π, term by term."""
    advantages, log_ratios, mask = unpack(batch, bits)
    sequence = (log_ratios * mask).sum(-1)
    for log_weights, weights in ((log_ratios, log_ratios.exp()), (sequence, sequence.exp()[:, None])):
        log_probs = torch.zeros_like(log_ratios, requires_grad=True)
        (weights * advantages[:, None] * log_probs * mask).sum().backward()
        coefficients = policy_gradient_coefficients(log_weights, advantages, mask)
        assert log_probs.grad is not None
        assert torch.allclose(coefficients, log_probs.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("surrogate", [policy_gradient_coefficients, ppo_clip_coefficients])
def test_garbage_outside_the_mask_never_matters(surrogate) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    garbage = torch.tensor([[0.0, math.nan], [math.inf, 0.0]])
    assert surrogate(garbage, torch.tensor([3.0, -5.0]), mask).tolist() == [[3.0, 0.0], [0.0, -5.0]]


def test_zero_advantage_meets_no_weight_and_a_finite_one_overflows_by_name() -> None:
    log_weights, mask = torch.tensor([0.0, 1000.0]), torch.ones(2, 1, dtype=torch.bool)
    assert policy_gradient_coefficients(log_weights, torch.tensor([1.0, 0.0]), mask).tolist() == [
        [1.0],
        [0.0],
    ]
    with pytest.raises(NonFiniteError, match="trajectory index 1: truncate"):
        policy_gradient_coefficients(log_weights, torch.tensor([1.0, 0.5]), mask)


@pytest.mark.parametrize("surrogate", [policy_gradient_coefficients, ppo_clip_coefficients])
def test_non_finite_is_named(surrogate) -> None:
    mask, good = torch.ones(5, 2, dtype=torch.bool), torch.zeros(5, 2)
    bad_advantage, bad_ratio = torch.ones(5), good.clone()
    bad_advantage[3], bad_ratio[3, 1] = math.nan, math.nan
    with pytest.raises(NonFiniteError, match="advantage at trajectory index 3"):
        surrogate(good, bad_advantage, mask)
    with pytest.raises(NonFiniteError, match="log-weight at trajectory index 3"):
        surrogate(bad_ratio, torch.ones(5), mask)


@pytest.mark.parametrize(
    ("low", "high"), [(-0.1, 0.2), (1.0, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)]
)
def test_bad_clip_bounds(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="PPO clips"):
        ppo_clip_coefficients(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool), low, high)


def test_detached_float32_and_shapes() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    ratios = torch.full((2, 3), 0.1, dtype=torch.bfloat16, requires_grad=True)
    coefficients = ppo_clip_coefficients(ratios, torch.ones(2, requires_grad=True), mask)
    assert coefficients.dtype == torch.float32 and not coefficients.requires_grad
    with pytest.raises(VcpoError, match=r"log_weights \(2, 2\), mask \(2, 3\)"):
        policy_gradient_coefficients(torch.zeros(2, 2), torch.ones(2), mask)
    with pytest.raises(VcpoError, match=r"\(3,\) advantages"):
        policy_gradient_coefficients(torch.zeros(2), torch.ones(3), mask)


def test_the_trust_region_is_minus_the_gradient_of_k3_and_has_a_bound() -> None:
    """log ρ + 1/ρ − 1 by autograd, far and near, outside the mask too."""
    ratios = torch.tensor([[-9.0, -0.5, 0.0, 0.4, 8.0, 80.0, 3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6 + [False]])
    ((ratios + (-ratios).exp() - 1) * mask).sum().backward()
    assert ratios.grad is not None
    torch.testing.assert_close(kl_coefficients(ratios, mask), -ratios.grad)
    far = kl_coefficients(torch.tensor([[-50.0]], dtype=torch.float64), torch.tensor([[True]]))
    assert far.item() == pytest.approx(math.exp(10) - 1)
    with pytest.raises(NonFiniteError):
        kl_coefficients(torch.tensor([[torch.inf]]), torch.tensor([[True]]))
