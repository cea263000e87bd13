"""Moments of the gradient that a group of G rollouts gives, from inner products of their scores alone.

The M rollouts of one prompt are a bank: u_i = n_i ∇log π(y_i) is each one's score, with n_i = 1/L_i as in the
mean over sequences, or 1 for the plain score, and K_ij = u_i · u_j. A group of G makes
ĝ = (1/G) Σ ω_i A_i u_i = Σ c_i u_i, so a product of two gradients is cᵀ K c', whatever number of parameters
the policy has.

Two *disjoint* groups of a bank are independent samples of the behaviour policy. So, over random pairs,

    E‖ĝ‖²        = mean of cᵀ K c            ‖E ĝ‖² = mean of c₁ᵀ K c₂
    trace of Cov = E‖ĝ‖² − ‖E ĝ‖²

are unbiased for the behaviour policy itself, not only for the bank, and so is the bias. Over any N rollouts,
r_i = ω_i (R_i − mean R) / (N − 1) is the leave-one-out gradient, whose mean is the exact one of these
weights, g = E[ω (R − E R) u]. With d = c − r of the same group, and r' of the rollouts outside it,

    ‖E ĝ − g‖²   = mean of d₁ᵀ K d₂          (E ĝ − g) · g = mean of dᵀ K r'

Only where E[ω u] = 0 does a baseline leave the mean alone: with untruncated weights and plain scores.
Truncation and length normalisation each make it a part of what is estimated; g is then one choice of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vcpo.algorithms import Evidence, parts
from vcpo.algorithms.parts import Baseline, Importance
from vcpo.estimators.baselines import optimal_baseline
from vcpo.estimators.importance import log_importance_weights, taper, truncate

TRUNCATION = 8.0


@dataclass(frozen=True)
class Bank:
    """M rollouts of one prompt, measured under one policy."""

    evidence: Evidence
    """Of the M rollouts, as one group; its squared norms are the diagonal of the kernel."""
    kernel: Tensor
    """K, [M, M] float64."""

    @property
    def rewards(self) -> Tensor:
        return self.evidence.rewards.double()

    @property
    def lengths(self) -> Tensor:
        """[M] sampled tokens."""
        return self.evidence.mask.sum(1).double()

    def plain(self) -> Bank:
        """The same rollouts with plain scores, from length-normalised ones."""
        lengths, norms = self.lengths, self.evidence.squared_score_norms
        assert norms is not None
        evidence = replace(self.evidence, squared_score_norms=norms * lengths.square().to(norms))
        return Bank(evidence, self.kernel * lengths * lengths[:, None])

    @property
    def log_weights(self) -> Tensor:
        """[M] of sequences, not truncated."""
        e = self.evidence
        return log_importance_weights(e.log_probs, e.behaviour_log_probs, e.mask).double()


# Weights and baselines


@dataclass(frozen=True)
class Weighting:
    """Importance weights as a group makes them, and as they are where the mean reward is known."""

    name: str
    importance: Importance

    def known(self, bank: Bank) -> Tensor:
        """[M] weights ω that depend on no group."""
        if isinstance(self.importance.shape, parts.Tapered):
            return taper(bank.log_weights, bank.rewards - bank.rewards.mean()).exp()
        return truncate(bank.log_weights, TRUNCATION).exp()


WEIGHTINGS = (
    Weighting("truncated", Importance(parts.SEQUENCE, parts.Truncated(TRUNCATION))),
    Weighting("tapered", Importance(parts.SEQUENCE, parts.Tapered())),
)


def _others(values: Tensor, groups: Tensor) -> Tensor:
    """[B] sum over the other members of each trajectory's group; members side by side."""
    table = values.view(int(groups[-1]) + 1, -1)
    size = table.shape[1]
    return (table @ (1 - torch.eye(size, dtype=table.dtype))).flatten()


def _others_optimal(evidence: Evidence, log_weights: Tensor) -> Tensor:
    """b_i = Σ_{j≠i} ω_j² ‖u_j‖² R_j / Σ_{j≠i} ω_j² ‖u_j‖²."""
    norms = evidence.required("squared_score_norms", "the optimal baseline of the others").double()
    omega = (2 * log_weights.double()).exp() * norms + 1e-300  # rollouts without any score: their mean
    return _others(omega * evidence.rewards.double(), evidence.groups) / _others(omega, evidence.groups)


def _other_half(evidence: Evidence, log_weights: Tensor) -> Tensor:
    """As ``split-half-optimal``, for groups of one even size, side by side: that one compares all pairs."""
    norms = evidence.required("squared_score_norms", "the split-half optimal baseline")
    table = torch.arange(len(norms)).view(int(evidence.groups[-1]) + 1, -1)
    halves = 2 * evidence.groups + (torch.arange(len(norms)) % 2)
    own = optimal_baseline(evidence.rewards, log_weights, norms, halves)
    return own[table.view(len(table), -1, 2).flip(-1)].flatten()


