"""From rewards to advantages: baselines, critics, and what advantages are divided by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from vcpo.algorithms.parts.evidence import Evidence
from vcpo.algorithms.parts.weights import TOKEN
from vcpo.estimators import baselines, critic

if TYPE_CHECKING:
    from torch import Tensor


class Credit(NamedTuple):
    """What a baseline makes of the rewards: [B], or [B, T] where each token has its own."""

    advantages: Tensor
    baselines: Tensor
    value_targets: Tensor | None = None
    """[B, T] that the critic shall predict; None without one."""


class CreditAssignment(Protocol):
    """Turns rewards into advantages."""

    @property
    def name(self) -> str: ...

    @property
    def formula(self) -> str: ...

    @property
    def needs_score_norms(self) -> bool: ...

    @property
    def needs_distributions(self) -> bool: ...

    @property
    def needs_values(self) -> bool: ...

    @property
    def per_token(self) -> bool: ...

    def __call__(self, evidence: Evidence, log_weights: Tensor) -> Credit:
        """``log_weights``: those that the update uses, [B] or [B, T]."""
        ...


@dataclass(frozen=True)
class Baseline:
    """What is subtracted from the rewards."""

    name: str
    formula: str
    values: Callable[[Evidence, Tensor], Tensor]
    """(evidence, log-weights the update uses) -> [B], or [B, T] if ``per_token``."""
    needs_score_norms: bool = False
    needs_distributions: bool = False
    per_token: bool = False
    needs_values = False

    def __call__(self, evidence: Evidence, log_weights: Tensor) -> Credit:
        found = self.values(evidence, log_weights)
        rewards = evidence.rewards[:, None] if self.per_token else evidence.rewards
        return Credit(rewards - found, found)


def _of_rewards(baseline: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Evidence, Tensor], Tensor]:
    return lambda evidence, log_weights: baseline(evidence.rewards, evidence.groups)


def _optimal(evidence: Evidence, log_weights: Tensor) -> Tensor:
    norms = evidence.required("squared_score_norms", "the optimal baseline")
    return baselines.optimal_baseline(evidence.rewards, log_weights, norms, evidence.groups)


def _length_weighted(evidence: Evidence, log_weights: Tensor) -> Tensor:
    return baselines.length_weighted(evidence.rewards, evidence.mask.sum(-1), evidence.groups)


def _optimal_token(evidence: Evidence, log_weights: Tensor) -> Tensor:
    energies = evidence.required("energies", "the optimal token baseline")
    return baselines.optimal_token_baseline(
        evidence.rewards, log_weights, energies, evidence.mask, evidence.groups
    )


ZERO = Baseline("zero", "b = 0", _of_rewards(baselines.zero_baseline))
GROUP_MEAN = Baseline("group-mean", "b = mean reward of the group", _of_rewards(baselines.group_mean))
LEAVE_ONE_OUT = Baseline(
    "leave-one-out", "b_i = mean reward of the others in the group", _of_rewards(baselines.leave_one_out)
)
OPTIMAL = Baseline(
    "optimal", "b* = Σ w² ‖u‖² R / Σ w² ‖u‖² over the group, u = n · score", _optimal, needs_score_norms=True
)
LENGTH_WEIGHTED = Baseline("length-weighted", "b = Σ L R / Σ L over the group", _length_weighted)
OPTIMAL_TOKEN = Baseline(
    "optimal-token",
    "b_t = Σ W_t R / Σ W_t over the group, W_t = Σ_{j≤t} w_j² (1 − 2π_j + Σ_v π_v²)",
    _optimal_token,
    needs_distributions=True,
    per_token=True,
)


def below_mean(margin: float) -> Baseline:
    """b = mean − margin."""

    def values(evidence: Evidence, log_weights: Tensor) -> Tensor:
        return baselines.group_mean(evidence.rewards, evidence.groups) - margin

    return Baseline("below-mean", f"b = mean reward of the group − {margin:g}", values)


def bounded_optimal(margin: float) -> Baseline:
    """b = min(b*, mean − margin)."""

    def values(evidence: Evidence, log_weights: Tensor) -> Tensor:
        mean = baselines.group_mean(evidence.rewards, evidence.groups)
        return torch.minimum(_optimal(evidence, log_weights), mean - margin)

    formula = f"b = min(b*, mean reward of the group − {margin:g}), b* as of optimal"
    return Baseline("bounded-optimal", formula, values, needs_score_norms=True)


def _split_halves(evidence: Evidence, log_weights: Tensor) -> Tensor:
    norms = evidence.required("squared_score_norms", "the split-half optimal baseline")
    return baselines.split_half_optimal(evidence.rewards, log_weights, norms, evidence.groups)


SPLIT_HALF_OPTIMAL = Baseline(
    "split-half-optimal", "b* of the other half of the group", _split_halves, needs_score_norms=True
)


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation with a critic."""

    discount: float = 1.0
    decay: float = 1.0
    name = "gae"
    needs_score_norms = needs_distributions = False
    needs_values = per_token = True

    def __call__(self, evidence: Evidence, log_weights: Tensor) -> Credit:
        values = evidence.required("values", "GAE")
        advantages, targets = critic.gae(evidence.rewards, values, evidence.mask, self.discount, self.decay)
        return Credit(advantages, torch.where(evidence.mask.bool(), values, 0.0), targets)

    @property
    def formula(self) -> str:
        return (
            "A_t = Σ_l (γλ)^l δ_(t+l), δ_t = r_t + γ V_(t+1) − V_t; "
            f"γ = {self.discount:g}, λ = {self.decay:g}"
        )


