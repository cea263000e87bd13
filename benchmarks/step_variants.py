"""The optimizer steps that :mod:`benchmarks.step` compares, and the model and minibatch they work on.

Each variant is one function that reads like the method it is. All are of the same update, for each group:
the gradient of −Σ_i w_i (R_i − b) n_i log π(τ_i), with w = min(weight, 8) and n_i one over the trajectory's
sampled tokens times B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vcpo.estimators.baselines import optimal_baseline
from vcpo.learner.accumulate import TwoSums
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.packing import PackedRows, pack
from vcpo.scores import ScoreTape
from vcpo.trajectory import Trajectory

FOREACH: Any = torch
"""Its operations on lists of tensors, which have no public types."""
CEILING = 8.0
"""Of importance weights."""
Baseline = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rewards, log-weights, squared norms) of one group to its baseline, one number."""


@dataclass(frozen=True)
class Part:
    """n trajectories of one group that go through the model together, N sampled tokens."""

    members: Sequence[int]
    rows: PackedRows
    behaviour: Tensor
    """[N] log-probabilities under the behaviour policy."""
    rewards: Tensor
    """[n]."""
    normalisers: Tensor
    """[n]."""
    first_reward: float
    """Reward of the first, and of all where the group is cut by reward."""

    @staticmethod
    def of(members: Sequence[int], batch: Sequence[Trajectory], device: str) -> Part:
        chosen = [batch[i] for i in members]
        behaviour = np.concatenate([t.log_probs[t.action_mask] for t in chosen])
        normalisers = [1 / (t.action_count * len(batch)) for t in chosen]
        return Part(
            members=members,
            rows=pack(chosen).to(device),
            behaviour=torch.from_numpy(behaviour).to(device),
            rewards=torch.tensor([t.reward for t in chosen], device=device),
            normalisers=torch.tensor(normalisers, device=device),
            first_reward=chosen[0].reward,
        )

    def log_weights(self, log_probs: Tensor) -> Tensor:
        """[n] log min(w, 8)."""
        differences = log_probs.detach() - self.behaviour
        sums = differences.new_zeros(self.rows.count).index_add_(0, self.rows.action_owners, differences)
        return sums.clamp(max=math.log(CEILING))

    def objective(self, log_probs: Tensor, factors: Tensor) -> Tensor:
        """Σ_i factors_i n_i log π(τ_i)."""
        return ((factors * self.normalisers)[self.rows.action_owners] * log_probs).sum()


def optimal(rewards: Tensor, log_weights: Tensor, squared_norms: Tensor) -> Tensor:
    return optimal_baseline(rewards, log_weights, squared_norms, torch.zeros_like(rewards).long())[0]


def mean(rewards: Tensor, log_weights: Tensor, squared_norms: Tensor) -> Tensor:
    return rewards.mean()


@dataclass(frozen=True)
class Work:
    """What a variant adds the gradient of: groups, each cut into parts."""

    model: nn.Module
    groups: Sequence[Sequence[Part]]
    tape: ScoreTape | None
    baseline: Baseline

    def log_probs(self, part: Part) -> Tensor:
        """Of the sampled tokens, recorded if there is a tape."""
        if self.tape is None:
            return sampled_log_probs(self.model, part.rows)
        with self.tape:
            return sampled_log_probs(self.model, part.rows)


def plain(work: Work) -> list[Tensor]:
    for (part,) in work.groups:
        log_probs = work.log_probs(part)
        advantages = part.rewards - part.rewards.mean()
        part.objective(log_probs, -part.log_weights(log_probs).exp() * advantages).backward()
    return []


def measured(work: Work) -> list[Tensor]:
    assert work.tape
    norms = []
    for (part,) in work.groups:
        log_probs = work.log_probs(part)
        total = part.objective(log_probs, torch.ones_like(part.rewards))
        record = work.tape.measure(total, part.rows.segments, part.rows.count)
        log_weights = part.log_weights(log_probs)
        baseline = work.baseline(part.rewards, log_weights, record.squared_norms)
        record.backward(-log_weights.exp() * (part.rewards - baseline))
        norms.append(record.squared_norms)
    return norms


