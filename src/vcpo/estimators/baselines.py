"""Baselines: what is subtracted from the rewards of one prompt's group before they weigh a gradient.

**The optimal baseline** (OPOB; VCPO, arXiv 2602.17616). The update is ĝ = Σ_i ω_i (R_i − b) u_i, with ω_i the
weight that multiplies trajectory i and u_i its (length-normalised) score. Its second moment depends on b
through E[ω² ‖u‖² (R − b)²]; the derivative is zero at

    b* = Σ ω_i² ‖u_i‖² R_i / Σ ω_i² ‖u_i‖²        over the group

With untruncated weights E[ω u] = 0, the mean of ĝ does not move with b, and the least second moment is the
least variance. With truncated weights E[ω u] ≠ 0: b* is then the minimum of the second moment, not of the
variance. Either way b* contains its own trajectory, so a small group has a bias that the leave-one-out
mean has not.

Departures from the official code:

- ω is given once, by the caller, as the log of the *same* weights that the update uses: truncated if the
  update truncates. There w is counted twice, and the baseline leaves it untruncated where the update does
  not: optimal for another estimator than the one used.
- ‖u‖² is of the *same* quantity that the update uses. There the update divides by the length and the
  baseline multiplies it back in. Factors that a group has in common, such as 1/std, cancel.
- No absolute epsilon, and log space throughout: tiny or huge weights and norms give the same b* as ordinary
  ones. Equal rewards give exactly zero advantage, because every baseline here is a member's reward plus a
  mean of differences to it.
- An infinite norm is an error that names the trajectory, not a NaN baseline.

All baselines are constants to the gradient: inputs are detached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vcpo.errors import VcpoError
from vcpo.estimators.checks import require_finite, require_same_shape, upcast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class _Grouped:
    """Rewards as differences to one member of their group (its least reward), in float64."""

    index: Tensor  # [B] place of each trajectory's group among the K groups
    counts: Tensor  # [K]
    reference: Tensor  # [B] reward of the reference member
    differences: Tensor  # [B] reward minus reference: exactly 0 where a group's rewards are equal

    def total(self, values: Tensor) -> Tensor:
        """[B] sum of the values over each trajectory's group."""
        sums = values.new_zeros(len(self.counts)).index_add_(0, self.index, values)
        return sums[self.index]

    def size(self) -> Tensor:
        """[B] members of each trajectory's group."""
        return self.counts[self.index]


def _largest(values: Tensor, index: Tensor, groups: int) -> Tensor:
    peaks = values.new_empty(groups).scatter_reduce_(0, index, values, "amax", include_self=False)
    return peaks[index]


def _grouped(rewards: Tensor, groups: Tensor) -> _Grouped:
    require_same_shape(rewards=rewards, groups=groups)
    values = require_finite(rewards.detach().double(), "reward")
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    reference = -_largest(-values, index, len(counts))
    return _Grouped(index, counts, reference, values - reference)


