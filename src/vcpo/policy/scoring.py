"""Log-ratios of whole sets of trajectories, as the learner computes them, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vcpo.policy.loading import Policy
from vcpo.policy.log_probs import LOGIT_BUDGET, TokenLogProbs, keeps_packed_apart
from vcpo.policy.packing import micro_batches, pack
from vcpo.trajectory import Trajectory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Scorer:
    """log π − log μ of every sampled token: the learner's log-prob less the one that the sampler recorded.

    Packing, micro-batches and log-probs are those of the learner's own steps.
    """

    def __init__(
        self,
        policy: Policy,
        token_budget: int,
        *,
        temperature: float = 1.0,
        logit_budget: int = LOGIT_BUDGET,
    ) -> None:
        self._device, self._budget = policy.model.device, token_budget
        self._packed = keeps_packed_apart(policy.model)
        self._log_probs = TokenLogProbs(policy.model, temperature=temperature, logit_budget=logit_budget)

    @torch.no_grad()
    def log_ratios(
        self, trajectories: Sequence[Trajectory], on_scored: Callable[[], None] = lambda: None
    ) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """[B, T] log-ratios in float64, sampled tokens first, and where there are any.

        ``on_scored`` is called for every trajectory that is done.
        """
        width = max((t.action_count for t in trajectories), default=0)
        table = torch.zeros(len(trajectories), width, dtype=torch.float64)
        mask = torch.zeros(len(trajectories), width, dtype=torch.bool)
        groups = list(range(len(trajectories)))
        units = micro_batches(trajectories, groups, self._budget, packed=self._packed)
        for members in (batch for unit in units for batch in unit):
            rows = pack([trajectories[i] for i in members], packed=self._packed)
            found = rows.spread(self._log_probs(rows.to(self._device)).double().cpu())
            for place, values in zip(members, found, strict=True):
                trajectory = trajectories[place]
                recorded = trajectory.log_probs[trajectory.action_mask].astype(np.float64)
                table[place, : len(recorded)] = values[: len(recorded)] - torch.from_numpy(recorded)
                mask[place, : len(recorded)] = True
                on_scored()
        return table, mask
