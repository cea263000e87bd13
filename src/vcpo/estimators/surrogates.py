"""Surrogates: the coefficient of every token in a policy gradient.

Every update here is Σ_{i,t} n_i c_{i,t} ∇log π(y_{i,t}), with a *detached* coefficient c and a normaliser n_i
(:mod:`vcpo.estimators.aggregation`). So the loss of any surrogate is −Σ n_i sg(c_{i,t}) log π(y_{i,t}): its
value is not the paper's objective, its gradient is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vcpo.errors import ConfigError, VcpoError
from vcpo.estimators.checks import OVERFLOW_HINT, require_finite, require_same_shape, upcast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def policy_gradient_coefficients(
    log_weights: Float[Tensor, " B"] | Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """REINFORCE with stop-gradient weights: c_{i,t} = exp(log w) · A_i where ``mask``, else 0.

    ``log_weights`` and ``advantages`` are of a sequence [B] or of a token [B, T], the weights truncated by
    the caller if at all. This is the
    gradient of the loss of VCPO (arXiv 2602.17616) and of TIS. A zero advantage gives exactly 0, whatever
    the weight. Not normalised. No gradient: inputs are detached.

    Raises:
        NonFiniteError: a log-weight or advantage is not finite, or an untruncated weight overflows.
        VcpoError: the shapes do not fit.
    """
    return _product(_per_token(log_weights, mask), advantages, mask)


def ppo_clip_coefficients(
    log_ratios: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    low: float = 0.2,
    high: float = 0.2,
) -> Float[Tensor, "B T"]:
    """PPO's clipped objective as a coefficient, exactly.

    The gradient of min(r A, clip(r, 1 − low, 1 + high) A) with respect to log π: r · A where the unclipped
    term is the least, 0 where the clipped one is (:func:`ppo_clip_active`). PPO, arXiv 1707.06347, eq. 7;
    unequal bounds as in DAPO, arXiv 2503.14476. Not normalised. No gradient: inputs are detached.

    Raises:
        NonFiniteError: a log-ratio inside the mask or an advantage is not finite, or a ratio overflows.
        ConfigError: not 0 ≤ low < 1 with high ≥ 0.
        VcpoError: the shapes do not fit.
    """
    active = ppo_clip_active(log_ratios, advantages, mask, low, high)
    return _product(_per_token(log_ratios, mask), advantages, mask & ~active)


def ppo_clip_active(
    log_ratios: Float[Tensor, "B T"] | Float[Tensor, " B"],
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> Bool[Tensor, "B T"]:
    """True where PPO's clip stops the gradient: r > 1 + high with A > 0, or r < 1 − low with A < 0.

    ``dual``: also where r > dual with A < 0, the dual clip of arXiv 1912.09729. Ratios of sequences, [B],
    are clipped as GSPO does (arXiv 2507.18071). Errors as in :func:`ppo_clip_coefficients`.
    """
    if not (0 <= low < 1 and high >= 0):
        raise ConfigError(f"PPO clips to [1 - low, 1 + high], 0 <= low < 1, high >= 0; got {low} and {high}")
    if dual is not None and not dual > 1:
        raise ConfigError(f"the dual clip is a ratio above 1, got {dual}")
    ratios = _per_token(log_ratios, mask)
    gain = _gain(advantages, mask)
    too_high = (gain > 0) & (ratios > math.log1p(high))
    too_low = (gain < 0) & (ratios < math.log1p(-low))
    if dual is not None:
        too_low |= (gain < 0) & (ratios > math.log(dual))
    return mask.bool() & (too_high | too_low)


LARGEST_INVERSE = 10.0
"""Bound of −log ρ in the trust-region term, as in the authors' code of P3O."""


def kl_coefficients(log_ratios: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Coefficients whose update draws π to μ: 1/ρ_t − 1 where ``mask``, 1/ρ at most e^10.

    Minus the gradient of log ρ + 1/ρ − 1, the estimator of KL(π ‖ μ) called k3, by log π. It is the
    trust-region term of P3O as in its authors' code (FeynRL; the paper is arXiv 2605.12380), which the caller
    multiplies by 1 − ESS ratio. k3 is unbiased for tokens of π; these are of μ, for which ρ log ρ would be,
    with coefficients that have no bound where ρ is large. Not normalised. No gradient.

    Raises:
        NonFiniteError: a log-ratio inside the mask is not finite; names the trajectory.
    """
    return torch.expm1((-_per_token(log_ratios, mask)).clamp(max=LARGEST_INVERSE))


def _per_token(log_weights: Tensor, mask: Tensor) -> Tensor:
    """[B, T] detached log-weights, finite, 0 outside the mask."""
    values = upcast(log_weights.detach())
    if values.dim() == 1:
        require_finite(values, "log-weight")
        return values[:, None].expand(mask.shape)
    require_same_shape(log_weights=log_weights, mask=mask)
    return require_finite(torch.where(mask.bool(), values, 0.0), "log-weight")


def _product(log_weights: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """exp(log w) · A where the mask and the advantage are not zero; exactly 0 elsewhere."""
    gain = _gain(advantages, mask)
    # 0 · e^1000 would be NaN: a zero advantage never meets its weight.
    product = torch.where(mask.bool() & (gain != 0), log_weights.exp() * gain, 0.0)
    return require_finite(product, "importance weight times advantage", OVERFLOW_HINT)


def _gain(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, 1] or [B, T] detached advantages, finite; of a token, 0 outside the mask."""
    gain = upcast(advantages.detach())
    if gain.dim() == 1 and gain.shape == mask.shape[:1]:
        return require_finite(gain, "advantage")[:, None]
    if gain.shape != mask.shape:
        raise VcpoError(f"{tuple(advantages.shape)} advantages for a mask of shape {tuple(mask.shape)}")
    return require_finite(torch.where(mask.bool(), gain, 0.0), "advantage")
