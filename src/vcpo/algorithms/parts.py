"""The parts that algorithms are made of: one frozen value a choice, looked up by its name in a recipe.

A part carries what it computes, what it needs, and the formula it is described by; so the learner and the
composition ask the part, and nobody asks for a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from vcpo.errors import ConfigError, VcpoError
from vcpo.estimators import aggregation, baselines, critic, importance, masks, surrogates
from vcpo.estimators.ess import ess_ratio

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What the learner measured of a set of whole groups: B trajectories padded to T tokens.

    Values outside the mask never matter.
    """

    log_probs: Float[Tensor, "B T"]
    """The learner's log π(y_t), in nats."""
    behaviour_log_probs: Float[Tensor, "B T"]
    """The recorded log μ(y_t), in nats."""
    mask: Bool[Tensor, "B T"]
    """True at the tokens that the behaviour policy sampled."""
    rewards: Float[Tensor, " B"]
    """Reward of the whole episode."""
    groups: Int[Tensor, " B"]
    """Group id of each trajectory, in any order."""
    lags: Int[Tensor, "B T"] | None = None
    """The learner's version minus the version that sampled the token."""
    squared_score_norms: Float[Tensor, " B"] | None = None
    """‖u_i‖² of u_i = ∇ Σ_t n_i log π(y_t), n_i the normaliser; only if ``needs_score_norms``."""
    entropies: Float[Tensor, "B T"] | None = None
    """H_t = −Σ_v π(v) log π(v) where the token was sampled, in nats; only if ``needs_distributions``."""
    energies: Float[Tensor, "B T"] | None = None
    """1 − 2 π(y_t) + Σ_v π(v)²; only if ``needs_distributions``."""
    values: Float[Tensor, "B T"] | None = None
    """The critic's V before each token; only if ``needs_values``."""

    def required(self, name: str, who: str) -> Tensor:
        """The field ``name``, or VcpoError saying who needs it."""
        values = getattr(self, name)
        if values is None:
            raise VcpoError(f"{who} needs {name} in its evidence, got None")
        return values


# Importance weights


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

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor: ...


@dataclass(frozen=True)
class Whole:
    """The weight as it is."""

    formula = ""
    needs_group = False
    spans_minibatch = False
    per_token = None

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor:
        return log_weights


@dataclass(frozen=True)
class Truncated:
    """min(w, ceiling)."""

    ceiling: float
    needs_group = False
    spans_minibatch = False
    per_token = None

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor:
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

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor:
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

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor:
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

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor:
        return importance.truncate(log_weights, _token_ess_ratio(evidence))


def _token_ess_ratio(evidence: Evidence) -> float:
    ratios = TOKEN.log_weights(evidence)[evidence.mask.bool()]
    return float(ess_ratio(ratios)) if len(ratios) else 1.0


@dataclass(frozen=True)
class Decoupled:
    """(π_prox/μ capped) · π/π_prox, with log π_prox between log μ and log π by the token's lag."""

    cap: float
    needs_group = False
    spans_minibatch = False
    per_token = True

    def __call__(self, log_weights: Tensor, evidence: Evidence, level: Level) -> Tensor:
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
        used = self.shape(raw, evidence, self.level)
        changed = used != raw
        return used, changed & evidence.mask.bool() if self.level.per_token else changed

    @property
    def formula(self) -> str:
        return ", ".join(filter(None, (f"{self.level.name}: {self.level.formula}", self.shape.formula)))


NO_IMPORTANCE = Importance()


# Baselines and critics


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
STD = Normalisation("std", f"A = (R − b) / (sample std of the group's rewards + {STD_EPSILON:g})", _over_std)


# Token masks and penalties


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
        return (
            f"0 where A > 0 and {what} > {1 + self.high:g}, or A < 0 and {what} < {1 - self.low:g}{dual} "
            f"(the gradient of min(w A, clip(w, [{1 - self.low:g}, {1 + self.high:g}]) A))"
        )


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
    """P3O: minus the gradient of (1 − ESS ratio) KL(π ‖ μ), the ESS ratio that of token ratios."""

    formula = "− (1 − ESS ratio of token ratios) ρ_t log ρ_t"
    spans_minibatch = True

    def __call__(self, evidence: Evidence) -> Tensor:
        return surrogates.kl_coefficients(TOKEN.log_weights(evidence), evidence.mask) * (
            1 - _token_ess_ratio(evidence)
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

LEVELS = {part.name: part for part in (UNCORRECTED, TOKEN, SEQUENCE, GEOMETRIC)}
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


def aggregation_named(name: str, constant_length: float) -> Aggregation:
    """The aggregation a recipe names; the length matters to ``constant`` alone."""
    choices = (SEQUENCE_MEAN, TOKEN_MEAN, constant_aggregation(constant_length))
    return {part.name: part for part in choices}[name]
