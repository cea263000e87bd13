"""Aggregation: the factor n_i that every token of trajectory i is multiplied by.

Each function normalises completely: the learner adds up n_i c_{i,t} over all tokens of the minibatch, in
any number of micro-batches and on any number of ranks, and divides by nothing more. For that, the counts
given are those of the *whole* optimizer minibatch. The score norm that the optimal baseline needs is of
the same n_i-weighted sum.

Shapes: ``action_counts`` [B] is the number L_i of sampled tokens, zero for an empty answer, which gets 0 and
still counts in B. Results are float32 for integer counts, float64 for float64 counts. No gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vcpo.errors import ConfigError
from vcpo.estimators.checks import upcast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Num
    from torch import Tensor


def sequence_mean(action_counts: Num[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Mean over trajectories of the mean over tokens: n_i = 1 / (B · L_i).

    GRPO, arXiv 2402.03300, eq. 3; ``seq-mean-token-mean`` of VCPO's official code. A token of a long answer
    weighs less than one of a short answer. Normalises by length and by B.
    """
    counts = upcast(action_counts)
    return torch.where(counts > 0, 1 / (len(counts) * counts), 0.0)


def token_mean(action_counts: Num[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Mean over all tokens of the minibatch: n_i = 1 / Σ_j L_j.

    DAPO, arXiv 2503.14476, eq. 8. Every token weighs the same. Normalises by the minibatch's tokens.
    """
    counts = upcast(action_counts)
    return torch.where(counts > 0, 1 / counts.sum(), 0.0)


def constant(action_counts: Num[Tensor, " B"], length: float) -> Float[Tensor, " B"]:
    """Sum over tokens, divided by a constant: n_i = 1 / (B · C).

    Dr.GRPO, arXiv 2503.20783. Long answers weigh more, as the policy gradient has it. Normalises by B; the
    constant C only sets the scale.

    Raises:
        ConfigError: the length is not positive.
    """
    if not length > 0:
        raise ConfigError(f"the constant length must be positive, got {length}")
    counts = upcast(action_counts)
    return torch.where(counts > 0, 1 / (len(counts) * length), 0.0).to(counts.dtype)


def kept_of_sequence(kept: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """L_i / (kept tokens of trajectory i): makes :func:`sequence_mean` a mean over kept tokens. 1 where none
    is kept."""
    left = (kept & mask.bool()).sum(-1, keepdim=True)
    return torch.where(left > 0, mask.sum(-1, keepdim=True) / left.clamp(min=1), 1.0)


def kept_of_all(kept: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Tokens / kept tokens of the whole minibatch: makes :func:`token_mean` a mean over kept tokens."""
    left = (kept & mask.bool()).sum()
    return torch.where(left > 0, mask.sum() / left.clamp(min=1), 1.0).expand(len(mask), 1)


def unchanged(kept: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """1: a constant length does not depend on what is kept."""
    return torch.ones(len(mask), 1, device=mask.device)