BASELINES = (
    parts.ZERO,
    parts.GROUP_MEAN,
    parts.LEAVE_ONE_OUT,
    parts.LENGTH_WEIGHTED,
    parts.OPTIMAL,
    Baseline("leave-one-out-optimal", "b* of the others", _others_optimal, needs_score_norms=True),
    replace(parts.SPLIT_HALF_OPTIMAL, values=_other_half),
    replace(parts.bounded_optimal(0.0), name="bounded-optimal 0"),
    replace(parts.bounded_optimal(0.1), name="bounded-optimal 0.1"),
    replace(parts.below_mean(0.1), name="below-mean 0.1"),
)


# Coefficients


def members_of(evidence: Evidence, members: Tensor) -> Evidence:
    """The evidence of D groups of G, side by side; ``members`` [D, G] are places in the bank."""
    flat = members.flatten()
    assert evidence.squared_score_norms is not None
    return Evidence(
        log_probs=evidence.log_probs[flat],
        behaviour_log_probs=evidence.behaviour_log_probs[flat],
        mask=evidence.mask[flat],
        rewards=evidence.rewards[flat],
        groups=torch.arange(len(members)).repeat_interleave(members.shape[1]),
        squared_score_norms=evidence.squared_score_norms[flat],
    )


def coefficients(
    drawn: Evidence, members: Tensor, size: int, importance: Importance, baseline: Baseline
) -> Tensor:
    """[D, M] the c of each group: ω (R − b) / G at its members, else 0. ``size`` is M."""
    log_weights, _ = importance(drawn)
    advantages = baseline(drawn, log_weights).advantages.double()
    values = (log_weights.double().exp() * advantages).view(members.shape) / members.shape[1]
    return values.new_zeros(len(members), size).scatter_add_(1, members, values)


def reference_coefficients(inside: Tensor, weights: Tensor, rewards: Tensor) -> Tensor:
    """[D, M] the r of the rollouts where ``inside`` [D, M]: ω (R − mean R) / (N − 1)."""
    kept = inside.double()
    count = kept.sum(1, keepdim=True)
    mean = (kept @ rewards)[:, None] / count
    return kept * weights * (rewards - mean) / (count - 1)


def inside_of(members: Tensor, size: int) -> Tensor:
    """[D, M] bool: which rollouts are members."""
    return torch.zeros(len(members), size, dtype=torch.bool).scatter_(1, members, True)


# Moments


def products(a: Tensor, kernel: Tensor, b: Tensor) -> Tensor:
    """[D] aᵀ K b of each row."""
    return ((a @ kernel) * b).sum(1)


@dataclass(frozen=True)
class Moments:
    """Means over groups of one prompt; divide sums over prompts by sums over prompts."""

    second: float
    """E‖ĝ‖²."""
    mean: float
    """‖E ĝ‖²."""
    drift: float
    """‖E ĝ − g‖²."""
    along: float
    """(E ĝ − g) · g."""
    cosine: float
    """Mean cosine of ĝ with the gradient of the rollouts outside the group; NaN if that is 0."""
    truth: float
    """E ĝ · g₀, g₀ the gradient of the expected reward."""


def product_of_gradients(
    bank: Bank, weights: Tensor, draws: int, random: torch.Generator, part: Tensor | float = 1.0
) -> float:
    """‖g‖², from pairs of halves of the bank; with ``part`` [M], the product of Σ part r u and g."""
    size = len(bank.kernel)
    order = torch.stack([torch.randperm(size, generator=random) for _ in range(draws)])
    inside = inside_of(order[:, : size // 2], size)
    first, second = (reference_coefficients(half, weights, bank.rewards) for half in (inside, ~inside))
    return float(products(part * first, bank.kernel, second).mean())


def moments(
    bank: Bank, group_size: int, draws: int, random: torch.Generator, truth: Tensor
) -> Mapping[tuple[str, str], Moments]:
    """By weighting and baseline, from ``draws`` pairs of disjoint groups. ``truth``: [M] u_i · g₀."""
    size = len(bank.kernel)
    order = torch.stack([torch.randperm(size, generator=random) for _ in range(draws)])
    members = torch.cat([order[:, :group_size], order[:, group_size : 2 * group_size]])
    drawn, inside = members_of(bank.evidence, members), inside_of(members, size)
    found = {}
    for weighting in WEIGHTINGS:
        known = weighting.known(bank)
        own, outside = (reference_coefficients(part, known, bank.rewards) for part in (inside, ~inside))
        towards = outside @ bank.kernel
        length = (towards * outside).sum(1)
        for baseline in BASELINES:
            c = coefficients(drawn, members, size, weighting.importance, baseline)
            found[weighting.name, baseline.name] = _moments(bank.kernel, c, c - own, towards, length, truth)
    return found


def _moments(kernel: Tensor, c: Tensor, d: Tensor, towards: Tensor, length: Tensor, truth: Tensor) -> Moments:
    turned = c @ kernel
    squares = (turned * c).sum(1)
    seen = length > 0
    scale = (squares * length).sqrt()
    cosines = torch.where(scale > 0, (towards * c).sum(1) / scale, 0.0)[seen]
    half = len(c) // 2
    return Moments(
        second=float(squares.mean()),
        mean=float((turned[:half] * c[half:]).sum(1).mean()),
        drift=float(products(d[:half], kernel, d[half:]).mean()),
        along=float((towards * d).sum(1).mean()),
        cosine=float(cosines.mean()) if seen.any() else torch.nan,
        truth=float((c @ truth).mean()),
    )
