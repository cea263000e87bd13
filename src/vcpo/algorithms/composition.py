"""An algorithm is a frozen composition of parts; the learner reads it and knows no names.

    importance level and shape × baseline or critic × normalisation × token mask × penalty × aggregation
    × step scale

One step, with n, c and A of the parts: Δθ ∝ scale · Σ_{i,t} n_i c_{i,t} ∇log π(y_{i,t}), where
c = sg(w) A on the tokens that the mask keeps, plus the penalty. Every policy gradient here has this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from vcpo.algorithms import parts
from vcpo.algorithms.parts import Evidence
from vcpo.errors import ConfigError
from vcpo.estimators.ess import StepRule, step_scale
from vcpo.estimators.importance import log_ratios
from vcpo.estimators.shaping import overlong_penalty
from vcpo.estimators.surrogates import policy_gradient_coefficients

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Num
    from torch import Tensor

    from vcpo.config import AlgorithmConfig

__all__ = ["Algorithm", "Evidence", "Update"]

_STEP_FORMULAS = {"sqrt": "η · sqrt(min(1, ρ / ρ_on))", "linear": "η · min(1, ρ / ρ_on)", "off": "η"}
_ESS_FORMULAS = {
    "sequence": "ρ the ESS ratio of untruncated sequence weights",
    "used": "ρ the ESS ratio of the weights used",
}


@dataclass(frozen=True)
class Update:
    """What an algorithm makes of the evidence; all detached. [B], or [B, T] where every token has its own."""

    coefficients: Float[Tensor, "B T"]
    """c_{i,t} of every token, 0 outside the mask; the normaliser n_i is *not* included."""
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"]
    """(R − b), divided as the normalisation says; or the critic's."""
    baselines: Float[Tensor, " B"] | Float[Tensor, "B T"]
    """b of every trajectory or token; with a critic its values."""
    log_weights: Float[Tensor, " B"]
    """Sequence level and never truncated, whatever the algorithm uses."""
    used_log_weights: Float[Tensor, " B"] | Float[Tensor, "B T"]
    """Of the weights that the update uses, shaped; 0 where it uses none."""
    log_ratios: Float[Tensor, "B T"]
    """Of every sampled token, 0 outside the mask."""
    limited: Bool[Tensor, " B"] | Bool[Tensor, "B T"]
    """Where truncation, another shape or a token mask was active: [B] for one weight a trajectory."""
    value_targets: Float[Tensor, "B T"] | None = None
    """What the critic shall predict; None without one."""

    def rows(self, places: Sequence[int]) -> Update:
        """Of some trajectories alone."""
        chosen: dict[str, Any] = {k: None if v is None else v[list(places)] for k, v in vars(self).items()}
        return Update(**chosen)