def two_pass(work: Work) -> list[Tensor]:
    assert work.tape
    norms = []
    for (part,) in work.groups:
        log_probs = work.log_probs(part)
        total = part.objective(log_probs, torch.ones_like(part.rewards))
        norms.append(work.tape.squared_norms(total, part.rows.segments, part.rows.count))
        log_weights = part.log_weights(log_probs)
        baseline = work.baseline(part.rewards, log_weights, norms[-1])
        again = sampled_log_probs(work.model, part.rows)
        part.objective(again, -log_weights.exp() * (part.rewards - baseline)).backward()
    return norms


def two_sums(work: Work) -> list[Tensor]:
    """−Σ w (R − b) s = b Σ w s − Σ w R s, each part of one R; norms are of the weighted scores."""
    assert work.tape
    norms = []
    for parts in work.groups:
        log_weights, found = [], []
        with TwoSums(work.model.parameters()) as sums:
            for part in parts:
                sums.factor_of_second = part.first_reward
                log_probs = work.log_probs(part)
                log_weights.append(part.log_weights(log_probs))
                total = part.objective(log_probs, log_weights[-1].exp())
                weighted = work.tape.backward(total, part.rows.segments, part.rows.count)
                found.append(weighted.squared_norms / (2 * log_weights[-1]).exp())
            rewards = torch.cat([part.rewards for part in parts])
            baseline = work.baseline(rewards, torch.cat(log_weights), torch.cat(found))
            sums.combine(float(baseline), -1.0)
        norms += found
    return norms


def per_trajectory(work: Work) -> list[Tensor]:
    """The same two sums; Σ w R s needs no baseline, so all groups share one buffer for it."""
    parameters = [p for p in work.model.parameters() if p.requires_grad]
    weighted, rewarded = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    norms = []
    for parts in work.groups:
        log_weights, found = [], []
        for part in parts:
            work.model.zero_grad()
            log_probs = work.log_probs(part)
            log_weights.append(part.log_weights(log_probs))
            part.objective(log_probs, log_weights[-1].exp()).backward()
            grads = [p.grad for p in parameters if p.grad is not None]
            squares = torch.stack(FOREACH._foreach_norm(grads, 2, dtype=torch.float32)).square()
            found.append(squares.sum() / (2 * log_weights[-1]).exp())
            FOREACH._foreach_add_(weighted, grads)
            FOREACH._foreach_add_(rewarded, grads, alpha=part.first_reward)
        rewards = torch.cat([part.rewards for part in parts])
        baseline = work.baseline(rewards, torch.cat(log_weights), torch.cat(found))
        FOREACH._foreach_add_(rewarded, weighted, alpha=-float(baseline))
        FOREACH._foreach_zero_(weighted)
        norms += found
    for parameter, total in zip(parameters, rewarded, strict=True):
        parameter.grad = total.neg_()
    return norms


Cut = Callable[[Sequence[int], Sequence[Trajectory]], list[list[int]]]


def whole(group: Sequence[int], batch: Sequence[Trajectory]) -> list[list[int]]:
    return [list(group)]


def by_reward(group: Sequence[int], batch: Sequence[Trajectory]) -> list[list[int]]:
    rewards = sorted({batch[i].reward for i in group})
    return [[i for i in group if batch[i].reward == reward] for reward in rewards]


def one_by_one(group: Sequence[int], batch: Sequence[Trajectory]) -> list[list[int]]:
    return [[i] for i in group]


@dataclass(frozen=True)
class Variant:
    """One way to the gradient."""

    add_gradient: Callable[[Work], list[Tensor]]
    """Adds to ``.grad``; returns squared norms, part by part; none if it needs none."""
    method: str | None = None
    """Of its score tape, if it has one."""
    cut: Cut = whole
    """A group into micro-batches."""


VARIANTS = {
    "plain": Variant(plain),
    "exact": Variant(measured, "exact"),
    "sketched": Variant(measured, "sketched"),
    "two_pass": Variant(two_pass, "sketched"),
    "two_sums": Variant(two_sums, "sketched", by_reward),
    "per_trajectory": Variant(per_trajectory, cut=one_by_one),
}
