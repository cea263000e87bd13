"""The parts that algorithms are made of: one frozen value a choice, looked up by its name in a recipe.

A part carries what it computes, what it needs, and the formula it is described by; so the learner and the
composition ask the part, and nobody asks for a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vcpo.errors import ConfigError, VcpoError
from vcpo.estimators import aggregation, baselines, importance, surrogates

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What the learner measured of a set of whole groups: B trajectories padded to T tokens."""

    log_probs: Float[Tensor, "B T"]
    """The learner's log π(y_t), in nats. Values outside the mask never matter."""
    behaviour_log_probs: Float[Tensor, "B T"]
    """The recorded log μ(y_t), in nats. Values outside the mask never matter."""
    mask: Bool[Tensor, "B T"]
    """True at the tokens that the behaviour policy sampled."""
    rewards: Float[Tensor, " B"]
    """Reward of the whole episode."""
    groups: Int[Tensor, " B"]
    """Group id of each trajectory, in any order."""
    squared_score_norms: Float[Tensor, " B"] | None = None
    """‖u_i‖² of u_i = ∇ Σ_t n_i log π(y_t), n_i the normaliser; only if ``needs_score_norms``."""


@dataclass(frozen=True)
class Level:
    """The level at which a weight corrects for the behaviour policy."""

    name: str
    formula: str
    log_weights: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(log_probs, behaviour_log_probs, mask) -> [B], or [B, T] for one weight a token."""
    per_token: bool = False
    corrects: bool = True


def _no_correction(log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor) -> Tensor:
    return log_probs.new_zeros(len(log_probs))


UNCORRECTED = Level("none", "w = 1", _no_correction, corrects=False)
TOKEN = Level("token", "w = π(y_t) / μ(y_t)", importance.log_ratios, per_token=True)
SEQUENCE = Level("sequence", "w = Π_t π(y_t) / μ(y_t)", importance.log_importance_weights)
GEOMETRIC = Level("geometric", "w = (Π_t π(y_t) / μ(y_t))^(1/L)", importance.length_normalised_log_weights)


@dataclass(frozen=True)
class Importance:
    """A level, and the ceiling its weights are truncated at (None: not truncated)."""

    level: Level = UNCORRECTED
    truncation: float | None = None

    def __post_init__(self) -> None:
        if self.truncation is not None and not self.level.corrects:
            raise ConfigError(
                "this algorithm has no importance weights to truncate; leave algorithm.truncation unset"
            )

    def __call__(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """The log-weights that the update uses, and where truncation lowered them (bool)."""
        raw = self.level.log_weights(evidence.log_probs, evidence.behaviour_log_probs, evidence.mask)
        used = raw if self.truncation is None else importance.truncate(raw, self.truncation)
        lowered = used < raw
        return used, lowered & evidence.mask.bool() if self.level.per_token else lowered

    @property
    def formula(self) -> str:
        ceiling = "" if self.truncation is None else f", at most {self.truncation:g}"
        return f"{self.level.name}: {self.level.formula}{ceiling}"


@dataclass(frozen=True)
class Baseline:
    """What is subtracted from the rewards."""

    name: str
    formula: str
    values: Callable[[Evidence, Tensor], Tensor]
    """(evidence, log-weights the update uses [B]) -> [B]."""
    needs_score_norms: bool = False


def _zero(evidence: Evidence, log_weights: Tensor) -> Tensor:
    return baselines.zero_baseline(evidence.rewards, evidence.groups)


def _group_mean(evidence: Evidence, log_weights: Tensor) -> Tensor:
    return baselines.group_mean(evidence.rewards, evidence.groups)


def _leave_one_out(evidence: Evidence, log_weights: Tensor) -> Tensor:
    return baselines.leave_one_out(evidence.rewards, evidence.groups)


def _optimal(evidence: Evidence, log_weights: Tensor) -> Tensor:
    if evidence.squared_score_norms is None:
        raise VcpoError("the optimal baseline needs squared_score_norms in its evidence, got None")
    return baselines.optimal_baseline(
        evidence.rewards, log_weights, evidence.squared_score_norms, evidence.groups
    )


ZERO = Baseline("zero", "b = 0", _zero)
GROUP_MEAN = Baseline("group-mean", "b = mean reward of the group", _group_mean)
LEAVE_ONE_OUT = Baseline("leave-one-out", "b_i = mean reward of the others in the group", _leave_one_out)
OPTIMAL = Baseline(
    "optimal", "b* = Σ w² ‖u‖² R / Σ w² ‖u‖² over the group, u = n · score", _optimal, needs_score_norms=True
)


@dataclass(frozen=True)
class Normalisation:
    """What advantages are divided by."""

    name: str
    formula: str
    apply: Callable[[Tensor, Evidence], Tensor]
    """(advantages [B], evidence) -> [B]."""


STD_EPSILON = 1e-6


def _unchanged(advantages: Tensor, evidence: Evidence) -> Tensor:
    return advantages


def _over_std(advantages: Tensor, evidence: Evidence) -> Tensor:
    return advantages / (baselines.group_std(evidence.rewards, evidence.groups) + STD_EPSILON)


NO_NORMALISATION = Normalisation("none", "A = R − b", _unchanged)
STD = Normalisation("std", f"A = (R − b) / (sample std of the group's rewards + {STD_EPSILON:g})", _over_std)


class Surrogate(Protocol):
    """Turns weights and advantages into the coefficient of each token's score."""

    @property
    def weighs_by_ratio(self) -> bool:
        """True if it weighs tokens by their own ratios, so that no other weight may be added."""
        ...

    @property
    def formula(self) -> str: ...

    def __call__(
        self, log_weights: Tensor, log_ratios: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] coefficients, and where this surrogate's own clip is active ([B, T] bool; None: no clip)."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """REINFORCE with the weights under stop-gradient."""

    weighs_by_ratio = False
    formula = "c = sg(w) · A"

    def __call__(
        self, log_weights: Tensor, log_ratios: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        return surrogates.policy_gradient_coefficients(log_weights, advantages, mask), None


@dataclass(frozen=True)
class PpoClip:
    """PPO's clipped ratio of the learner's policy to the behaviour policy."""

    low: float = 0.2
    high: float = 0.2
    weighs_by_ratio = True

    def __call__(
        self, log_weights: Tensor, log_ratios: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        bounds = (self.low, self.high)
        coefficients = surrogates.ppo_clip_coefficients(log_ratios, advantages, mask, *bounds)
        return coefficients, surrogates.ppo_clip_active(log_ratios, advantages, mask, *bounds)

    @property
    def formula(self) -> str:
        inside = f"[{1 - self.low:g}, {1 + self.high:g}]"
        return f"c = gradient of min(r A, clip(r, {inside}) A), r = π(y_t) / μ(y_t)"


@dataclass(frozen=True)
class Aggregation:
    """The factor of every token of a trajectory."""

    name: str
    formula: str
    normalisers: Callable[[Tensor], Tensor]
    """Action counts of the whole minibatch [B] -> [B]."""


SEQUENCE_MEAN = Aggregation("sequence-mean", "n_i = 1 / (B L_i)", aggregation.sequence_mean)
TOKEN_MEAN = Aggregation("token-mean", "n_i = 1 / Σ_j L_j", aggregation.token_mean)


@dataclass(frozen=True)
class _ConstantLength:
    length: float

    def __call__(self, action_counts: Tensor) -> Tensor:
        return aggregation.constant(action_counts, self.length)


def constant_aggregation(length: float) -> Aggregation:
    """n_i = 1 / (B · length)."""
    return Aggregation("constant", f"n_i = 1 / (B · {length:g})", _ConstantLength(length))


BASELINES = {part.name: part for part in (ZERO, GROUP_MEAN, LEAVE_ONE_OUT, OPTIMAL)}
NORMALISATIONS = {part.name: part for part in (NO_NORMALISATION, STD)}


def aggregation_named(name: str, constant_length: float) -> Aggregation:
    """The aggregation a recipe names; the length matters to ``constant`` alone."""
    choices = (SEQUENCE_MEAN, TOKEN_MEAN, constant_aggregation(constant_length))
    return {part.name: part for part in choices}[name]
