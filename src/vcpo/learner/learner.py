"""One optimizer step: from a minibatch of groups to new weights and the figures that explain the step.

A minibatch is cut into units that hold whole groups (:mod:`vcpo.policy.packing`). For each unit:

1. forward: log π of the sampled tokens, and, if the algorithm's baseline asks for it, the squared norm of
   each trajectory's score from one backward over activations only;
2. the algorithm turns this evidence into one coefficient for each sampled token;
3. backward of −Σ nᵢ cᵢₜ log π(yᵢₜ), on the same graph if the unit is one micro-batch, else after a second
   forward of each micro-batch.

Then, once for the minibatch: ESS ratio → step scale, gradient-norm clip, scaled step. Normalisers nᵢ are
those of the whole minibatch, so the update is the same however it was cut. The learner reads the
composition and knows no algorithm by name.

Departures from the official code: the norm is of nᵢ ∇log π (what the update adds up), importance weights
enter it once, and no trajectory needs a backward pass of its own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo.algorithms.composition import Algorithm, Evidence, Update
from vcpo.config import LearnerConfig
from vcpo.errors import NonFiniteError, VcpoError
from vcpo.learner.measurements import StepEvidence, group_metrics
from vcpo.learner.optimizer import ScaledAdamW
from vcpo.policy.loading import Policy
from vcpo.policy.log_probs import keeps_packed_apart, sampled_log_probs
from vcpo.policy.packing import PackedRows, micro_batches, pack
from vcpo.scores.tape import ScoreTape
from vcpo.trajectory import Group, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Measured:
    """What the forward of one micro-batch gave."""

    members: list[int]
    rows: PackedRows
    log_probs: Tensor
    """[N]; carries the graph if the backward is to reuse it."""
    squared_norms: Tensor | None
    """[B] of nᵢ ∇log π, detached."""


@dataclass(frozen=True)
class _Minibatch:
    trajectories: list[Trajectory]
    groups: list[int]
    normalisers: Tensor
    """[B] float32."""
    rewards: Tensor
    """[B] float32."""


class Learner:
    """Takes optimizer steps on a policy by one algorithm."""

    def __init__(
        self, policy: Policy, algorithm: Algorithm, config: LearnerConfig, on_policy_ratio: float = 1.0
    ) -> None:
        self.policy, self.algorithm = policy, algorithm
        self._config, self._on_policy_ratio = config, on_policy_ratio
        self.optimizer = ScaledAdamW(policy.model.named_parameters(), config)
        self._packed = keeps_packed_apart(policy.model)
        if not self._packed:
            name = type(policy.model).__name__
            log.warning(
                "%s does not keep packed sequences apart: each trajectory gets a row of its own", name
            )
        # Made here, so that an unsupported layer is named before anything is sampled.
        self._tape = ScoreTape(policy.model) if algorithm.needs_score_norms else None

    @property
    def version(self) -> int:
        """Number of steps taken: the version of the current weights."""
        return self.optimizer.steps

    def step(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Train on ``groups`` once and return the step's metrics (``monitor.glossary`` explains them)."""
        begun = time.perf_counter()
        batch = self._minibatch(groups)
        self.optimizer.zero_grad()
        loss, parts = 0.0, []
        for unit in self._units(batch):
            part, unit_loss = self._accumulate(unit, batch)
            parts.append(part)
            loss += unit_loss
        evidence = StepEvidence.of(parts)
        scale = float(self.algorithm.scale(evidence.ess_ratio, self._on_policy_ratio))
        grad_norm = self.optimizer.clip()
        version = self.version
        learning_rate = self.optimizer.step(scale)
        return {
            "loss": loss,
            "on_policy_ratio": self._on_policy_ratio,
            "step_scale": scale,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            **evidence.metrics(),
            **group_metrics(groups, version),
            "seconds_training": time.perf_counter() - begun,
        }

    def _minibatch(self, groups: Sequence[Group]) -> _Minibatch:
        if not groups:
            raise VcpoError("a step needs at least one group")
        trajectories = [t for g in groups for t in g.trajectories]
        for i, t in enumerate(trajectories):
            if t.action_mask[:1].any():
                raise VcpoError(
                    f"trajectory {i} begins with a sampled token: an episode must observe a prompt first"
                )
        counts = torch.tensor([t.action_count for t in trajectories])
        return _Minibatch(
            trajectories=trajectories,
            groups=[g for g, group in enumerate(groups) for _ in group.trajectories],
            normalisers=self.algorithm.normalisers(counts),
            rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        )

    def _units(self, batch: _Minibatch) -> list[list[list[int]]]:
        budget = self._config.token_budget
        return micro_batches(batch.trajectories, batch.groups, budget, packed=self._packed)

    def _accumulate(self, unit: list[list[int]], batch: _Minibatch) -> tuple[tuple[Update, Evidence], float]:
        """Add one unit's gradient to the parameters'; what was measured, and the unit's loss."""
        keep_graph = len(unit) == 1
        measured = [self._measure(members, batch, keep_graph=keep_graph) for members in unit]
        evidence = _evidence(measured, batch)
        with _naming([i for part in measured for i in part.members]):
            update = self.algorithm.update(evidence)
        loss, begin = 0.0, 0
        for part in measured:
            end = begin + len(part.members)
            coefficients = update.coefficients[begin:end, : part.rows.width]
            begin = end
            weighted = (coefficients * batch.normalisers[part.members, None])[
                part.rows.action_owners.cpu(), part.rows.action_places.cpu()
            ]
            log_probs = part.log_probs if keep_graph else sampled_log_probs(self.policy.model, part.rows)
            objective = -(weighted.to(log_probs) * log_probs).sum()
            objective.backward()
            loss += float(objective.detach())
        return (update, evidence), loss

    def _measure(self, members: list[int], batch: _Minibatch, *, keep_graph: bool) -> _Measured:
        model = self.policy.model
        pad = model.config.get_text_config().pad_token_id or 0
        rows = pack([batch.trajectories[i] for i in members], pad_id=pad, packed=self._packed).to(
            model.device
        )
        if self._tape is None:
            with torch.set_grad_enabled(keep_graph):
                return _Measured(members, rows, sampled_log_probs(model, rows), None)
        with self._tape as tape:
            log_probs = sampled_log_probs(model, rows)
        normalisers = batch.normalisers[members].to(log_probs)
        objective = (normalisers[rows.action_owners] * log_probs).sum()
        with _naming(members):
            norms = tape.squared_norms(objective, rows.segments, rows.count, retain_graph=keep_graph)
        return _Measured(members, rows, log_probs if keep_graph else log_probs.detach(), norms)