def optimal_baseline(
    rewards: Float[Tensor, " B"],
    log_weights: Float[Tensor, " B"],
    squared_score_norms: Float[Tensor, " B"],
    groups: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """The off-policy optimal baseline, one value a group, repeated over its members.

    b* = R_ref + Σ ω² ‖u‖² (R − R_ref) / Σ ω² ‖u‖²; the module says why, and where it departs from the
    official code (VCPO, arXiv 2602.17616).

    ``log_weights``: log of the weights ω the update uses, of any magnitude. ``squared_score_norms``: ‖u‖² ≥ 0
    of the quantity the update uses. ``groups``: integer ids, in any order. The weighting is normalised
    here, within each group; a group whose norms are all 0 gets its mean. No gradient.

    Raises:
        NonFiniteError: a reward, log-weight or norm is not finite; names the trajectory.
        VcpoError: a squared norm is negative, or the shapes differ.
    """
    require_same_shape(rewards=rewards, log_weights=log_weights, squared_score_norms=squared_score_norms)
    group = _grouped(rewards, groups)
    log_omega = _log_squared(log_weights, squared_score_norms)
    peak = _largest(log_omega, group.index, len(group.counts))
    omega = torch.where(peak.isfinite(), (log_omega - peak).exp(), 1.0)  # peak −∞: every norm is 0
    baseline = group.reference + group.total(omega * group.differences) / group.total(omega)
    return baseline.to(upcast(rewards).dtype)


def _log_squared(log_weights: Tensor, squared_norms: Tensor) -> Tensor:
    """[B] log of ω² ‖u‖² in float64; −∞ where the norm is 0."""
    weights = require_finite(log_weights.detach().double(), "log-weight")
    norms = require_finite(squared_norms.detach().double(), "squared score norm")
    if (norms < 0).any():
        index = int((norms < 0).nonzero()[0, 0])
        raise VcpoError(f"squared score norm {float(norms[index])} at trajectory index {index} is negative")
    return 2 * weights + norms.log()


def split_half_optimal(
    rewards: Float[Tensor, " B"],
    log_weights: Float[Tensor, " B"],
    squared_score_norms: Float[Tensor, " B"],
    groups: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """:func:`optimal_baseline` of the *other* half of each group: independent of the trajectory, as
    leave-one-out is, so it neither shrinks nor biases what it is subtracted from.

    A group's members are dealt out in turn, in their order. A half without any score, or a group of one,
    gets the optimum of the whole group. Arguments and errors as of :func:`optimal_baseline`. No gradient.
    """
    require_same_shape(rewards=rewards, groups=groups)
    _, index = groups.unique(return_inverse=True)
    # Place of each trajectory within its group, by counting equal ids before it.
    places = (index[:, None] == index[None, :]).tril(-1).sum(-1)
    halves = 2 * index + places % 2
    own = optimal_baseline(rewards, log_weights, squared_score_norms, halves)
    scored = squared_score_norms.detach() > 0
    result = optimal_baseline(rewards, log_weights, squared_score_norms, groups)
    for half in halves.unique().tolist():
        other = halves == (half ^ 1)
        if bool((other & scored).any()):
            result = torch.where(halves == half, own[other][0], result)
    return result


def length_weighted(
    rewards: Float[Tensor, " B"], action_counts: Int[Tensor, " B"], groups: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """b = Σ L R / Σ L over the group, L the sampled tokens.

    OPO, arXiv 2505.23585: the optimal baseline on-policy if the scores of a trajectory's tokens are
    orthogonal and of one size, so that ‖s‖² ∝ L. A group without tokens gets its mean. No gradient; errors
    as in :func:`optimal_baseline`.
    """
    lengths = upcast(action_counts)
    return optimal_baseline(rewards, torch.zeros_like(lengths), lengths, groups)


def optimal_token_baseline(
    rewards: Float[Tensor, " B"],
    log_weights: Float[Tensor, " B"] | Float[Tensor, "B T"],
    energies: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    groups: Int[Tensor, " B"],
) -> Float[Tensor, "B T"]:
    """OTB, a baseline for each place t in the answer: b_t = Σ_i W_it R_i / Σ_i W_it.

    W_t = Σ_{j≤t} w_j² (1 − 2π(y_j) + Σ_v π(v)²) is the energy of the weighted score up to t, with respect to
    the logits; the sum is over the members of the group that have a token t. arXiv 2602.07078, the weights
    inside the sum as in verl; the return of a token is that of the episode, as only its end is rewarded.
    ``energies`` [B, T] are 1 − 2π(y) + Σ_v π(v)², outside the mask without meaning. ``log_weights``: those
    the update uses. 0 outside the mask. No gradient.

    Raises:
        NonFiniteError: a reward, log-weight or energy inside the mask is not finite; names the trajectory.
        VcpoError: the shapes differ.
    """
    require_same_shape(energies=energies, mask=mask)
    group = _grouped(rewards, groups)
    inside = mask.bool()
    terms = require_finite(torch.where(inside, energies.detach().double(), 0.0), "logit energy")
    weights = log_weights.detach().double()
    weights = weights[:, None].expand(mask.shape) if weights.dim() == 1 else torch.where(inside, weights, 0.0)
    require_finite(weights, "log-weight")
    of_tokens = torch.where(inside, 2 * weights + terms.clamp(min=0).log(), -torch.inf)
    log_omega = torch.where(inside, of_tokens.logcumsumexp(-1), -torch.inf)
    baseline = torch.zeros_like(log_omega)
    for place in range(mask.shape[1]):  # _largest and total are over one number a trajectory
        peak = _largest(log_omega[:, place], group.index, len(group.counts))
        omega = torch.where(
            peak.isfinite(), (log_omega[:, place] - peak).exp(), inside[:, place].to(peak.dtype)
        )
        share = group.total(omega * group.differences) / group.total(omega).clamp(min=1e-300)
        baseline[:, place] = group.reference + share
    return torch.where(inside, baseline, 0.0).to(upcast(rewards).dtype)


def zero_baseline(rewards: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """No baseline: b = 0. The advantage is the reward. Errors as in :func:`group_mean`."""
    _grouped(rewards, groups)
    return torch.zeros_like(upcast(rewards))


def group_mean(rewards: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Mean reward of each trajectory's group: b = Σ R / G.

    GRPO, arXiv 2402.03300. It contains the trajectory's own reward, which shrinks the expected update by
    1 − 1/G and does not turn it. No gradient.

    Raises:
        NonFiniteError: a reward is not finite; names the trajectory.
        VcpoError: the shapes differ.
    """
    group = _grouped(rewards, groups)
    baseline = group.reference + group.total(group.differences) / group.size()
    return baseline.to(upcast(rewards).dtype)


def leave_one_out(rewards: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Mean reward of the *others* in the group: b_i = Σ_{j≠i} R_j / (G − 1).

    RLOO, arXiv 2402.14740: independent of trajectory i, hence unbiased. No gradient.

    Raises:
        NonFiniteError: a reward is not finite; names the trajectory.
        VcpoError: a group has a single member, or the shapes differ.
    """
    group = _grouped(rewards, groups)
    if (group.size() < 2).any():
        index = int((group.size() < 2).nonzero()[0, 0])
        raise VcpoError(f"trajectory index {index} is alone in its group; leave-one-out needs two members")
    others = group.total(group.differences) - group.differences
    return (group.reference + others / (group.size() - 1)).to(upcast(rewards).dtype)


def group_std(rewards: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Sample standard deviation (divisor G − 1) of the rewards of each trajectory's group.

    GRPO, arXiv 2402.03300. Exactly 0 for equal rewards and for a single member. No gradient; errors as in
    :func:`group_mean`.
    """
    group = _grouped(rewards, groups)
    deviations = group.differences - group.total(group.differences) / group.size()
    variance = group.total(deviations**2) / (group.size() - 1).clamp(min=1)
    return variance.sqrt().to(upcast(rewards).dtype)
