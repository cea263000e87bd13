"""Advantages and targets from a critic: GAE and V-trace, in the order of a trajectory's sampled tokens.

A step is one sampled token; observations between two are part of the world. V_t is the critic's value before
token t, from what the policy saw then. The only reward is that of the episode, on its last sampled token;
after it the value is 0. Tensors are [B, T] with the sampled tokens first (``mask`` true on the first L_i of
row i). float64 inside; results 0 outside the mask; no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vcpo.errors import ConfigError, VcpoError
from vcpo.estimators.checks import require_finite, require_same_shape, upcast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def gae(
    rewards: Float[Tensor, " B"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discount: float = 1.0,
    decay: float = 1.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and value targets.

    A_t = Σ_l (γλ)^l δ_{t+l},  δ_t = r_t + γ V_{t+1} − V_t,  target = A_t + V_t

    GAE, arXiv 1506.02438, eq. 16; γ is ``discount``, λ is ``decay``. With γ = λ = 1, PPO's usual choice for
    language models, A_t = R − V_t and the target is R.

    Raises:
        NonFiniteError: a reward or a value inside the mask is not finite; names the trajectory.
        ConfigError: γ or λ is outside [0, 1].
        VcpoError: the shapes do not fit, or sampled tokens do not come first.
    """
    _check_range(discount=discount, decay=decay)
    steps, known, following = _prepared(rewards, values, mask)
    deltas = steps + discount * following - known
    advantages = torch.zeros_like(known)
    running = known.new_zeros(len(known))
    for t in reversed(range(known.shape[1])):
        running = torch.where(mask[:, t].bool(), deltas[:, t] + discount * decay * running, 0.0)
        advantages[:, t] = running
    return _results(advantages, known, mask, values)


def vtrace(
    rewards: Float[Tensor, " B"],
    values: Float[Tensor, "B T"],
    log_ratios: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discount: float = 1.0,
    ratio_ceiling: float = 1.0,
    trace_ceiling: float = 1.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and value targets v_s, corrected for the behaviour policy.

    v_s = V_s + Σ_{t≥s} γ^(t−s) (Π_{j=s}^{t−1} c_j) ρ_t δ_t,  A_s = r_s + γ v_{s+1} − V_s

    with ρ_t = min(``ratio_ceiling``, π/μ), c_t = min(``trace_ceiling``, π/μ), δ as in :func:`gae`. V-trace
    (IMPALA, arXiv 1802.01561, eq. 1 and section 4.2). The policy gradient's own weight ρ_s is *not* in A: the
    update has it as its importance weight. Log-ratios outside the mask never matter.

    Raises:
        NonFiniteError, VcpoError: as in :func:`gae`.
        ConfigError: γ is outside [0, 1], a ceiling is not positive, or c's is above ρ's.
    """
    _check_range(discount=discount)
    if not 0 < trace_ceiling <= ratio_ceiling:
        raise ConfigError(
            f"V-trace needs 0 < trace ceiling <= ratio ceiling, got {trace_ceiling} and {ratio_ceiling}"
        )
    steps, known, following = _prepared(rewards, values, mask)
    ratios = torch.where(mask.bool(), log_ratios.detach().double(), 0.0)
    require_finite(ratios, "log-ratio")
    weights = ratios.clamp(max=700.0).exp()
    rho, trace = weights.clamp(max=ratio_ceiling), weights.clamp(max=trace_ceiling)
    deltas = rho * (steps + discount * following - known)
    corrections = torch.zeros_like(known)  # v − V
    running = known.new_zeros(len(known))
    for t in reversed(range(known.shape[1])):
        running = torch.where(mask[:, t].bool(), deltas[:, t] + discount * trace[:, t] * running, 0.0)
        corrections[:, t] = running
    targets = known + corrections
    beyond = torch.cat([targets[:, 1:], targets.new_zeros(len(targets), 1)], 1)
    advantages = steps + discount * beyond - known
    return (
        torch.where(mask.bool(), advantages, 0.0).to(upcast(values).dtype),
        torch.where(mask.bool(), targets, 0.0).to(upcast(values).dtype),
    )


def _prepared(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T] float64: reward of each step, its value, the value after it."""
    require_same_shape(values=values, mask=mask)
    if rewards.shape != mask.shape[:1]:
        raise VcpoError(f"{tuple(rewards.shape)} rewards for a mask of shape {tuple(mask.shape)}")
    inside = mask.bool()
    if (inside[:, 1:] & ~inside[:, :-1]).any():
        raise VcpoError("a critic's steps are the sampled tokens: they come first in their row, without gaps")
    known = torch.where(inside, values.detach().double(), 0.0)
    require_finite(known, "value")
    ends = require_finite(rewards.detach().double(), "reward")
    last = inside & ~torch.cat([inside[:, 1:], inside.new_zeros(len(inside), 1)], 1)
    following = torch.cat([known[:, 1:], known.new_zeros(len(known), 1)], 1)
    return torch.where(last, ends[:, None], 0.0), known, following


def _results(advantages: Tensor, known: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    number_type = upcast(values).dtype
    targets = torch.where(mask.bool(), advantages + known, 0.0)
    return advantages.to(number_type), targets.to(number_type)


def _check_range(**named: float) -> None:
    for name, value in named.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is between 0 and 1, got {value}")
