"""Effective sample size (ESS) of a minibatch, and the step scale that follows from it.

    ESS = (Σ w_i)² / Σ w_i²        ρ = ESS / B        η_eff = η · sqrt(min(1, ρ / ρ_on))

VCPO, arXiv 2602.17616: of the sequence-level, *untruncated* weights of the whole optimizer minibatch, even
where the loss truncates them. sqrt is the rule for optimizers of Adam's type, linear the one for SGD.

Departures from the official code: weights are shifted by their maximum before ``exp`` and no absolute
epsilon is added, so that weights all near 1e-6 (or e^1000) have the ratio of equal weights, 1; a NaN is an
error, where ``min(1, nan)`` gave the full step; many ranks exchange three scalars instead of every token's
log-probabilities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from vcpo.errors import ConfigError, NonFiniteError, VcpoError
from vcpo.estimators.checks import require_finite

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor

StepRule = Literal["sqrt", "linear", "off"]

_RULES = {"sqrt": math.sqrt, "linear": float, "off": lambda fraction: 1.0}
_ROUNDING = 1e-6  # a ratio computed in float32 elsewhere may exceed 1 by this much


def _checked(log_weights: Tensor) -> Tensor:
    if log_weights.dim() != 1:
        raise VcpoError(f"the ESS needs one log-weight a trajectory, got shape {tuple(log_weights.shape)}")
    hint = "leave rejected trajectories out instead of giving them weight 0"
    return require_finite(log_weights.double(), "log-weight", hint)


def effective_sample_size(log_weights: Float[Tensor, " B"]) -> Float64[Tensor, ""]:
    """How many equally weighted trajectories the minibatch is worth, between 1 and B.

    ESS = (Σ w)² / Σ w², exact for weights of any magnitude: computed in float64 after a shift by the
    maximum, which cancels. VCPO, arXiv 2602.17616. Gradient flows to the log-weights.

    Raises:
        NonFiniteError: a log-weight is not finite; names the trajectory.
        VcpoError: there is no trajectory, or more than one dimension.
    """
    values = _checked(log_weights)
    if not len(values):
        raise VcpoError("the ESS of no trajectories is undefined; skip the step")
    weights = (values - values.detach().max()).exp()
    return (weights.sum() ** 2 / (weights**2).sum()).clamp(1, len(values))


def ess_ratio(log_weights: Float[Tensor, " B"]) -> Float64[Tensor, ""]:
    """ρ = ESS / B, between 1/B and 1. Gradient and errors as in :func:`effective_sample_size`."""
    return effective_sample_size(log_weights) / len(log_weights)


def ess_partials(log_weights: Float[Tensor, " B"]) -> Float64[Tensor, " 3"]:
    """What one rank contributes to the ESS of all ranks: (log Σ w, log Σ w², count).

    A rank without trajectories contributes (−∞, −∞, 0). *Gather* these rows, do not add them up.
    Gradient flows to the log-weights; errors as in :func:`effective_sample_size`.
    """
    values = _checked(log_weights)
    count = values.new_tensor(float(len(values)))
    return torch.stack([values.logsumexp(0), (2 * values).logsumexp(0), count])


def _combined(partials: Tensor) -> tuple[Tensor, Tensor]:
    """ESS and number of trajectories over all ranks."""
    rows = partials.double()
    if rows.dim() != 2 or rows.shape[1] != 3:
        raise VcpoError(f"ESS partials have shape [ranks, 3], got {tuple(rows.shape)}")
    rows = rows[rows[:, 2] != 0]
    if not rows.isfinite().all():
        raise NonFiniteError("ESS partials", None, "a rank sent log-weights that are not finite")
    if not len(rows):
        raise VcpoError("the ESS of no trajectories is undefined; skip the step")
    count = rows[:, 2].sum()
    size = (2 * rows[:, 0].logsumexp(0) - rows[:, 1].logsumexp(0)).exp()
    return torch.minimum(size.clamp(min=1), count), count


def ess_from_partials(partials: Float[Tensor, "ranks 3"]) -> Float64[Tensor, ""]:
    """ESS of the trajectories of all ranks, from one row of :func:`ess_partials` a rank.

    Gradient flows to the partials.

    Raises:
        NonFiniteError: a rank that has trajectories sent something that is not finite.
        VcpoError: no rank has a trajectory, or the shape is not [ranks, 3].
    """
    return _combined(partials)[0]


def ess_ratio_from_partials(partials: Float[Tensor, "ranks 3"]) -> Float64[Tensor, ""]:
    """ρ = ESS / B over all ranks; gradient and errors as in :func:`ess_from_partials`."""
    size, count = _combined(partials)
    return size / count


def step_scale(
    ess_ratio: float | Float[Tensor, ""],
    on_policy_ratio: float = 1.0,
    rule: StepRule = "sqrt",
) -> Float64[Tensor, ""]:
    """Factor of the learning rate, never above 1.

    sqrt(min(1, ρ / ρ_on)); ``linear`` drops the square root, ``off`` is always 1. VCPO, arXiv 2602.17616.
    ``on_policy_ratio`` ρ_on is the ESS ratio of on-policy data, below 1 where the sampler's numerics differ
    from the learner's. No gradient: a step size is not optimised. Optimizers want ``float(step_scale(...))``.

    Raises:
        NonFiniteError: the ratio is NaN or infinite, whatever the rule.
        VcpoError: the ratio is outside [0, 1].
        ConfigError: ρ_on is outside (0, 1], or the rule is unknown.
    """
    ratio = float(ess_ratio)
    if rule not in _RULES:
        raise ConfigError(f"unknown step-scale rule {rule!r}; use one of {', '.join(_RULES)}")
    if not 0 < on_policy_ratio <= 1:
        raise ConfigError(f"on_policy_ratio must be in (0, 1], got {on_policy_ratio}")
    if not math.isfinite(ratio):
        raise NonFiniteError("ESS ratio", None, "no step can be scaled by it")
    if not 0 <= ratio <= 1 + _ROUNDING:
        raise VcpoError(f"an ESS ratio is between 0 and 1, got {ratio}; divide the ESS by the batch size")
    return torch.tensor(_RULES[rule](min(1.0, ratio / on_policy_ratio)), dtype=torch.float64)
