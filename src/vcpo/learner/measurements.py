"""The figures that explain a step: importance weights, score norms, lag.

:mod:`vcpo.monitor.glossary` has their meanings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vcpo.estimators.ess import (
    effective_sample_size,
    ess_partials,
    ess_ratio,
    ess_ratio_from_partials,
)
from vcpo.learner.accumulate import Contribution
from vcpo.learner.ranks import ALONE, Ranks
from vcpo.trajectory import Group


@dataclass(frozen=True)
class StepEvidence:
    """What all units of one minibatch measured, flattened."""

    log_weights: Tensor
    """Unclipped sequence log importance weights of the trajectories with sampled tokens."""
    used_log_weights: Tensor
    """Log of the weights that the update used: of the same trajectories, or of every sampled token."""
    token_log_ratios: Tensor
    """[N] log π − log μ of every sampled token."""
    advantages: Tensor
    """[B], or [N] where every token has its own."""
    baselines: Tensor
    """[B] or [N]."""
    limited: Tensor
    """Bool, one entry for each weight that truncation or a mask changed or could have changed."""
    squared_norms: Tensor | None
    """[B]."""
    norm_errors: Tensor | None
    """[B] estimated relative errors of the squared norms."""
    partials: Mapping[str, Tensor]
    """[ranks, 3] what each rank adds to the ESS, by the weights it is of; of one rank alone, nothing."""

    @staticmethod
    def of(contributions: Sequence[Contribution], ranks: Ranks = ALONE) -> StepEvidence:
        """Each rank gives its own contributions; all of them get the same evidence."""
        parts = [(c.update, c.evidence) for c in contributions]
        errors = [c.relative_errors for c in contributions if c.relative_errors is not None]
        norms = [e.squared_score_norms for _, e in parts if e.squared_score_norms is not None]
        # A trajectory without sampled tokens (a failed episode) has weight 1 and no gradient. Where the
        # others have drifted to small weights it would own the ESS; it says nothing about the policies.
        sampled = [e.mask.any(-1) for _, e in parts]
        by_trajectory = parts[0][0].used_log_weights.dim() == 1
        used = [u.used_log_weights if by_trajectory else u.used_log_weights[e.mask] for u, e in parts]
        log_weights = _where([u.log_weights for u, _ in parts], sampled)
        used_log_weights = _where(used, sampled) if by_trajectory else torch.cat(used)
        partials = {}
        if ranks.several:
            for name, own in (("sequence", log_weights), ("used", used_log_weights)):
                partials[name] = ranks.gathered(ess_partials(own)[None])
        return StepEvidence(
            log_weights=_or_one(ranks.gathered(log_weights)),
            used_log_weights=_or_one(ranks.gathered(used_log_weights)),
            token_log_ratios=ranks.gathered(torch.cat([u.log_ratios[e.mask] for u, e in parts])),
            advantages=ranks.gathered(_flat([(u.advantages, e.mask) for u, e in parts])),
            baselines=ranks.gathered(_flat([(u.baselines, e.mask) for u, e in parts])),
            limited=ranks.gathered(_flat([(u.limited, e.mask) for u, e in parts])),
            squared_norms=ranks.gathered(torch.cat(norms)) if norms else None,
            norm_errors=ranks.gathered(torch.cat(errors)) if errors else None,
            partials=partials,
        )

    def ess_ratio(self, weights: str) -> Tensor:
        """Of the ``sequence`` weights, untruncated, or of the weights ``used``. Of many ranks from three
        scalars each, so that they agree to the bit."""
        if weights in self.partials and self.partials[weights][:, 2].any():
            return ess_ratio_from_partials(self.partials[weights])
        return ess_ratio(self.log_weights if weights == "sequence" else self.used_log_weights)

    def metrics(self) -> dict[str, float]:
        lw, ratios = self.log_weights.double(), self.token_log_ratios.double()
        figures = {
            "ess": effective_sample_size(lw),
            "ess_ratio": ess_ratio(lw),
            "log_weight_mean": lw.mean(),
            "log_weight_max": lw.max(),
            "top_weight_share": (lw.max() - lw.logsumexp(0)).exp(),
            "kl": (ratios.exp() - 1 - ratios).mean() if len(ratios) else torch.zeros(()),
            "ratio_variance": ratios.square().mean() if len(ratios) else torch.zeros(()),
            "truncated_fraction": self.limited.float().mean() if len(self.limited) else torch.zeros(()),
            "baseline_mean": self.baselines.mean() if len(self.baselines) else torch.zeros(()),
            "advantage_std": self.advantages.std() if len(self.advantages) > 1 else torch.zeros(()),
            "ess_ratio_truncated": self.ess_ratio("used"),
        }
        if self.squared_norms is not None:
            norms = self.squared_norms.sqrt()
            figures |= {"score_norm_mean": norms.mean(), "score_norm_max": norms.max()}
        if self.norm_errors is not None:
            figures["score_norm_error"] = self.norm_errors.mean()
        return {name: float(value) for name, value in figures.items()}


def critic_metrics(contributions: Sequence[Contribution], ranks: Ranks = ALONE) -> dict[str, float]:
    """How well the critic predicts its targets; each rank gives its own contributions."""
    pairs = [
        (c.update.value_targets[c.evidence.mask], c.update.baselines[c.evidence.mask])
        for c in contributions
        if c.update.value_targets is not None
    ]
    targets, values = (ranks.gathered(torch.cat(part)) for part in zip(*pairs, strict=True))
    spread = targets.var(correction=0) if len(targets) else torch.zeros(())
    explained = 1 - (targets - values).var(correction=0) / spread if spread > 0 else torch.zeros(())
    return {
        "value_loss": total_of([c.value_loss for c in contributions], ranks),
        "value_explained": float(explained),
    }


def _flat(tables: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[B] entries as they are, [B, T] ones inside their mask."""
    return torch.cat([table[mask] if table.dim() == 2 else table for table, mask in tables])


def _where(parts: Sequence[Tensor], sampled: Sequence[Tensor]) -> Tensor:
    """Entries of trajectories with sampled tokens."""
    return torch.cat([part[keep] for part, keep in zip(parts, sampled, strict=True)])


def _or_one(log_weights: Tensor) -> Tensor:
    """A single weight of 1 where there is none at all."""
    return log_weights if len(log_weights) else torch.zeros(1)


def total_of(own: Sequence[float], ranks: Ranks) -> float:
    """Over all contributions of all ranks."""
    return ranks.total(sum(own)) if ranks.several else sum(own)


def group_metrics(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Figures of the rollouts themselves; lag is ``version`` − the oldest version in a group."""
    trajectories = [t for g in groups for t in g.trajectories]
    rewards = np.array([t.reward for t in trajectories])
    actions = np.array([t.action_count for t in trajectories])
    lags = [version - g.oldest_version for g in groups]
    sampled = np.concatenate([t.versions[t.action_mask] for t in trajectories])
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "equal_groups": float(np.mean([len(set(g.rewards)) == 1 for g in groups])),
        "tokens": int(sum(len(t.tokens) for t in trajectories)),
        "action_tokens": int(actions.sum()),
        "response_length": float(actions.mean()),
        "lag_mean": float(np.mean(lags)),
        "lag_max": max(lags),
        "token_lag_mean": float((version - sampled).mean()) if len(sampled) else 0.0,
        "lag_histogram": dict(sorted(Counter(lags).items())),
        "failed_episodes": sum(t.outcome == "failed" for t in trajectories),
        "truncated_episodes": sum(t.outcome == "truncated" for t in trajectories),
    }
