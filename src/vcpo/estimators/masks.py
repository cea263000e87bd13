"""Token masks: which tokens are left out of an update, judged over a whole minibatch.

Masks of importance weights alone are in :mod:`vcpo.estimators.importance` (``keep_within``) and
:mod:`vcpo.estimators.surrogates` (PPO's clip). All are bool, [B, T], true where a token is kept, false
outside the mask of sampled tokens. No gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vcpo.errors import ConfigError
from vcpo.estimators.checks import require_finite, require_same_shape, upcast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def second_moment(
    log_ratios: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"],
    threshold: float = 0.04,
) -> Bool[Tensor, "B T"]:
    """M2PO: leave out the largest (log ρ_t)² until the mean of those left is at most ``threshold``.

    arXiv 2510.01161. Only tokens that PPO could clip are candidates, ρ > 1 with A > 0 or ρ < 1 with A < 0;
    the others stay and count. If the mean is still too large without any candidate, all candidates are left
    out. Means are over the tokens of the whole minibatch.

    Raises:
        NonFiniteError: a log-ratio inside the mask is not finite; names the trajectory.
        ConfigError: the threshold is not positive.
        VcpoError: the shapes do not fit.
    """
    if not threshold > 0:
        raise ConfigError(f"the threshold of the second moment must be positive, got {threshold}")
    require_same_shape(log_ratios=log_ratios, mask=mask)
    inside = mask.bool()
    ratios = require_finite(torch.where(inside, upcast(log_ratios.detach()), 0.0), "log-ratio").double()
    gain = advantages.detach() if advantages.dim() == 2 else advantages.detach()[:, None]
    squares = ratios.square()
    candidates = inside & (ratios * gain > 0)
    ordered, places = squares[candidates].sort()
    fixed, fixed_count = squares[inside & ~candidates].sum(), int((inside & ~candidates).sum())
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)]) + fixed
    counts = torch.arange(len(ordered) + 1, device=sums.device) + fixed_count
    fits = sums <= threshold * counts
    # The mean need not rise with every candidate that is let in: the largest set that fits counts.
    allowed = int(fits.nonzero().max()) if fits.any() else 0
    chosen = torch.zeros(len(ordered), dtype=torch.bool, device=sums.device)
    chosen[places[:allowed]] = True
    kept = inside & ~candidates
    kept[candidates] = chosen
    return kept


def not_spurious(
    log_probs: Float[Tensor, "B T"],
    entropies: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"],
    probability: float = 0.002,
    percentile: float = 0.80,
) -> Bool[Tensor, "B T"]:
    """STAPO: leave out a token iff A > 0, π(y_t) < ``probability`` and H_t below the ``percentile`` quantile.

    arXiv 2602.15620 (first version). π and H are the learner's current ones; the quantile is of the entropies
    of all sampled tokens of the minibatch, ties not below.

    Raises:
        NonFiniteError: an entropy or log-probability inside the mask is not finite; names the trajectory.
        ConfigError: probability or percentile is outside [0, 1].
        VcpoError: the shapes do not fit.
    """
    if not (0 <= probability <= 1 and 0 <= percentile <= 1):
        raise ConfigError(
            f"probability and percentile are between 0 and 1, got {probability} and {percentile}"
        )
    require_same_shape(log_probs=log_probs, entropies=entropies, mask=mask)
    inside = mask.bool()
    if not inside.any():
        return inside
    logs = require_finite(torch.where(inside, upcast(log_probs.detach()), 0.0), "learner log-probability")
    known = require_finite(torch.where(inside, upcast(entropies.detach()), 0.0), "entropy")
    gain = advantages.detach() if advantages.dim() == 2 else advantages.detach()[:, None]
    limit = known[inside].sort().values[min(int(percentile * int(inside.sum())), int(inside.sum()) - 1)]
    spurious = (gain > 0) & (logs.exp() < probability) & (known < limit)
    return inside & ~spurious
