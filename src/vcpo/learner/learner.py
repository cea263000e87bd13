"""One optimizer step: from a minibatch of groups to new weights and the figures that explain the step.

A minibatch is cut into units that hold whole groups (:mod:`vcpo.policy.packing`). For each unit
(:mod:`vcpo.learner.accumulate`):

1. forward: log π of the sampled tokens, and, if the algorithm's baseline asks for it, the squared norm of
   each trajectory's score;
2. the algorithm turns this evidence into one coefficient for each sampled token;
3. the gradient −Σ nᵢ cᵢₜ ∇log π(yᵢₜ) is added to the parameters'.

Then, once for the minibatch: ESS ratio → step scale, gradient-norm clip, scaled step. Normalisers nᵢ are
those of the whole minibatch, so the update is the same however it was cut. The learner reads the
composition and knows no algorithm by name.

Departures from the official code: the norm is of nᵢ ∇log π (what the update adds up), importance weights
enter it once, and no trajectory needs a backward pass of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vcpo.algorithms.composition import Algorithm
from vcpo.config import LearnerConfig
from vcpo.learner.accumulate import Accumulator
from vcpo.learner.across_ranks import RanksAccumulator
from vcpo.learner.critic import Critic
from vcpo.learner.measurements import StepEvidence, critic_metrics, group_metrics, total_of
from vcpo.learner.minibatch import Minibatch
from vcpo.learner.optimizer import ScaledAdamW
from vcpo.learner.ranks import ALONE, Ranks
from vcpo.learner.sharding import shard
from vcpo.policy.loading import Policy
from vcpo.policy.log_probs import keeps_packed_apart
from vcpo.trajectory import Group

log = logging.getLogger(__name__)


OnPolicyRatio = Callable[[Tensor], float]
"""From the sampled tokens of each trajectory in a minibatch, [B], to the ESS ratio of on-policy data."""


class Learner:
    """Takes optimizer steps on a policy by one algorithm."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        config: LearnerConfig,
        on_policy_ratio: float | OnPolicyRatio = 1.0,
        *,
        temperature: float = 1.0,
        longest_answer: int = 0,
        step_scales: Sequence[float] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """``temperature``: the policy is softmax(logits / temperature), as the sampler samples it.
        ``longest_answer``: sampled tokens a turn may have, for algorithms that punish overlong ones.
        ``step_scales``: the factor of every step, in place of what the algorithm makes of the ESS ratio.
        ``ranks``: who shares this learner. Each of them has the whole policy, which is sharded here."""
        self.policy, self.algorithm, self._step_scales, self.ranks = policy, algorithm, step_scales, ranks
        self._on_policy_ratio, self._longest_answer = on_policy_ratio, longest_answer
        self.critic = Critic(policy, config, ranks) if algorithm.needs_values else None
        if ranks.several:
            shard(policy.model, ranks)
        self._masks_prefix = config.mask_off_policy_prefix
        self.optimizer = ScaledAdamW(policy.model.named_parameters(), config)
        packed = keeps_packed_apart(policy.model)
        if not packed:
            name = type(policy.model).__name__
            log.warning(
                "%s does not keep packed sequences apart: each trajectory gets a row of its own", name
            )
        settings: dict[str, Any] = {
            "packed": packed,
            "score_norms": config.score_norms,
            "logit_budget": config.logit_budget,
            "temperature": temperature,
            "critic": self.critic,
        }
        self._accumulator = (
            RanksAccumulator(ranks, policy, algorithm, config.token_budget, **settings)
            if ranks.several
            else Accumulator(policy, algorithm, config.token_budget, **settings)
        )

    @property
    def version(self) -> int:
        """Number of steps taken: the version of the current weights."""
        return self.optimizer.steps

    def step(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Train on ``groups`` once and return the step's metrics (``monitor.glossary`` explains them). Every
        rank must be given the same groups; they return the same."""
        begun = time.perf_counter()
        version = self.version
        batch = Minibatch.of(
            groups,
            self.algorithm,
            version=version,
            longest_answer=self._longest_answer,
            mask_off_policy_prefix=self._masks_prefix,
        )
        self.optimizer.zero_grad()
        if self.critic is not None:
            self.critic.optimizer.zero_grad()
        parts = self._accumulator.accumulate(batch)
        evidence = StepEvidence.of(parts, self.ranks)
        on_policy_ratio = self._on_policy_ratio_of(batch)
        if self._step_scales is None:
            ess_ratio = evidence.ess_ratio(self.algorithm.ess_weights)
            scale = float(self.algorithm.scale(ess_ratio, on_policy_ratio))
        else:
            scale = self._step_scales[version]
        grad_norm = self.optimizer.clip()
        if self.critic is not None:  # before any step is taken: a broken gradient costs neither of them one
            self.critic.optimizer.clip()
        learning_rate = self.optimizer.step(scale)
        if self.critic is not None:
            self.critic.optimizer.step(1.0)
        return {
            "loss": total_of([part.loss for part in parts], self.ranks),
            "on_policy_ratio": on_policy_ratio,
            "step_scale": scale,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            **evidence.metrics(),
            **(critic_metrics(parts, self.ranks) if self.critic is not None else {}),
            **group_metrics(groups, version),
            **({"masked_tokens": batch.masked_tokens} if self._masks_prefix else {}),
            "seconds_training": time.perf_counter() - begun,
        }

    def _on_policy_ratio_of(self, batch: Minibatch) -> float:
        """Of the trajectories that enter the ESS: those with sampled tokens."""
        if not callable(self._on_policy_ratio):
            return self._on_policy_ratio
        lengths = [count for t in batch.trajectories if (count := t.action_count)]
        return self._on_policy_ratio(torch.tensor(lengths)) if lengths else 1.0
