"""An algorithm is a frozen composition of parts; the learner reads it and knows no names.

    importance level and truncation × baseline × normalisation × surrogate × aggregation × step scale

One step, with n, c and A of the parts: Δθ ∝ scale · Σ_{i,t} n_i c_{i,t} ∇log π(y_{i,t}).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vcpo.algorithms import parts
from vcpo.algorithms.parts import Evidence
from vcpo.errors import ConfigError
from vcpo.estimators.ess import StepRule, step_scale
from vcpo.estimators.importance import log_ratios

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Num
    from torch import Tensor

    from vcpo.config import AlgorithmConfig

__all__ = ["Algorithm", "Evidence", "Update"]

_STEP_FORMULAS = {"sqrt": "η · sqrt(min(1, ρ / ρ_on))", "linear": "η · min(1, ρ / ρ_on)", "off": "η"}


@dataclass(frozen=True)
class Update:
    """What an algorithm makes of the evidence; all detached."""

    coefficients: Float[Tensor, "B T"]
    """c_{i,t} of every token, 0 outside the mask; the normaliser n_i is *not* included."""
    advantages: Float[Tensor, " B"]
    """(R − b), divided as the normalisation says."""
    baselines: Float[Tensor, " B"]
    """b of every trajectory."""
    log_weights: Float[Tensor, " B"]
    """Sequence level and never truncated, whatever the algorithm uses: what the ESS is taken of."""
    used_log_weights: Float[Tensor, " B"] | Float[Tensor, "B T"]
    """Of the weights that the update uses, truncated; 0 where it uses none."""
    log_ratios: Float[Tensor, "B T"]
    """Of every sampled token, 0 outside the mask."""
    truncated: Bool[Tensor, " B"] | Bool[Tensor, "B T"]
    """Where truncation or a clip was active: [B] for one weight a trajectory, else [B, T]."""


@dataclass(frozen=True)
class Algorithm:
    """A named composition.

    Raises:
        ConfigError: the parts contradict each other (the message says which and what to do).
    """

    name: str
    source: str
    """Paper, and where its settings come from."""
    importance: parts.Importance
    baseline: parts.Baseline
    normalisation: parts.Normalisation
    surrogate: parts.Surrogate
    aggregation: parts.Aggregation
    step_rule: StepRule
    departures: tuple[str, ...] = ()
    """Where it differs from its source, one sentence each."""

    def __post_init__(self) -> None:
        level = self.importance.level
        if self.surrogate.weighs_by_ratio and level.corrects:
            raise ConfigError(
                f"{self.name}: the surrogate weighs tokens by their ratios already; use importance level none"
            )
        if self.baseline.needs_score_norms and not self.weighs_trajectories:
            raise ConfigError(
                f"{self.name}: the {self.baseline.name} baseline needs one weight a trajectory, and this "
                "algorithm weighs every token; choose another algorithm.baseline or algorithm.name"
            )

    @property
    def needs_score_norms(self) -> bool:
        """Whether the learner must measure squared score norms for :meth:`update`."""
        return self.baseline.needs_score_norms

    @property
    def weighs_trajectories(self) -> bool:
        """Whether c_{i,t} = w_i A_i, the same for all tokens, with a weight that knows no advantage."""
        return not (self.surrogate.weighs_by_ratio or self.importance.level.per_token)

    @torch.no_grad()
    def update(self, evidence: Evidence) -> Update:
        """Coefficients of one step for a set of whole groups.

        Independent of how the minibatch is split, as long as groups stay whole. No gradient.

        Raises:
            NonFiniteError: a log-probability, reward, weight or norm is not finite; names the trajectory.
            VcpoError: score norms are needed and missing, or shapes do not fit.
        """
        ratios = log_ratios(evidence.log_probs, evidence.behaviour_log_probs, evidence.mask)
        weights, truncated = self.importance(evidence)
        baselines = self.baseline.values(evidence, weights)
        advantages = self.normalisation.apply(evidence.rewards - baselines, evidence)
        coefficients, clipped = self.surrogate(weights, ratios, advantages, evidence.mask)
        return Update(
            coefficients=coefficients,
            advantages=advantages,
            baselines=baselines,
            log_weights=ratios.sum(-1),
            used_log_weights=weights,
            log_ratios=ratios,
            truncated=truncated if clipped is None else clipped,
        )

    def normalisers(self, action_counts: Num[Tensor, " B"]) -> Float[Tensor, " B"]:
        """n_i of every trajectory, from the action-token counts of the *whole* optimizer minibatch."""
        return self.aggregation.normalisers(action_counts)

    def scale(self, ess_ratio: float | Float[Tensor, ""], on_policy_ratio: float = 1.0) -> float:
        """Factor of the learning rate, at most 1; errors as in :func:`vcpo.estimators.step_scale`."""
        return float(step_scale(ess_ratio, on_policy_ratio, self.step_rule))

    def with_overrides(self, config: AlgorithmConfig) -> Algorithm:
        """This algorithm with the parts that the recipe sets; unset fields keep its own.

        Raises:
            ConfigError: the parts contradict each other.
        """
        changes = {}
        if config.truncation is not None:
            changes["importance"] = replace(self.importance, truncation=config.truncation)
        if config.baseline is not None:
            changes["baseline"] = parts.BASELINES[config.baseline]
        if config.normalise is not None:
            changes["normalisation"] = parts.NORMALISATIONS[config.normalise]
        if config.aggregation is not None:
            changes["aggregation"] = parts.aggregation_named(config.aggregation, config.constant_length)
        if config.step_scale is not None:
            changes["step_rule"] = config.step_scale
        return replace(self, **changes)

    def describe(self) -> str:
        """Formula, paper, settings and departures, a few lines of text for people."""
        lines = [
            f"{self.name}: {self.source}",
            "  update       Σ n_i c_{i,t} ∇log π(y_t)",
            f"  coefficient  {self.surrogate.formula}",
            f"  weights      {self.importance.formula}",
            f"  advantage    {self.normalisation.formula}",
            f"  baseline     {self.baseline.name}: {self.baseline.formula}",
            f"  normaliser   {self.aggregation.name}: {self.aggregation.formula}",
            f"  step         {_STEP_FORMULAS[self.step_rule]}",
        ]
        return "\n".join([*lines, *(f"  departure    {text}" for text in self.departures)])