@dataclass(frozen=True)
class VTrace:
    """V-trace with a critic."""

    discount: float = 1.0
    ratio_ceiling: float = 1.0
    trace_ceiling: float = 1.0
    name = "vtrace"
    needs_score_norms = needs_distributions = False
    needs_values = per_token = True

    def __call__(self, evidence: Evidence, log_weights: Tensor) -> Credit:
        values = evidence.required("values", "V-trace")
        advantages, targets = critic.vtrace(
            evidence.rewards,
            values,
            TOKEN.log_weights(evidence),
            evidence.mask,
            self.discount,
            self.ratio_ceiling,
            self.trace_ceiling,
        )
        return Credit(advantages, torch.where(evidence.mask.bool(), values, 0.0), targets)

    @property
    def formula(self) -> str:
        return (
            f"A_t = r_t + γ v_(t+1) − V_t, v_s = V_s + Σ_t γ^(t−s) (Π c) ρ_t δ_t; γ = {self.discount:g}, "
            f"ρ at most {self.ratio_ceiling:g}, c at most {self.trace_ceiling:g}"
        )


@dataclass(frozen=True)
class Normalisation:
    """What advantages are divided by."""

    name: str
    formula: str
    apply: Callable[[Tensor, Evidence], Tensor]
    """(advantages [B] or [B, T], evidence) -> the same shape."""


STD_EPSILON = 1e-6


def _unchanged(advantages: Tensor, evidence: Evidence) -> Tensor:
    return advantages


def _over_std(advantages: Tensor, evidence: Evidence) -> Tensor:
    """Where a group's rewards are equal, an advantage that is not 0 (of a baseline beside their mean) stays
    as it is: divided by the epsilon it would be 10⁶ times every other."""
    deviation = baselines.group_std(evidence.rewards, evidence.groups)
    divisor = torch.where(deviation > 0, deviation + STD_EPSILON, 1.0)
    return advantages / (divisor if advantages.dim() == 1 else divisor[:, None])


NO_NORMALISATION = Normalisation("none", "A = R − b", _unchanged)
STD = Normalisation(
    "std",
    f"A = (R − b) / (sample std of the group's rewards + {STD_EPSILON:g}; by 1 if that is 0)",
    _over_std,
)

NORMALISATIONS = {part.name: part for part in (NO_NORMALISATION, STD)}
MARGIN = 0.1


def baseline_named(name: str, margin: float) -> Baseline:
    """The baseline a recipe names; the margin matters to ``below-mean`` and ``bounded-optimal`` alone."""
    choices = (
        ZERO,
        GROUP_MEAN,
        LEAVE_ONE_OUT,
        OPTIMAL,
        LENGTH_WEIGHTED,
        OPTIMAL_TOKEN,
        SPLIT_HALF_OPTIMAL,
        below_mean(margin),
        bounded_optimal(margin),
    )
    return {part.name: part for part in choices}[name]
