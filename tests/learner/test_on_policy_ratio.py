"""The on-policy ratio of a step: a number, or found from the lengths in its minibatch."""

from __future__ import annotations

import pytest
import torch
from learner_cases import policy_of, random_groups, tiny_model
from torch import Tensor

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import LearnerConfig
from vcpo.learner.learner import Learner, OnPolicyRatio
from vcpo.trajectory import Group, Trajectory

torch.set_num_threads(1)


def learner(reference: float | OnPolicyRatio) -> Learner:
    return Learner(policy_of(tiny_model()), get_algorithm("vcpo"), LearnerConfig(token_budget=20), reference)


def test_it_is_asked_for_the_sampled_tokens_of_every_trajectory_that_has_some() -> None:
    asked: list[list[int]] = []

    def reference(lengths: Tensor) -> float:
        asked.append(lengths.tolist())
        return 0.5

    groups = random_groups(staleness=1.0)
    first = groups[0].trajectories[0]
    failed = Trajectory(first.tokens[:0], first.action_mask[:0], first.log_probs[:0], first.versions[:0], 0.0)
    with_failed = [*groups, Group(3, 3, (failed, first))]
    metrics = learner(reference).step(with_failed)
    counts = [t.action_count for group in groups for t in group.trajectories]
    assert asked == [[*counts, first.action_count]]
    assert metrics["on_policy_ratio"] == 0.5


@pytest.mark.parametrize(("reference", "share"), [(0.25, 0.25), (lambda lengths: 0.25, 0.25), (1.0, 1.0)])
def test_the_step_is_scaled_relative_to_it(reference: float | OnPolicyRatio, share: float) -> None:
    metrics = learner(reference).step(random_groups(staleness=1.0))
    assert metrics["ess_ratio"] < 0.9
    assert metrics["on_policy_ratio"] == share
    assert metrics["step_scale"] == pytest.approx(min(1.0, metrics["ess_ratio"] / share) ** 0.5, rel=1e-6)


def test_a_minibatch_without_sampled_tokens_asks_nothing() -> None:
    def reference(lengths: Tensor) -> float:
        raise AssertionError("there are no lengths")

    first = random_groups()[0].trajectories[0]
    empty = Trajectory(first.tokens[:0], first.action_mask[:0], first.log_probs[:0], first.versions[:0], 0.0)
    metrics = learner(reference).step([Group(0, 0, (empty, empty))])
    assert (metrics["on_policy_ratio"], metrics["step_scale"]) == (1.0, 1.0)
