"""Masking of the off-policy prefix: the step is that of a minibatch in which those tokens were observed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import gradients, learner_for, random_groups, tiny_model

from vcpo.learner.minibatch import without_off_policy_prefix
from vcpo.trajectory import NOT_SAMPLED, Group, Trajectory

torch.set_num_threads(1)


def of_several_versions(group: Group) -> Group:
    """Sampled tokens before place 6 are of version 3, the others of version 5."""
    versions = [np.where(np.arange(len(t.tokens)) < 6, 3, 5).astype(np.int32) for t in group.trajectories]
    return replace(
        group,
        trajectories=tuple(
            replace(t, versions=np.where(t.action_mask, v, NOT_SAMPLED).astype(np.int32))
            for t, v in zip(group.trajectories, versions, strict=True)
        ),
    )


def prefix_observed(trajectory: Trajectory) -> Trajectory:
    """As if the environment had shown what version 3 sampled before version 5 went on."""
    later = [bool(m) and v == 5 for m, v in zip(trajectory.action_mask, trajectory.versions, strict=True)]
    kept = np.array(later) if any(later) else trajectory.action_mask
    return replace(
        trajectory,
        action_mask=kept,
        log_probs=np.where(kept, trajectory.log_probs, 0).astype(np.float32),
        versions=np.where(kept, trajectory.versions, NOT_SAMPLED).astype(np.int32),
    )


@pytest.mark.parametrize("algorithm", ["vcpo", "grpo", "tis"])
def test_a_masked_prefix_is_as_good_as_observed(algorithm: str) -> None:
    groups = [of_several_versions(g) for g in random_groups(staleness=1.0)]
    observed = [replace(g, trajectories=tuple(prefix_observed(t) for t in g.trajectories)) for g in groups]
    masked, plain, whole = tiny_model(), tiny_model(), tiny_model()
    figures = learner_for(masked, algorithm, mask_off_policy_prefix=True, token_budget=40).step(groups)
    expected = learner_for(plain, algorithm).step(observed)
    unmasked = learner_for(whole, algorithm).step(groups)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(masked)[name], gradient, rtol=1e-4, atol=1e-8, msg=name)
    for name in ("ess", "ess_ratio", "log_weight_max", "kl", "step_scale", "grad_norm"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-4), name
    assert figures["grad_norm"] != pytest.approx(unmasked["grad_norm"], rel=1e-2)
    # What was rolled out is described as it was: only the loss sees less.
    for name in ("action_tokens", "tokens", "token_lag_mean", "lag_histogram", "response_length"):
        assert figures[name] == unmasked[name], name
    assert figures["masked_tokens"] == unmasked["action_tokens"] - expected["action_tokens"] > 0
    assert "masked_tokens" not in unmasked


def test_one_version_and_no_version_are_left_alone() -> None:
    trajectory = random_groups()[0].trajectories[0]
    assert without_off_policy_prefix(trajectory) is trajectory
    silent = replace(trajectory, action_mask=np.zeros_like(trajectory.action_mask))
    assert without_off_policy_prefix(silent) is silent
