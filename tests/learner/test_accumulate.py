"""A group that spans several micro-batches, against the same group in one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import gradients, learner_for, policy_of, random_groups, tiny_model
from torch import Tensor, nn

from vcpo.algorithms import Evidence
from vcpo.algorithms.catalog import ALGORITHMS, get_algorithm
from vcpo.config import AlgorithmConfig, LearnerConfig
from vcpo.errors import NonFiniteError
from vcpo.learner.accumulate import TwoSums
from vcpo.learner.learner import Learner
from vcpo.trajectory import Group, Trajectory

torch.set_num_threads(1)


def graded_groups(staleness: float = 0.4) -> list[Group]:
    """Seven rewards that all differ, then five of two kinds, then three that are equal."""
    seven, five, three = random_groups(sizes=(7, 5, 3), staleness=staleness)
    return [
        with_rewards(seven, [0.3, -1.0, 2.5, 0.0, 0.7, 1.1, -0.2]),
        with_rewards(five, [0.0, 1.0, 1.0, 0.0, 1.0]),
        with_rewards(three, [0.5, 0.5, 0.5]),
    ]


def with_rewards(group: Group, rewards: list[float]) -> Group:
    members = (
        Trajectory(t.tokens, t.action_mask, t.log_probs, t.versions, reward)
        for t, reward in zip(group.trajectories, rewards, strict=True)
    )
    return Group(group.index, group.problem, tuple(members))


def learner_with(model: Any, name: str, token_budget: int, **overrides: Any) -> Learner:
    algorithm = get_algorithm(name).with_overrides(AlgorithmConfig(name=name, **overrides))
    config = LearnerConfig(
        learning_rate=0.01, max_grad_norm=1e9, token_budget=token_budget, score_norms="exact"
    )
    return Learner(policy_of(model), algorithm, config)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vcpo": ("vcpo", {}),
    "vcpo over std": ("vcpo", {"normalise": "std"}),
    "leave one out": ("rloo", {}),
    "tis": ("tis", {}),
    "untruncated": ("tis", {"truncation": 1e30}),
}


@pytest.mark.parametrize("staleness", [0.4, 6.0])
@pytest.mark.parametrize("token_budget", [1, 26, 45])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_sums_give_the_update_of_a_whole_group(variant: str, token_budget: int, staleness: float) -> None:
    """A staleness of 6 nats a token gives weights from e-60 to e+60."""
    name, overrides = VARIANTS[variant]
    groups, reference = graded_groups(staleness), tiny_model()
    other = copy.deepcopy(reference)
    whole = learner_with(reference, name, 10_000, **overrides).step(groups)
    cut = learner_with(other, name, token_budget, **overrides).step(groups)
    scale = max(float(g.abs().max()) for g in gradients(reference).values())
    for parameter, gradient in gradients(reference).items():
        torch.testing.assert_close(
            gradients(other)[parameter], gradient, rtol=1e-4, atol=1e-5 * scale, msg=parameter
        )
    for key in ("loss", "ess_ratio", "grad_norm", "baseline_mean", "advantage_std"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-7), key
    if variant.startswith("vcpo"):
        assert cut["score_norm_mean"] == pytest.approx(whole["score_norm_mean"], rel=1e-4)


def test_one_forward_and_one_backward_for_each_micro_batch() -> None:
    """What the two sums are for: the micro-batches of a group are not run through the model again."""
    model, calls = tiny_model(), []
    learner = learner_for(model, "vcpo", token_budget=1)
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    groups = random_groups(sizes=(4, 3))
    learner.step(groups)
    assert len(calls) == 7


@dataclass(frozen=True)
class HalfOfFailures:
    """A normalisation that two sums know nothing of: negative advantages count half."""

    name = "halved"
    formula = "half of A where A < 0"

    @staticmethod
    def apply(advantages: Tensor, evidence: Evidence) -> Tensor:
        return torch.where(advantages < 0, 0.5, 1.0) * advantages


@pytest.mark.parametrize("token_budget", [1, 30])
def test_coefficients_that_no_line_gives_take_a_second_pass(token_budget: int) -> None:
    halved: Any = HalfOfFailures()
    algorithm = replace(get_algorithm("vcpo"), normalisation=halved)
    models = [tiny_model(), tiny_model()]
    for model, budget in zip(models, (10_000, token_budget), strict=True):
        config = LearnerConfig(max_grad_norm=1e9, token_budget=budget, score_norms="exact")
        Learner(policy_of(model), algorithm, config).step(graded_groups())
    for name, gradient in gradients(models[0]).items():
        torch.testing.assert_close(gradients(models[1])[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["vcpo", "rloo"])
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.012)])
def test_sums_that_nearly_cancel_keep_their_digits(
    name: str, precision: torch.dtype, tolerance: float
) -> None:
    """Fifteen successes and a failure, one trajectory a micro-batch: the two sums are nearly parallel."""
    group = with_rewards(random_groups(sizes=(16,))[0], [1.0] * 15 + [0.0])
    models: list[Any] = [nn.Module.to(tiny_model(), precision) for _ in range(2)]
    for model, budget in zip(models, (10_000, 1), strict=True):
        learner_with(model, name, budget).step([group])
    whole, cut = (torch.cat([g.double().flatten() for g in gradients(m).values()]) for m in models)
    assert float((whole - cut).norm() / whole.norm()) < tolerance


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_a_weight_too_large_for_a_number_names_its_trajectory(token_budget: int) -> None:
    (group,) = random_groups(sizes=(4,))
    group.trajectories[2].log_probs[group.trajectories[2].action_mask] = -900.0
    single = nn.Module.to(tiny_model(), torch.float32)
    with pytest.raises(NonFiniteError) as caught:
        learner_with(single, "tis", token_budget, truncation=1e300).step([group])
    assert caught.value.index == 2


def test_a_failed_episode_does_not_set_the_scale_of_small_weights() -> None:
    """Its weight is 1, the others' e-40: its micro-batch must not round theirs away."""
    (group,) = random_groups(sizes=(5,))
    for t in group.trajectories:
        t.log_probs[t.action_mask] += 40.0 / t.action_count
    nothing = np.zeros(0)
    failed = Trajectory(
        nothing.astype(np.int32),
        nothing.astype(bool),
        nothing.astype(np.float32),
        nothing.astype(np.int32),
        group.trajectories[0].reward,
    )
    mixed = [Group(0, 0, (*group.trajectories, failed))]
    norms = [learner_with(tiny_model(), "vcpo", budget).step(mixed)["grad_norm"] for budget in (10_000, 40)]
    assert 0.0 < norms[0] < 1e-12
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_two_sums_by_hand() -> None:
    """d(x²)/dx at 3 is 6, d(5x)/dx is 5: 0.5·(2·6 + 4·5) and 10·(2·6·1 + 4·5·3), added to what was there."""
    x, unused = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(1.0))
    x.grad = torch.tensor(100.0)
    with TwoSums([x, unused]) as sums:
        sums.factor, sums.factor_of_second = 2.0, 1.0
        (x**2).backward()
        assert x.grad is None
        sums.factor, sums.factor_of_second = 4.0, 3.0
        (5 * x).backward()
        sums.combine(0.5, 10.0)
    assert float(x.grad) == 100.0 + 0.5 * 32.0 + 10.0 * 72.0
    assert unused.grad is None


