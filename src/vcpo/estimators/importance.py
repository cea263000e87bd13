"""Importance weights of the learner's policy π against the behaviour policy μ, in log space.

Three levels: the ratio of one token, the weight of a sequence (their product), and its
length-normalised form (their geometric mean). Limiting a weight (:func:`truncate`) and rejecting a
trajectory (:func:`keep_within`) are separate steps, so that an ESS can be taken of the unlimited weights
while the update uses limited ones.

Nothing here takes ``exp``: a sequence weight of a few hundred nats is an ordinary number until then.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vcpo.errors import ConfigError
from vcpo.estimators.checks import require_finite, require_same_shape, upcast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def log_ratios(
    log_probs: Float[Tensor, "B T"],
    behaviour_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Log-ratio of every sampled token.

    log ρ_{i,t} = log π(y_t) − log μ(y_t)  where ``mask``, else exactly 0.

    Inputs are in nats. Values outside the mask (prompt, observations, padding) never matter, forward or
    backward, even when they are infinite or NaN. Nothing is normalised. Gradient flows to both inputs
    inside the mask.

    Raises:
        NonFiniteError: a log-probability inside the mask is not finite; names the trajectory.
        VcpoError: the shapes differ.
    """
    require_same_shape(log_probs=log_probs, behaviour_log_probs=behaviour_log_probs, mask=mask)
    # Chosen before the subtraction: a NaN that is only masked afterwards would still reach the gradient.
    learner = torch.where(mask.bool(), upcast(log_probs), 0.0)
    behaviour = torch.where(mask.bool(), upcast(behaviour_log_probs), 0.0)
    require_finite(learner, "learner log-probability", "the policy is broken or cannot produce this token")
    require_finite(behaviour, "behaviour log-probability", "the sampler recorded an unusable number")
    return learner - behaviour


def log_importance_weights(
    log_probs: Float[Tensor, "B T"],
    behaviour_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """Log of the importance weight of every trajectory: the sum of its tokens' log-ratios.

    log w_i = Σ_t log ρ_{i,t}; 0 for an empty answer. VCPO (arXiv 2602.17616) takes the ESS of these.
    Not normalised. Gradient and errors as in :func:`log_ratios`.
    """
    return log_ratios(log_probs, behaviour_log_probs, mask).sum(-1)


def length_normalised_log_weights(
    log_probs: Float[Tensor, "B T"],
    behaviour_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """Log of the geometric mean of a trajectory's ratios, as GSPO (arXiv 2507.18071) uses it.

    log w_i / L_i with L_i the tokens inside the mask; 0 for an empty answer. Not a true importance weight:
    an estimator that uses it is biased. Gradient and errors as in :func:`log_ratios`.
    """
    lengths = mask.sum(-1).clamp(min=1)
    return log_importance_weights(log_probs, behaviour_log_probs, mask) / lengths


def truncate(log_weights: Float[Tensor, " ..."], ceiling: float) -> Float[Tensor, " ..."]:
    """Log of min(w, ceiling), at any level.

    ``ceiling`` is a weight, not a log-weight. Gradient flows where the weight is below the ceiling.

    Raises:
        ConfigError: the ceiling is not a positive number.
        NonFiniteError: a log-weight is not finite; names the trajectory.
    """
    if not ceiling > 0:
        raise ConfigError(f"the truncation of importance weights must be positive, got {ceiling}")
    return require_finite(upcast(log_weights), "log-weight").clamp(max=math.log(ceiling))


def taper(
    log_weights: Float[Tensor, " B"],
    excess: Float[Tensor, " B"],
    above: tuple[float, float] = (1.0, 1.0),
    below: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, " B"]:
    """Log of w clipped into ``above`` where the reward exceeds its reference, into ``below`` elsewhere.

    TOPR, arXiv 2503.14286, with its canonical limits: successes keep weight 1 whatever their probability has
    become, failures the weight min(w, 1). ``excess`` [B] is the reward minus the reference; limits are
    weights, not log-weights, with 0 ≤ low ≤ high. Not an unbiased estimator off-policy. Gradient flows where
    the weight is inside its limits.

    Raises:
        ConfigError: not 0 ≤ low ≤ high with high positive.
        NonFiniteError: a log-weight is not finite; names the trajectory.
    """
    values = require_finite(upcast(log_weights), "log-weight")
    return torch.where(excess.detach() > 0, _clip(values, *above), _clip(values, *below))


def _clip(log_weights: Tensor, low: float, high: float) -> Tensor:
    if not (0 <= low <= high and high > 0):
        raise ConfigError(f"weights are clipped into 0 <= low <= high, got low {low} and high {high}")
    return log_weights.clamp(math.log(low) if low > 0 else -math.inf, math.log(high))


def soften(
    log_weights: Float[Tensor, " ..."],
    excess: Float[Tensor, " B"],
    above: tuple[float, float] = (2.0, 3.0),
    below: tuple[float, float] = (3.0, 2.0),
) -> Float[Tensor, " ..."]:
    """Log of φ(w) = w^k e^(λ(1−w)): 1 at w = 1, and falling to 0 for small and for large weights.

    VESPO, arXiv 2602.10693: (k, λ) are ``above`` where the reward exceeds its reference, else ``below``. φ
    has its largest value at w = k/λ. Values below e^−10000 are e^−10000. No gradient: the weight of a policy
    gradient.

    Raises:
        NonFiniteError: a log-weight is not finite; names the trajectory.
    """
    values = require_finite(upcast(log_weights.detach()), "log-weight")
    first = (excess.detach() > 0).view(-1, *[1] * (values.dim() - 1))
    k, decay = (torch.where(first, a, b).to(values) for a, b in zip(above, below, strict=True))
    weights = values.clamp(max=80.0).exp()  # beyond, φ is 0 in any number type
    return (k * values + decay * (1 - weights)).clamp(min=_LEAST)


_LEAST = -1e4


def keep_within(log_weights: Float[Tensor, " ..."], low: float, high: float) -> Bool[Tensor, " ..."]:
    """True where low ≤ w ≤ high: the rejection of masked importance sampling, at any level.

    ``low`` and ``high`` are weights, not log-weights; ``low`` may be 0. No gradient.

    Raises:
        ConfigError: not 0 ≤ low ≤ high with high positive.
        NonFiniteError: a log-weight is not finite; names the trajectory.
    """
    if not (0 <= low <= high and high > 0):
        raise ConfigError(f"weights are kept within 0 <= low <= high, got low {low} and high {high}")
    values = require_finite(upcast(log_weights.detach()), "log-weight")
    floor = math.log(low) if low > 0 else -math.inf
    return (values >= floor) & (values <= math.log(high))
