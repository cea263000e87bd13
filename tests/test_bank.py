"""benchmarks.bank: inner products against explicit vectors, and vectors against one backward a trajectory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.group_moments import BASELINES, WEIGHTINGS, Bank, moments, product_of_gradients
from benchmarks.rollout_bank import measure
from vcpo.algorithms import Evidence
from vcpo.config import ModelConfig
from vcpo.estimators.baselines import split_half_optimal
from vcpo.policy.loading import small_policy
from vcpo.scores.oracle import squared_score_norms_oracle
from vcpo.trajectory import Trajectory

M, G, DRAWS = 11, 4, 6


def a_bank() -> tuple[Bank, Tensor]:
    """Eleven rollouts with random scores of seven parameters."""
    random = torch.Generator().manual_seed(3)
    vectors = torch.randn(M, 7, generator=random, dtype=torch.float64)
    log_ratios = torch.randn(M, 3, generator=random)
    evidence = Evidence(
        log_probs=log_ratios,
        behaviour_log_probs=torch.zeros(M, 3),
        mask=torch.arange(3) < torch.randint(1, 4, (M, 1), generator=random),
        rewards=torch.randint(3, (M,), generator=random) / 2,
        groups=torch.zeros(M, dtype=torch.long),
        squared_score_norms=vectors.square().sum(1),
    )
    return Bank(evidence, vectors @ vectors.T), vectors


def weights_of(bank: Bank, name: str, mean: float) -> list[float]:
    e = bank.evidence
    whole = [float((e.log_probs[i][e.mask[i]]).sum().exp()) for i in range(M)]
    if name == "truncated":
        return [min(w, 8.0) for w in whole]
    return [1.0 if bank.rewards[i] > mean else min(w, 1.0) for i, w in enumerate(whole)]


def baseline_of(name: str, place: int, rewards: list[float], omega: list[float], counts: list[int]) -> float:
    """b of one member, from the definition; ``omega`` has w² ‖u‖² of the group."""
    others = [j for j in range(G) if j != place]
    mean = sum(rewards) / G
    optimum = sum(o * r for o, r in zip(omega, rewards, strict=True)) / sum(omega)
    half = [j for j in range(G) if j % 2 != place % 2]
    return {
        "zero": 0.0,
        "group-mean": mean,
        "leave-one-out": sum(rewards[j] for j in others) / (G - 1),
        "length-weighted": sum(n * r for n, r in zip(counts, rewards, strict=True)) / sum(counts),
        "optimal": optimum,
        "leave-one-out-optimal": sum(omega[j] * rewards[j] for j in others) / sum(omega[j] for j in others),
        "split-half-optimal": sum(omega[j] * rewards[j] for j in half) / sum(omega[j] for j in half),
        "bounded-optimal 0": min(optimum, mean),
        "bounded-optimal 0.1": min(optimum, mean - 0.1),
        "below-mean 0.1": mean - 0.1,
    }[name]


def gradient(bank: Bank, vectors: Tensor, members: list[int], weights: str, baseline: str) -> Tensor:
    """ĝ of one group, vector by vector."""
    rewards = [float(bank.rewards[i]) for i in members]
    every = weights_of(bank, weights, sum(rewards) / G)
    omega = [every[i] ** 2 * float(vectors[i] @ vectors[i]) for i in members]
    counts = [int(bank.evidence.mask[i].sum()) for i in members]
    terms = [
        every[i] * (rewards[place] - baseline_of(baseline, place, rewards, omega, counts)) * vectors[i] / G
        for place, i in enumerate(members)
    ]
    return torch.stack(terms).sum(0)


def leave_one_out(bank: Bank, vectors: Tensor, members: list[int], weights: str) -> Tensor:
    """The gradient of any rollouts, with the weights of the whole bank's mean reward."""
    every = weights_of(bank, weights, float(bank.rewards.mean()))
    total = float(bank.rewards[members].sum())
    terms = [
        every[i] * (bank.rewards[i] - (total - bank.rewards[i]) / (len(members) - 1)) * vectors[i]
        for i in members
    ]
    return torch.stack(terms).sum(0) / len(members)