@dataclass(frozen=True)
class Algorithm:
    """A named composition.

    Raises:
        ConfigError: the parts contradict each other (the message says which and what to do).
    """

    name: str
    summary: str
    """What it does, in one line."""
    source: str
    """Paper, and where its settings come from."""
    importance: parts.Importance = parts.NO_IMPORTANCE
    baseline: parts.CreditAssignment = parts.GROUP_MEAN
    normalisation: parts.Normalisation = parts.NO_NORMALISATION
    token_masks: tuple[parts.TokenMask, ...] = ()
    """A token is left out if any of them leaves it out."""
    penalty: parts.Penalty = parts.NO_PENALTY
    aggregation: parts.Aggregation = parts.SEQUENCE_MEAN
    step_rule: StepRule = "off"
    ess_weights: Literal["sequence", "used"] = "sequence"
    """Which weights the step's ESS is taken of."""
    overlong: float = 0.0
    """Part of the longest answer over which a length penalty rises to 1; 0: none."""
    dynamic_sampling: bool = False
    """Whether groups with equal rewards are replaced by others."""
    departures: tuple[str, ...] = ()
    """Where it differs from its source, one sentence each."""

    def __post_init__(self) -> None:
        if self.baseline.needs_score_norms and self.importance.level.per_token:
            raise ConfigError(
                f"{self.name}: the {self.baseline.name} baseline needs one weight a trajectory, and this "
                "algorithm weighs every token; choose another algorithm.baseline or algorithm.level"
            )
        if self.baseline.needs_score_norms and any(isinstance(m, parts.Within) for m in self.token_masks):
            raise ConfigError(
                f"{self.name} leaves trajectories out, which the {self.baseline.name} baseline would follow "
                "all the same; choose another algorithm.baseline"
            )
        if self.needs_values and self.normalisation is not parts.NO_NORMALISATION:
            raise ConfigError(
                f"{self.name}: advantages of a critic are not divided by the deviation of a group; leave "
                "algorithm.normalise unset, or set algorithm.baseline"
            )
        if not self.importance.level.corrects and any(isinstance(m, parts.Within) for m in self.token_masks):
            raise ConfigError(
                f"{self.name}: without importance weights none is too large; set another algorithm.level"
            )
        if any(clip.level is None for clip in self._clips):
            if not self.importance.level.corrects:
                raise ConfigError(f"{self.name}: without importance weights there is nothing to clip")
            if isinstance(self.importance.shape, parts.Truncated):
                raise ConfigError(f"{self.name} clips its weights already; leave algorithm.truncation unset")

    @property
    def _clips(self) -> list[parts.Clip]:
        return [mask for mask in self.token_masks if isinstance(mask, parts.Clip)]

    @property
    def needs_score_norms(self) -> bool:
        """Whether the learner must measure squared score norms for :meth:`update`."""
        return self.baseline.needs_score_norms

    @property
    def needs_distributions(self) -> bool:
        """Whether it must measure entropies and energies of the tokens' distributions."""
        return any(part.needs_distributions for part in (self.baseline, *self.token_masks))

    @property
    def needs_values(self) -> bool:
        """Whether it must have a critic."""
        return self.baseline.needs_values

    @property
    def spans_minibatch(self) -> bool:
        """Whether :meth:`update` must see the whole minibatch at once, and not group by group."""
        choices = (self.importance.shape, self.penalty, *self.token_masks)
        return any(part.spans_minibatch for part in choices)

    @property
    def weighs_trajectories(self) -> bool:
        """Whether c_{i,t} = w_i A_i, one for all tokens, with a weight that knows no other trajectory."""
        return self.weighs_tokens_alike and not self.importance.shape.needs_group and not self.spans_minibatch

    @property
    def weighs_tokens_alike(self) -> bool:
        """Whether all tokens of a trajectory have one coefficient, whatever the evidence."""
        return (
            not self.importance.level.per_token
            and not self.baseline.per_token
            and not self.token_masks
            and self.penalty is parts.NO_PENALTY
        )

    @torch.no_grad()
    def update(self, evidence: Evidence) -> Update:
        """Coefficients of one step for a set of whole groups; of all of them if ``spans_minibatch``.

        Independent of how the minibatch is split, as long as groups stay whole. No gradient.

        Raises:
            NonFiniteError: a log-probability, reward, weight or norm is not finite; names the trajectory.
            VcpoError: something that is needed is missing in the evidence, or shapes do not fit.
        """
        ratios = log_ratios(evidence.log_probs, evidence.behaviour_log_probs, evidence.mask)
        weights, limited = self.importance(evidence)
        credit = self.baseline(evidence, weights)
        advantages = self.normalisation.apply(credit.advantages, evidence)
        inside = evidence.mask.bool()
        kept = inside
        factors: Tensor | float = 1.0
        for mask in self.token_masks:
            own = mask(evidence, self.importance.level, advantages)
            if mask.renormalises:
                factors = factors * self.aggregation.renormalise(own, inside).to(advantages)
            limited = inside & ((limited if limited.dim() == 2 else limited[:, None]) | ~own)
            kept = kept & own
        # Of kept tokens alone: a weight that is left out may be too large for any number.
        coefficients = policy_gradient_coefficients(weights, advantages, kept) * factors
        penalty = self.penalty(evidence)
        return Update(
            coefficients=coefficients if penalty is None else coefficients + penalty,
            advantages=advantages,
            baselines=credit.baselines,
            log_weights=ratios.sum(-1),
            used_log_weights=weights,
            log_ratios=ratios,
            limited=limited,
            value_targets=credit.value_targets,
        )

    def shaped_rewards(
        self, rewards: Float[Tensor, " B"], turn_lengths: Num[Tensor, " B"], longest: int
    ) -> Float[Tensor, " B"]:
        """Rewards less the penalty for overlong answers. ``turn_lengths``: tokens of the longest turn of each
        trajectory; ``longest``: sampled tokens a turn may have, 0 if that is not known."""
        if not (self.overlong and longest):
            return rewards
        return rewards + overlong_penalty(turn_lengths, longest, self.overlong * longest).to(rewards)

    def normalisers(self, action_counts: Num[Tensor, " B"]) -> Float[Tensor, " B"]:
        """n_i of every trajectory, from the action-token counts of the *whole* optimizer minibatch."""
        return self.aggregation.normalisers(action_counts)

    def scale(self, ess_ratio: float | Float[Tensor, ""], on_policy_ratio: float = 1.0) -> float:
        """Factor of the learning rate, at most 1; errors as in :func:`vcpo.estimators.step_scale`."""
        return float(step_scale(ess_ratio, on_policy_ratio, self.step_rule))

    def with_overrides(self, config: AlgorithmConfig) -> Algorithm:
        """This algorithm with the parts that the recipe sets; unset fields keep its own.

        Raises:
            ConfigError: the parts contradict each other, or a setting is of a part that this one has not.
        """
        changes = {}
        importance = self.importance
        if config.level is not None:
            importance = replace(importance, level=parts.LEVELS[config.level])
        if config.truncation is not None:
            if not isinstance(importance.shape, parts.Whole | parts.Truncated):
                raise ConfigError(
                    f"{self.name} shapes its weights otherwise ({importance.shape.formula}): leave "
                    "algorithm.truncation unset"
                )
            importance = replace(importance, shape=parts.Truncated(config.truncation))
        if importance is not self.importance:
            changes["importance"] = importance
        if config.baseline is not None or config.margin is not None:
            changes["baseline"] = self._with_baseline(config.baseline or self.baseline.name, config.margin)
        if config.normalise is not None:
            changes["normalisation"] = parts.NORMALISATIONS[config.normalise]
        if config.clip_low is not None or config.clip_high is not None:
            changes["token_masks"] = self._with_clip(config.clip_low, config.clip_high)
        name = config.aggregation or self.aggregation.name
        if config.constant_length is not None and name != "constant":
            raise ConfigError(
                f"algorithm.constant_length is of the aggregation constant, and {self.name} has {name}; "
                'set algorithm.aggregation = "constant"'
            )
        if config.aggregation is not None or config.constant_length is not None:
            length = config.constant_length or parts.CONSTANT_LENGTH
            changes["aggregation"] = parts.aggregation_named(name, length)
        if config.step_scale is not None:
            changes["step_rule"] = config.step_scale
        if config.ess_weights is not None:
            changes["ess_weights"] = config.ess_weights
        return replace(self, **changes) if changes else self

    def _with_baseline(self, name: str, margin: float | None) -> parts.Baseline:
        if margin is not None and name not in ("below-mean", "bounded-optimal"):
            raise ConfigError(
                "algorithm.margin is of the baselines below-mean and bounded-optimal, and that of "
                f"{self.name} is {name}; set another algorithm.baseline"
            )
        return parts.baseline_named(name, parts.MARGIN if margin is None else margin)

    def _with_clip(self, low: float | None, high: float | None) -> tuple[parts.TokenMask, ...]:
        if not self._clips:
            raise ConfigError(f"algorithm.clip_low and clip_high: {self.name} has no clip")
        bounds = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
        return tuple(
            replace(mask, **bounds) if isinstance(mask, parts.Clip) else mask for mask in self.token_masks
        )

    def describe(self) -> str:
        """Formula, paper, settings and departures, a few lines of text for people."""
        penalty = self.penalty.formula
        lines = [
            f"{self.name}: {self.summary}",
            f"  source       {self.source}",
            "  update       Σ n_i c_{i,t} ∇log π(y_t)",
            f"  coefficient  c = sg(w) · A{f' {penalty}' if penalty else ''}",
            *(f"  mask         {mask.formula}" for mask in self.token_masks),
            f"  weights      {self.importance.formula}",
            f"  baseline     {self.baseline.name}: {self.baseline.formula}",
            *([] if self.needs_values else [f"  advantage    {self.normalisation.formula}"]),
            f"  normaliser   {self.aggregation.name}: {self.aggregation.formula}",
            f"  step         {_STEP_FORMULAS[self.step_rule]}"
            + ("" if self.step_rule == "off" else f", {_ESS_FORMULAS[self.ess_weights]}"),
        ]
        if self.overlong:
            lines.append(
                f"  rewards      less up to 1, linearly, over the last {self.overlong:.0%} of the limit"
            )
        if self.dynamic_sampling:
            lines.append("  sampling     groups with equal rewards are replaced (pipeline.dynamic_sampling)")
        return "\n".join([*lines, *(f"  departure    {text}" for text in self.departures)])
