"""Bias and variance of the estimators by exact enumeration of a tabular policy.

Sequences of two tokens over a vocabulary of three: nine outcomes, a reward for each, parameters θ [3 + 9]
(logits of the first token, and of the second given the first), and a behaviour policy with other logits.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from vcpo import group_mean, leave_one_out, log_importance_weights, optimal_baseline, truncate

torch.set_num_threads(1)

V = 3
OUTCOMES = torch.tensor(list(product(range(V), repeat=2)))
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.25, 1.0, 0.0, 0.0, 0.5, 3.0], dtype=torch.float64)
PAIRS = torch.tensor(list(product(range(V * V), repeat=2)))
MASK = torch.ones(V * V, 2, dtype=torch.bool)


def token_log_probs(theta: Tensor) -> Tensor:
    """[9, 2] log-probability of each token of each outcome."""
    first, second = theta[:V].log_softmax(0), theta[V:].view(V, V).log_softmax(1)
    return torch.stack([first[OUTCOMES[:, 0]], second[OUTCOMES[:, 0], OUTCOMES[:, 1]]], dim=1)


@pytest.fixture(scope="module")
def world() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    theta = torch.randn(V + V * V, generator=generator, dtype=torch.float64)
    behaviour = token_log_probs(theta + torch.randn(theta.shape, generator=generator, dtype=torch.float64))

    def log_prob(parameters: Tensor) -> Tensor:
        return token_log_probs(parameters).sum(-1)

    scores = torch.autograd.functional.jacobian(log_prob, theta)
    true_gradient = torch.autograd.functional.jacobian(lambda p: (log_prob(p).exp() * REWARDS).sum(), theta)
    assert isinstance(scores, Tensor) and isinstance(true_gradient, Tensor)
    return {
        "scores": scores,
        "squared_norms": (scores**2).sum(-1),
        "true_gradient": true_gradient,
        "chance": behaviour.sum(-1).exp(),
        "log_weights": log_importance_weights(token_log_probs(theta), behaviour, MASK),
    }


def moments(
    world: dict[str, Tensor], log_weights: Tensor, baseline: Tensor | float
) -> tuple[Tensor, float, float]:
    """Mean, total variance and second moment of w (R − b) s under the behaviour policy."""
    samples = (log_weights.exp() * (REWARDS - baseline))[:, None] * world["scores"]
    mean = world["chance"] @ samples
    second = (world["chance"] @ (samples**2).sum(-1)).item()
    return mean, second - (mean**2).sum().item(), second


def population_optimum(world: dict[str, Tensor], log_weights: Tensor) -> Tensor:
    """b* over the whole distribution: log ω² gains log μ, for each outcome counts with its chance."""
    chance_as_weight = log_weights + world["chance"].log() / 2
    return optimal_baseline(
        REWARDS, chance_as_weight, world["squared_norms"], torch.zeros(V * V, dtype=torch.long)
    )


def test_any_constant_baseline_is_unbiased_and_the_optimal_one_has_least_variance(world) -> None:
    optimum = population_optimum(world, world["log_weights"])
    mean, least, _ = moments(world, world["log_weights"], optimum)
    assert torch.allclose(mean, world["true_gradient"], atol=1e-14)
    for other in torch.linspace(-2, 4, 61).tolist():
        mean, variance, _ = moments(world, world["log_weights"], other)
        assert torch.allclose(mean, world["true_gradient"], atol=1e-14)
        assert least <= variance
    plain_mean = (world["chance"] @ REWARDS).item()
    assert least < 0.99 * moments(world, world["log_weights"], plain_mean)[1]


def test_truncated_weights_minimise_the_second_moment_and_are_biased(world) -> None:
    """As documented: with truncation b* is the least second moment of the *truncated* estimator."""
    truncated = truncate(world["log_weights"], 1.5)
    assert (truncated < world["log_weights"]).any()
    optimum = population_optimum(world, truncated)
    mean, _, least = moments(world, truncated, optimum)
    assert not torch.allclose(mean, world["true_gradient"], atol=1e-3)
    assert all(least <= moments(world, truncated, b)[2] for b in torch.linspace(-2, 4, 61).tolist())
    untruncated_optimum = population_optimum(world, world["log_weights"])
    assert least < moments(world, truncated, untruncated_optimum)[2]


def pair_estimate(world: dict[str, Tensor], baseline_of_pairs: Tensor) -> Tensor:
    """Expectation of the estimator over all groups of two, given the baselines [81 · 2] of their members."""
    members = PAIRS.flatten()
    coefficients = world["log_weights"][members].exp() * (REWARDS[members] - baseline_of_pairs)
    terms = (coefficients[:, None] * world["scores"][members]).view(len(PAIRS), 2, -1).mean(1)
    return world["chance"][PAIRS].prod(-1) @ terms


def test_baselines_that_see_their_own_trajectory(world) -> None:
    """Leave-one-out is unbiased off-policy; group mean and OPOB contain their own trajectory and are not."""
    members, groups = PAIRS.flatten(), torch.arange(len(PAIRS)).repeat_interleave(2)
    rewards, truth = REWARDS[members], world["true_gradient"]
    assert torch.allclose(pair_estimate(world, leave_one_out(rewards, groups)), truth, atol=1e-14)
    halved = pair_estimate(world, group_mean(rewards, groups))
    assert torch.allclose(halved, truth / 2, atol=1e-14)
    optimum = optimal_baseline(
        rewards, world["log_weights"][members], world["squared_norms"][members], groups
    )
    assert not torch.allclose(pair_estimate(world, optimum), truth, atol=1e-2)
