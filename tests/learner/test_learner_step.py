"""One optimizer step against a hand-written one, and its invariance to how the minibatch is cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from learner_cases import (
    VOCABULARY,
    gradients,
    learner_for,
    log_probs_of,
    policy_of,
    random_groups,
    tiny_model,
)
from torch import Tensor
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_utils import PreTrainedModel

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import AlgorithmConfig, LearnerConfig
from vcpo.errors import NonFiniteError, VcpoError
from vcpo.learner.learner import Learner
from vcpo.trajectory import Group, Trajectory

torch.set_num_threads(1)


def vcpo_gradient_by_hand(
    model: PreTrainedModel, groups: list[Group], truncation: float
) -> dict[str, Tensor]:
    """Σ_i −(1/(B·L_i)) min(w_i, c)(R_i − b*) ∇ log π(τ_i), one trajectory and one backward at a time."""
    batch = [(g, t) for g, group in enumerate(groups) for t in group.trajectories]
    count = len(batch)
    records = []
    for g, t in batch:
        model.zero_grad()
        log_probs = log_probs_of(model, t)
        behaviour = torch.from_numpy(t.log_probs[t.action_mask]).double()
        weight = min(float((log_probs.detach() - behaviour).sum().exp()), truncation)
        (log_probs.sum() / (count * t.action_count)).backward()
        score = gradients(model)
        norm = sum(float(v.square().sum()) for v in score.values())
        records.append((g, t.reward, weight, norm, score))
    model.zero_grad()
    total: dict[str, Tensor] = {}
    for g, reward, weight, _, score in records:
        peers = [r for r in records if r[0] == g]
        baseline = sum(w * w * n * r for _, r, w, n, _ in peers) / sum(w * w * n for _, _, w, n, _ in peers)
        for name, value in score.items():
            total[name] = total.get(name, torch.zeros_like(value)) - weight * (reward - baseline) * value
    return total


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_vcpo_gradient_is_the_formula_worked_one_trajectory_at_a_time(kind: str) -> None:
    groups, model = random_groups(staleness=1.0), tiny_model(kind)
    expected = vcpo_gradient_by_hand(copy.deepcopy(model), groups, truncation=8.0)
    learner = learner_for(model, "vcpo")
    metrics = learner.step(groups)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-4, atol=2e-7, msg=name)
    norm = sum(float(v.square().sum()) for v in expected.values()) ** 0.5
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_step_scale_follows_the_unclipped_weights_of_the_whole_minibatch() -> None:
    groups, model = random_groups(staleness=1.0), tiny_model()
    log_weights = [
        float((log_probs_of(model, t).detach() - torch.from_numpy(t.log_probs[t.action_mask])).sum())
        for group in groups
        for t in group.trajectories
    ]
    w = np.exp(np.array(log_weights))
    ratio = w.sum() ** 2 / (w**2).sum() / len(w)
    metrics = learner_for(model, "vcpo", token_budget=16).step(groups)
    assert metrics["ess_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert metrics["step_scale"] == pytest.approx(ratio**0.5, rel=1e-4)
    assert metrics["learning_rate"] == pytest.approx(0.01 * ratio**0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["vcpo", "grpo", "rloo", "tis"])
@pytest.mark.parametrize("token_budget", [1, 20, 40, 100])
def test_update_does_not_depend_on_the_micro_batches(name: str, token_budget: int) -> None:
    groups, reference = random_groups(), tiny_model()
    other = copy.deepcopy(reference)
    whole = learner_for(reference, name, token_budget=10_000).step(groups)
    cut = learner_for(other, name, token_budget=token_budget).step(groups)
    for (n, p), q in zip(reference.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8, msg=n)
    for key in ("loss", "ess_ratio", "step_scale", "grad_norm", "kl"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-9), key


def test_grpo_gradient_is_that_of_the_clipped_objective() -> None:
    groups, model = random_groups(staleness=0.4), tiny_model()
    twin = copy.deepcopy(model)
    batch = [(group, t) for group in groups for t in group.trajectories]
    loss = torch.zeros((), dtype=torch.float64)
    for group, t in batch:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantage = (
            float((t.reward - rewards.mean()) / (rewards.std() + 1e-6))
            if len(set(group.rewards)) > 1
            else 0.0
        )
        ratio = (log_probs_of(twin, t) - torch.from_numpy(t.log_probs[t.action_mask]).double()).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = loss - surrogate.mean() / len(batch)
    loss.backward()
    learner_for(model, "grpo").step(groups)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=n)


def test_equal_rewards_give_a_gradient_of_exactly_zero_and_a_first_step_that_moves_nothing() -> None:
    groups = [
        Group(
            g.index,
            g.problem,
            tuple(Trajectory(t.tokens, t.action_mask, t.log_probs, t.versions, 0.7) for t in g.trajectories),
        )
        for g in random_groups(staleness=2.0)
    ]
    for name in ("vcpo", "grpo", "rloo", "tis"):
        model = tiny_model()
        before = [p.detach().clone() for p in model.parameters()]
        metrics = learner_for(model, name).step(groups)
        assert metrics["grad_norm"] == 0.0
        assert metrics["equal_groups"] == 1.0
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), name


def failed_trajectory() -> Trajectory:
    empty = np.zeros(0)
    return Trajectory(
        empty.astype(np.int32),
        empty.astype(bool),
        empty.astype(np.float32),
        empty.astype(np.int32),
        0.0,
        "failed",
        "why",
    )


@pytest.mark.parametrize("token_budget", [1, 10_000])
def test_an_episode_without_tokens_counts_in_the_batch_and_its_reward_in_its_group(token_budget: int) -> None:
    groups = random_groups(sizes=(3,), staleness=1.0)
    with_failed = [Group(0, 0, (*groups[0].trajectories, failed_trajectory()))]
    model = tiny_model()
    twin = copy.deepcopy(model)
    metrics = learner_for(model, "vcpo", token_budget=token_budget).step(with_failed)
    # Its score is zero, so the optimal baseline is that of the others; B is 4 instead of 3.
    expected = vcpo_gradient_by_hand(twin, groups, truncation=8.0)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name] * 3 / 4, rtol=2e-4, atol=2e-7, msg=name)
    assert metrics["failed_episodes"] == 1


def test_a_minibatch_of_failed_episodes_only_is_a_step_that_moves_nothing() -> None:
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    metrics = learner_for(model, "vcpo").step([Group(0, 0, (failed_trajectory(), failed_trajectory()))])
    assert metrics["grad_norm"] == 0.0
    assert metrics["response_length"] == 0.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_nan_weights_are_named_and_nothing_is_stepped() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] = float("nan")
    learner = learner_for(model, "vcpo")
    with pytest.raises(NonFiniteError, match="trajectory index 0"):
        learner.step(random_groups())
    assert learner.version == 0


def test_a_nan_behaviour_log_prob_is_named_by_its_trajectory() -> None:
    groups = random_groups(sizes=(3, 3))
    broken = groups[1].trajectories[1]
    broken.log_probs[np.flatnonzero(broken.action_mask)[0]] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        learner_for(tiny_model(), "tis").step(groups)
    assert caught.value.index == 4


def test_nothing_to_train_on_is_an_error() -> None:
    learner = learner_for(tiny_model(), "vcpo")
    with pytest.raises(VcpoError, match="at least one group"):
        learner.step([])
    t = random_groups(sizes=(1,))[0].trajectories[0]
    first_sampled = Trajectory(t.tokens, np.ones(len(t.tokens), bool), t.log_probs, t.versions, 1.0)
    with pytest.raises(VcpoError, match="trajectory 0 begins with a sampled token"):
        learner.step([Group(0, 0, (first_sampled, first_sampled))])


def test_lag_is_counted_from_the_oldest_version_of_a_group() -> None:
    groups = random_groups(sizes=(2, 2))
    learner = learner_for(tiny_model(), "rloo")
    for _ in range(5):
        learner.step(groups)
    mixed = groups[1].trajectories[0]
    sampled = np.flatnonzero(mixed.action_mask)
    for trajectory in (*groups[0].trajectories, *groups[1].trajectories):
        trajectory.versions[trajectory.action_mask] = 4
    mixed.versions[sampled[-1]] = 2
    metrics = learner.step(groups)
    assert metrics["lag_histogram"] == {1: 1, 3: 1}
    assert metrics["lag_mean"] == 2.0
    assert metrics["lag_max"] == 3
    tokens = sum(t.action_count for g in groups for t in g.trajectories)
    assert metrics["token_lag_mean"] == pytest.approx((tokens + 2) / tokens)


def test_algorithm_overrides_reach_the_step() -> None:
    algorithm = get_algorithm("vcpo").with_overrides(AlgorithmConfig.model_validate({"step_scale": "off"}))
    learner = Learner(policy_of(tiny_model()), algorithm, LearnerConfig())
    assert learner.step(random_groups(staleness=2.0))["step_scale"] == 1.0


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_the_offending_trajectory_is_named_by_its_place_in_the_minibatch(token_budget: int) -> None:
    groups = random_groups(sizes=(2, 2, 2))
    broken = groups[2].trajectories[1]
    broken.log_probs[np.flatnonzero(broken.action_mask)[0]] = np.inf
    for name in ("vcpo", "grpo"):
        with pytest.raises(NonFiniteError) as caught:
            learner_for(tiny_model(), name, token_budget=token_budget).step(groups)
        assert caught.value.index == 5


def test_failed_episodes_do_not_enter_the_ess() -> None:
    """All others drifted to weights of about e^-20: a failed episode's weight of 1 would own the sum."""
    groups = random_groups(sizes=(4,), staleness=0.3)
    for t in groups[0].trajectories:
        t.log_probs[t.action_mask] += 5.0
    model = tiny_model()
    alone = learner_for(copy.deepcopy(model), "vcpo").step(groups)
    with_failed = [Group(0, 0, (*groups[0].trajectories, failed_trajectory()))]
    both = learner_for(model, "vcpo").step(with_failed)
    assert both["ess_ratio"] == pytest.approx(alone["ess_ratio"], rel=1e-9)
    assert both["step_scale"] == pytest.approx(alone["step_scale"], rel=1e-9)


def test_a_model_that_lets_packed_sequences_see_each_other_gets_a_row_for_each() -> None:
    """OPT numbers positions by its padding mask and ignores position ids."""
    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            dropout=0.0,
        )
    )
    with torch.no_grad():
        for p in opt.parameters():
            p.add_(0.2 * torch.randn_like(p))
    opt = opt.double().eval()
    groups = random_groups()
    twin = copy.deepcopy(opt)
    batch = [(group, t) for group in groups for t in group.trajectories]
    loss = torch.zeros((), dtype=torch.float64)
    for group, t in batch:
        others = (sum(group.rewards) - t.reward) / (len(group.rewards) - 1)
        loss = loss - (t.reward - others) * log_probs_of(twin, t).sum() / 16 / len(batch)
    loss.backward()
    learner_for(opt, "rloo").step(groups)
    for (name, p), q in zip(opt.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)
