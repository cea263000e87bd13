"""Forward-only stand-ins for the squared score norm ‖∇_θ n_i log π(τ_i)‖², for comparison with it.

A proxy reads what the forward pass leaves behind and asks no gradient. It need not have the norm's size: a
factor that a group has in common cancels in the optimal baseline. `docs/scores.md` has how well each ranks
real rollouts. A third stand-in, the gradient of the output head alone, is
``ScoreTape(model, only=["lm_head"])``.

N sampled tokens belong to B trajectories: ``owners`` has the trajectory of each, in any order. A trajectory
without sampled tokens gets exactly 0, as its norm is.

Departs from OTB: it weighs each token by the energies up to that token, for a baseline a token. Here the
energies of all tokens of a trajectory are added up, for one baseline a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcpo.errors import NonFiniteError, VcpoError
from vcpo.scores.layout import precise

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BUDGET = 2**22
"""Default for the most probabilities held at once (16 MiB in float32)."""


@torch.no_grad()
def token_counts(
    owners: Int[Tensor, " N"], count: int, normalisers: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The length as a stand-in for the score norm: n_i² L_i.

    OPO (arXiv 2505.23585) has the baseline Σ L R / Σ L, which is optimal if ‖s‖² is proportional to L: if
    the scores of a trajectory's tokens are orthogonal and of one size. ``count`` is B. The caller
    normalises, by n_i. No gradient.

    Raises VcpoError if ``normalisers`` is not [count] or an owner is not below ``count``.
    """
    _check(owners, count, normalisers)
    lengths = torch.bincount(owners, minlength=count)
    return precise(normalisers).square() * lengths


@torch.no_grad()
def logit_energies(
    logits: Float[Tensor, "N V"],
    chosen: Int[Tensor, " N"],
    owners: Int[Tensor, " N"],
    count: int,
    normalisers: Float[Tensor, " B"],
    *,
    budget: int = BUDGET,
) -> Float[Tensor, " B"]:
    """The squared norm of the score with respect to the logits: n_i² Σ_t (1 − 2 π(y_t) + Σ_v π(v)²).

    A token's term is ‖onehot(y_t) − π_t‖² = ‖∂ log π(y_t) / ∂ logits_t‖², between 0 and 2: what OTB
    (arXiv 2602.07078) weighs with. It would be the norm itself if all of the logits' Jacobians were
    orthogonal and of one size.

    ``logits`` are those each token ``chosen`` was sampled from, at temperature 1 and in any precision; the
    work is done in float32 or better. Chunks of rows hold at most ``budget`` probabilities, but one row at
    least; the result does not depend on it. ``count`` is B. The caller normalises, by n_i. No gradient.

    Raises NonFiniteError naming the first trajectory with a NaN or +inf among its logits; VcpoError if
    shapes do not fit, an owner is not below ``count`` or a chosen token not below V.
    """
    _check(owners, count, normalisers)
    _check_tokens(logits, chosen, owners)
    energies = precise(logits[:0]).new_zeros(count)
    rows = max(1, budget // logits.shape[-1])
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        energies.index_add_(0, owners[part], _token_energies(logits[part], chosen[part]))
    _require_finite(energies)
    return precise(normalisers).square() * energies


@torch.no_grad()
def token_distributions(
    logits: Float[Tensor, "N V"], chosen: Int[Tensor, " N"], *, budget: int = BUDGET
) -> Float[Tensor, "2 N"]:
    """Entropy −Σ_v π log π in nats, and energy 1 − 2 π(y) + Σ_v π², of the distribution of each token.

    ``logits`` are those the token ``chosen`` was sampled from, in any precision; the work is done in float32
    or better, a piece at a time as in :func:`logit_energies`. No gradient.
    """
    found = precise(logits[:0]).new_empty(2, len(logits))
    rows = max(1, budget // max(logits.shape[-1], 1))
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        log_probs = precise(logits[part]).log_softmax(-1)
        found[0, part] = torch.special.entr(log_probs.exp()).sum(-1)
        found[1, part] = _token_energies(logits[part], chosen[part])
    return found


def _token_energies(logits: Float[Tensor, "n V"], chosen: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 − 2 π(y) + Σ π² as (Σ_{v≠y} π)² + Σ_{v≠y} π².

    The first form loses all its digits where the policy is sure of y; nothing is subtracted in the second.
    """
    others = precise(logits).softmax(-1).scatter_(-1, chosen[:, None], 0.0)
    return others.sum(-1).square() + others.square().sum(-1)


def _check(owners: Tensor, count: int, normalisers: Tensor) -> None:
    if normalisers.shape != (count,):
        raise VcpoError(f"normalisers must be one a trajectory, [{count}], got {tuple(normalisers.shape)}")
    if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < count:
        raise VcpoError(
            f"owners must be trajectories 0 to {count - 1}, got {int(owners.min())} to {int(owners.max())}: "
            "give the sampled tokens alone, without padding"
        )


def _check_tokens(logits: Tensor, chosen: Tensor, owners: Tensor) -> None:
    if logits.dim() != 2 or chosen.shape != logits.shape[:1] or owners.shape != chosen.shape:
        shapes = f"{tuple(logits.shape)}, {tuple(chosen.shape)} and {tuple(owners.shape)}"
        raise VcpoError(f"logits [N, V], chosen [N] and owners [N] do not fit together: got {shapes}")
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < logits.shape[-1]:
        raise VcpoError(
            f"chosen tokens must be in the vocabulary of {logits.shape[-1]}, "
            f"got {int(chosen.min())} to {int(chosen.max())}"
        )


def _require_finite(energies: Tensor) -> None:
    bad = ~energies.isfinite()
    if bad.any():
        raise NonFiniteError("logit energy", int(bad.nonzero()[0, 0]), "its logits are NaN or infinite")
