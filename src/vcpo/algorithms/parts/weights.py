"""Importance weights: the level at which they correct for the behaviour policy, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from vcpo.algorithms.parts.evidence import Evidence
from vcpo.errors import ConfigError
from vcpo.estimators import baselines, importance
from vcpo.estimators.ess import ess_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Level:
    """The level at which a weight corrects for the behaviour policy."""

    name: str
    formula: str
    log_weights: Callable[[Evidence], Tensor]
    """-> [B], or [B, T] for one weight a token."""
    per_token: bool = False
    corrects: bool = True


def _no_correction(evidence: Evidence) -> Tensor:
    return evidence.log_probs.new_zeros(len(evidence.log_probs))


def _of(measure: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Evidence], Tensor]:
    return lambda evidence: measure(evidence.log_probs, evidence.behaviour_log_probs, evidence.mask)


UNCORRECTED = Level("none", "w = 1", _no_correction, corrects=False)
TOKEN = Level("token", "w = π(y_t) / μ(y_t)", _of(importance.log_ratios), per_token=True)
SEQUENCE = Level("sequence", "w = Π_t π(y_t) / μ(y_t)", _of(importance.log_importance_weights))
GEOMETRIC = Level(
    "geometric", "w = (Π_t π(y_t) / μ(y_t))^(1/L)", _of(importance.length_normalised_log_weights)
)


class Shape(Protocol):
    """What is made of a weight before it is used."""

    @property
    def formula(self) -> str: ...

    @property
    def needs_group(self) -> bool:
        """Whether the weight of a trajectory depends on others of its group."""
        ...

    @property
    def spans_minibatch(self) -> bool:
        """Whether it depends on the whole minibatch."""
        ...

    @property
    def per_token(self) -> bool | None:
        """True if it is of the weights of tokens, false if of those of trajectories, None if of any."""
        ...

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor: ...


@dataclass(frozen=True)
class Whole:
    """The weight as it is."""

    formula = ""
    needs_group = False
    spans_minibatch = False
    per_token = None

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor:
        return log_weights


@dataclass(frozen=True)
class Truncated:
    """min(w, ceiling)."""

    ceiling: float
    needs_group = False
    spans_minibatch = False
    per_token = None

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor:
        return importance.truncate(log_weights, self.ceiling)

    @property
    def formula(self) -> str:
        return f"at most {self.ceiling:g}"


def _excess(evidence: Evidence) -> Tensor:
    """[B] reward minus the mean of the group: positive for what shall become more likely."""
    return evidence.rewards - baselines.group_mean(evidence.rewards, evidence.groups)


@dataclass(frozen=True)
class Tapered:
    """Other limits for trajectories above the mean of their group than for the others."""

    above: tuple[float, float] = (1.0, 1.0)
    below: tuple[float, float] = (0.0, 1.0)
    needs_group = True
    spans_minibatch = False
    per_token = False

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor:
        return importance.taper(log_weights, _excess(evidence), self.above, self.below)

    @property
    def formula(self) -> str:
        (a, b), (c, d) = self.above, self.below
        return f"within [{a:g}, {b:g}] if R is above the group's mean, else within [{c:g}, {d:g}]"


@dataclass(frozen=True)
class Soft:
    """φ(w) = w^k e^(λ(1−w)), with other k and λ above the mean of the group than below."""

    above: tuple[float, float] = (2.0, 3.0)
    below: tuple[float, float] = (3.0, 2.0)
    needs_group = True
    spans_minibatch = False
    per_token = None

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor:
        return importance.soften(log_weights, _excess(evidence), self.above, self.below)

    @property
    def formula(self) -> str:
        (a, b), (c, d) = self.above, self.below
        return (
            f"then w^k e^(λ(1−w)), k = {a:g} and λ = {b:g} if R is above the group's mean, else {c:g}, {d:g}"
        )


@dataclass(frozen=True)
class CappedByEss:
    """min(ρ, ESS ratio of all token ratios of the minibatch)."""

    formula = "at most the ESS ratio of the minibatch's token ratios"
    needs_group = False
    spans_minibatch = True
    per_token = True

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor:
        return importance.truncate(log_weights, token_ess_ratio(evidence))


def token_ess_ratio(evidence: Evidence) -> float:
    ratios = TOKEN.log_weights(evidence)[evidence.mask.bool()]
    return float(ess_ratio(ratios)) if len(ratios) else 1.0


@dataclass(frozen=True)
class Decoupled:
    """(π_prox/μ capped) · π/π_prox, with log π_prox between log μ and log π by the token's lag."""

    cap: float
    needs_group = False
    spans_minibatch = False
    per_token = True

    def __call__(self, log_weights: Tensor, evidence: Evidence) -> Tensor:
        proximal = PROXIMAL.log_weights(evidence)
        return importance.truncate(log_weights - proximal, self.cap) + proximal

    @property
    def formula(self) -> str:
        return f"= (π_prox/μ, at most {self.cap:g}) · π/π_prox"


def _proximal(evidence: Evidence) -> Tensor:
    lags = evidence.required("lags", "the proximal policy")
    return TOKEN.log_weights(evidence) / (1 + torch.where(evidence.mask.bool(), lags, 0))


PROXIMAL = Level("proximal", "r = π/π_prox = (π/μ)^(1/(1+lag))", _proximal, per_token=True)


@dataclass(frozen=True)
class Importance:
    """A level, and what is made of its weights."""

    level: Level = UNCORRECTED
    shape: Shape = field(default_factory=Whole)

    def __post_init__(self) -> None:
        if not self.level.corrects and not isinstance(self.shape, Whole):
            raise ConfigError(
                f"there are no importance weights to shape ({self.shape.formula}); set algorithm.level, "
                "or leave algorithm.truncation unset"
            )
        if self.shape.per_token not in (None, self.level.per_token):
            raise ConfigError(
                f"this algorithm's weights ({self.shape.formula}) are of "
                f"{'tokens' if self.shape.per_token else 'trajectories'}; set another algorithm.level than "
                f"{self.level.name}, or leave it unset"
            )

    def __call__(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """The log-weights that the update uses, and where the shape changed them (bool)."""
        raw = self.level.log_weights(evidence)
        used = self.shape(raw, evidence)
        changed = used != raw
        return used, changed & evidence.mask.bool() if self.level.per_token else changed

    @property
    def formula(self) -> str:
        return ", ".join(filter(None, (f"{self.level.name}: {self.level.formula}", self.shape.formula)))


NO_IMPORTANCE = Importance()

LEVELS = {part.name: part for part in (UNCORRECTED, TOKEN, SEQUENCE, GEOMETRIC)}
