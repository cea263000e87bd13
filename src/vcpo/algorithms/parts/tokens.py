"""Tokens: which are left out of the update, what is added to each, and how they are averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vcpo.algorithms.parts.evidence import Evidence
from vcpo.algorithms.parts.weights import TOKEN, Level, token_ess_ratio
from vcpo.estimators import aggregation, importance, masks, surrogates

if TYPE_CHECKING:
    from torch import Tensor


class TokenMask(Protocol):
    """Which tokens are left out of the update."""

    @property
    def formula(self) -> str: ...

    @property
    def spans_minibatch(self) -> bool: ...

    @property
    def needs_distributions(self) -> bool: ...

    @property
    def renormalises(self) -> bool:
        """Whether kept tokens are scaled up to weigh what all would."""
        ...

    def __call__(self, evidence: Evidence, level: Level, advantages: Tensor) -> Tensor:
        """[B, T] bool, true where a token is kept. ``level``: of the weights; ``advantages`` [B]
        or [B, T]."""
        ...


@dataclass(frozen=True)
class Clip:
    """PPO's clip: no gradient where the weight has moved too far to where the advantage pushes it."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    """No gradient either where A < 0 and the weight is above this."""
    level: Level | None = None
    """Whose weights are clipped; None: those of the update."""
    spans_minibatch = needs_distributions = renormalises = False

    def __call__(self, evidence: Evidence, level: Level, advantages: Tensor) -> Tensor:
        weights = (self.level or level).log_weights(evidence)
        return ~surrogates.ppo_clip_active(weights, advantages, evidence.mask, self.low, self.high, self.dual)

    @property
    def formula(self) -> str:
        what = f"the {self.level.name} ratio" if self.level else "w"
        dual = "" if self.dual is None else f", or A < 0 and {what} > {self.dual:g}"
        bounds = f"0 where A > 0 and {what} > {1 + self.high:g}, or A < 0 and {what} < {1 - self.low:g}"
        if self.level or self.dual:  # then the coefficient is not the gradient of one minimum
            return bounds + dual
        return f"{bounds} (the gradient of min(w A, clip(w, [{1 - self.low:g}, {1 + self.high:g}]) A))"


@dataclass(frozen=True)
class Within:
    """Masked importance sampling: what has a weight outside [low, high] is left out."""

    low: float
    high: float
    spans_minibatch = needs_distributions = renormalises = False

    def __call__(self, evidence: Evidence, level: Level, advantages: Tensor) -> Tensor:
        kept = importance.keep_within(level.log_weights(evidence), self.low, self.high)
        return (kept if level.per_token else kept[:, None]) & evidence.mask.bool()

    @property
    def formula(self) -> str:
        return f"0 where w is outside [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class SecondMoment:
    """M2PO: the largest (log ρ)² are left out until the mean of the others is at most the threshold."""

    threshold: float = 0.04
    spans_minibatch = True
    needs_distributions = renormalises = False

    def __call__(self, evidence: Evidence, level: Level, advantages: Tensor) -> Tensor:
        return masks.second_moment(TOKEN.log_weights(evidence), evidence.mask, advantages, self.threshold)

    @property
    def formula(self) -> str:
        return (
            "0 at the largest (log ρ_t)² of the minibatch among tokens with ρ > 1 and A > 0 or ρ < 1 and "
            f"A < 0, until the mean of all that are left is at most {self.threshold:g}"
        )


@dataclass(frozen=True)
class Spurious:
    """STAPO: sure of itself and yet an unlikely token of a success."""

    probability: float = 0.002
    percentile: float = 0.80
    spans_minibatch = needs_distributions = renormalises = True

    def __call__(self, evidence: Evidence, level: Level, advantages: Tensor) -> Tensor:
        entropies = evidence.required("entropies", "STAPO's mask")
        return masks.not_spurious(
            evidence.log_probs, entropies, evidence.mask, advantages, self.probability, self.percentile
        )

    @property
    def formula(self) -> str:
        return (
            f"0 where A > 0, π(y_t) < {self.probability:g} and H_t is below the {self.percentile:.0%} "
            "quantile of the minibatch; the others are scaled up to the same normaliser"
        )


class Penalty(Protocol):
    """What is added to the coefficients, whatever the advantages."""

    @property
    def formula(self) -> str: ...

    @property
    def spans_minibatch(self) -> bool: ...

    def __call__(self, evidence: Evidence) -> Tensor | None:
        """[B, T], 0 outside the mask; None for nothing."""
        ...


@dataclass(frozen=True)
class NoPenalty:
    formula = ""
    spans_minibatch = False

    def __call__(self, evidence: Evidence) -> None:
        return None


NO_PENALTY = NoPenalty()


@dataclass(frozen=True)
class KlToBehaviour:
    """P3O: draws π to μ, the more the smaller the ESS ratio of token ratios is."""

    formula = "− (1 − ESS ratio of token ratios) (1 − 1/ρ_t)"
    spans_minibatch = True

    def __call__(self, evidence: Evidence) -> Tensor:
        return surrogates.kl_coefficients(TOKEN.log_weights(evidence), evidence.mask) * (
            1 - token_ess_ratio(evidence)
        )


@dataclass(frozen=True)
class Aggregation:
    """The factor of every token of a trajectory."""

    name: str
    formula: str
    normalisers: Callable[[Tensor], Tensor]
    """Action counts of the whole minibatch [B] -> [B]."""
    renormalise: Callable[[Tensor, Tensor], Tensor]
    """(kept, mask) [B, T] of the minibatch -> [B, 1] factor that makes kept tokens weigh what all would."""


SEQUENCE_MEAN = Aggregation(
    "sequence-mean", "n_i = 1 / (B L_i)", aggregation.sequence_mean, aggregation.kept_of_sequence
)
TOKEN_MEAN = Aggregation("token-mean", "n_i = 1 / Σ_j L_j", aggregation.token_mean, aggregation.kept_of_all)


def constant_aggregation(length: float) -> Aggregation:
    """n_i = 1 / (B · length)."""
    return Aggregation(
        "constant",
        f"n_i = 1 / (B · {length:g})",
        lambda action_counts: aggregation.constant(action_counts, length),
        aggregation.unchanged,
    )


CONSTANT_LENGTH = 16
CONSTANT = constant_aggregation(CONSTANT_LENGTH)


def aggregation_named(name: str, constant_length: float) -> Aggregation:
    """The aggregation a recipe names; the length matters to ``constant`` alone."""
    choices = (SEQUENCE_MEAN, TOKEN_MEAN, constant_aggregation(constant_length))
    return {part.name: part for part in choices}[name]