@pytest.mark.parametrize("weights", [w.name for w in WEIGHTINGS])
def test_moments_are_those_of_the_vectors(weights: str) -> None:
    bank, vectors = a_bank()
    truth = torch.arange(7.0, dtype=torch.float64)
    found = moments(bank, G, DRAWS, torch.Generator().manual_seed(5), vectors @ truth)
    random = torch.Generator().manual_seed(5)
    orders = [torch.randperm(M, generator=random).tolist() for _ in range(DRAWS)]
    groups = [order[:G] for order in orders] + [order[G : 2 * G] for order in orders]
    pairs = range(DRAWS)
    outside = [
        leave_one_out(bank, vectors, [i for i in range(M) if i not in members], weights) for members in groups
    ]
    own = [leave_one_out(bank, vectors, members, weights) for members in groups]
    for baseline in (b.name for b in BASELINES):
        g = [gradient(bank, vectors, members, weights, baseline) for members in groups]
        d = [a - b for a, b in zip(g, own, strict=True)]
        expected = {
            "second": np.mean([float(a @ a) for a in g]),
            "mean": np.mean([float(g[i] @ g[i + DRAWS]) for i in pairs]),
            "drift": np.mean([float(d[i] @ d[i + DRAWS]) for i in pairs]),
            "along": np.mean([float(a @ o) for a, o in zip(d, outside, strict=True)]),
            "cosine": np.mean(
                [float(a @ o / (a.norm() * o.norm())) for a, o in zip(g, outside, strict=True)]
            ),
            "truth": np.mean([float(a @ truth) for a in g]),
        }
        assert vars(found[weights, baseline]) == pytest.approx(expected, rel=1e-5, abs=1e-7), baseline


def test_the_product_of_gradients_is_unbiased_for_the_policy() -> None:
    """Banks of i.i.d. rollouts of a policy with three answers, whose gradient is known exactly."""
    random = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 0.5])
    scores = torch.eye(3, dtype=torch.float64) - probabilities  # of a softmax
    exact = (probabilities * (rewards - probabilities @ rewards.double())) @ scores
    found = []
    for _ in range(400):
        drawn = torch.multinomial(probabilities, 8, replacement=True, generator=random)
        u = scores[drawn]
        zeros = torch.zeros(8, 1)
        evidence = Evidence(zeros, zeros, zeros == 0, rewards[drawn], torch.zeros(8, dtype=torch.long))
        weights = torch.ones(8, dtype=torch.float64)
        found.append(product_of_gradients(Bank(evidence, u @ u.T), weights, 8, random))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - float(exact @ exact)) < 3 * error
    assert 3 * error < 0.5 * float(exact @ exact)


def test_split_halves_are_those_of_the_estimator() -> None:
    bank, _ = a_bank()
    e = bank.evidence
    assert e.squared_score_norms is not None
    groups = torch.arange(8) // 4
    part = Evidence(e.log_probs[:8], e.log_probs[:8], e.mask[:8], e.rewards[:8], groups)
    norms = e.squared_score_norms[:8]
    part = Evidence(**{**vars(part), "squared_score_norms": norms})
    weights = bank.log_weights[:8]
    (ours,) = [b for b in BASELINES if b.name == "split-half-optimal"]
    expected = split_half_optimal(e.rewards[:8], weights, norms, groups)
    torch.testing.assert_close(ours.values(part, weights), expected)


def test_vectors_are_those_of_one_backward_pass_a_trajectory() -> None:
    config = ModelConfig(hidden_size=8, layers=1, heads=2, intermediate_size=8, context_length=8)
    policy = small_policy(config, "abcd", seed=0)
    texts = [("aab", "b"), ("bcdab", "b"), ("aab", "b"), ("aab", "ab")]  # prompts differ: none the worse
    group = []
    for text, answer in texts:
        tokens = np.array(policy.codec.encode(text + answer), np.int32)
        mask = np.arange(len(tokens)) >= len(text)
        group.append(Trajectory(tokens, mask, np.where(mask, -1.0, 0.0).astype(np.float32), tokens, 1.0))
    measured = measure(policy, group)
    sequences = [torch.from_numpy(t.tokens).long() for t in group]
    masks = [torch.from_numpy(t.action_mask) for t in group]
    shares = [1 / t.action_count for t in group]
    norms = squared_score_norms_oracle(policy.model, sequences, masks, shares)
    assert len(measured.vectors) == 3
    torch.testing.assert_close(measured.bank.evidence.squared_score_norms, norms)

    coefficients = torch.tensor([1.0, -2.0, 0.5, 3.0])
    log_probs = []
    for tokens, mask in zip(sequences, masks, strict=True):
        logits = policy.model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        log_probs.append(logits.gather(-1, tokens[1:, None])[:, 0][mask[1:]])
    sum(c * part.mean() for c, part in zip(coefficients, log_probs, strict=True)).backward()  # type: ignore
    expected = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    torch.testing.assert_close(measured.gradient(coefficients), expected)
    plain = squared_score_norms_oracle(policy.model, sequences, masks, [1.0] * len(group))
    torch.testing.assert_close(measured.bank.plain().evidence.squared_score_norms, plain)
    torch.testing.assert_close(measured.bank.plain().kernel.diagonal(), plain.double())
    weights = torch.stack([part.sum() + len(part) for part in log_probs])  # recorded: −1 a token
    torch.testing.assert_close(measured.bank.log_weights, weights.double())