def test_gradients_survive_an_error_inside_two_sums() -> None:
    x = nn.Parameter(torch.tensor(3.0))
    x.grad = torch.tensor(1.0)
    with pytest.raises(KeyboardInterrupt), TwoSums([x]):
        (x**2).backward()
        raise KeyboardInterrupt
    assert float(x.grad) == 1.0
    (x**2).backward()
    assert float(x.grad) == 7.0


def test_a_sketched_step_is_the_exact_one_within_the_error_it_states() -> None:
    """Trajectories long enough that norms are sketched: the baselines move a little, and all is reported."""
    rng = np.random.default_rng(0)
    groups = []
    for index in range(2):
        members = []
        for reward in (0.0, 1.0, 0.0, 1.0):
            length = int(rng.integers(40, 60))
            mask = np.arange(length) >= 5
            log_probs = np.where(mask, -2.4 + 0.05 * rng.standard_normal(length), 0).astype(np.float32)
            versions = np.where(mask, 0, -1).astype(np.int32)
            tokens = rng.integers(0, 11, length).astype(np.int32)
            members.append(Trajectory(tokens, mask, log_probs, versions, reward))
        groups.append(Group(index, index, tuple(members)))
    model = tiny_model(hidden_size=128, intermediate_size=256)
    twin = copy.deepcopy(model)
    sketched = learner_for(model, "vcpo").step(groups)
    exact = learner_for(twin, "vcpo", score_norms="exact").step(groups)
    assert exact["score_norm_error"] == 0.0
    assert 0.0 < sketched["score_norm_error"] < 0.5
    assert sketched["score_norm_mean"] != exact["score_norm_mean"]
    assert sketched["score_norm_mean"] == pytest.approx(exact["score_norm_mean"], rel=0.3)
    assert sketched["baseline_mean"] == pytest.approx(exact["baseline_mean"], abs=0.05)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_gives_one_update_however_the_minibatch_is_cut(name: str) -> None:
    """One micro-batch, one a group or so, and one a trajectory: gradients, critic's included, and figures."""
    groups, results = graded_groups(), []
    for token_budget in (10_000, 60, 1):
        model = tiny_model()
        learner = learner_with(model, name, token_budget)
        metrics = learner.step(groups)
        found = gradients(model)
        if learner.critic is not None:
            found |= {
                f"critic.{n}": p.grad for n, p in learner.critic.named_parameters() if p.grad is not None
            }
            assert any(bool(g.any()) for n, g in found.items() if n.startswith("critic."))
        results.append((found, metrics))
    (whole, figures), *others = results
    scale = max(float(g.abs().max()) for g in whole.values())
    assert scale > 0 or name == "mis-geometric"
    for cut, own in others:
        for parameter, gradient in whole.items():
            torch.testing.assert_close(cut[parameter], gradient, rtol=1e-4, atol=1e-5 * scale, msg=parameter)
        for key in ("loss", "ess_ratio", "ess_ratio_truncated", "truncated_fraction", "advantage_std"):
            assert own[key] == pytest.approx(figures[key], rel=1e-4, abs=1e-6), key