@contextlib.contextmanager
def _naming(members: Sequence[int]) -> Generator[None]:
    """Within it, a part of the minibatch is measured: ``members`` are its trajectories. An error that names
    a trajectory by its place in the part is raised again with its place in the minibatch."""
    try:
        yield
    except NonFiniteError as error:
        if error.index is None:
            raise
        raise NonFiniteError(error.quantity, members[error.index], error.hint) from None


def _evidence(measured: list[_Measured], batch: _Minibatch) -> Evidence:
    """Gather a unit's micro-batches into one [B, A] table on the CPU."""
    members = [i for part in measured for i in part.members]
    trajectories = [batch.trajectories[i] for i in members]
    width = max(part.rows.width for part in measured)
    log_probs = torch.zeros(len(members), width, dtype=torch.float32)
    behaviour = torch.zeros_like(log_probs)
    mask = torch.zeros(len(members), width, dtype=torch.bool)
    begin = 0
    for part in measured:
        end = begin + len(part.members)
        log_probs[begin:end, : part.rows.width] = part.rows.spread(part.log_probs.detach()).float().cpu()
        begin = end
    for row, trajectory in enumerate(trajectories):
        sampled = torch.from_numpy(trajectory.log_probs[trajectory.action_mask])
        behaviour[row, : len(sampled)] = sampled
        mask[row, : len(sampled)] = True
    norms = [part.squared_norms for part in measured if part.squared_norms is not None]
    return Evidence(
        log_probs=log_probs,
        behaviour_log_probs=behaviour,
        mask=mask,
        rewards=batch.rewards[members],
        groups=torch.tensor([batch.groups[i] for i in members]),
        squared_score_norms=torch.cat(norms).cpu() if norms else None,
    )
