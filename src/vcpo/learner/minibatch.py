"""A minibatch as the learner sees it, and the evidence that its parts give to an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vcpo.algorithms.composition import Algorithm, Evidence
from vcpo.errors import VcpoError
from vcpo.policy.packing import PackedRows
from vcpo.trajectory import Group, Trajectory


@dataclass(frozen=True)
class Minibatch:
    """All trajectories of one optimizer step."""

    trajectories: list[Trajectory]
    groups: list[int]
    """Group of each trajectory."""
    normalisers: Tensor
    """n_i, [B] float32: those of the whole minibatch, however it is cut."""
    rewards: Tensor
    """[B] float32."""

    @staticmethod
    def of(groups: Sequence[Group], algorithm: Algorithm) -> Minibatch:
        """Raises VcpoError if there is no group, or a trajectory begins with a sampled token."""
        if not groups:
            raise VcpoError("a step needs at least one group")
        trajectories = [t for g in groups for t in g.trajectories]
        for i, t in enumerate(trajectories):
            if t.action_mask[:1].any():
                raise VcpoError(
                    f"trajectory {i} begins with a sampled token: an episode must observe a prompt first"
                )
        counts = torch.tensor([t.action_count for t in trajectories])
        return Minibatch(
            trajectories=trajectories,
            groups=[g for g, group in enumerate(groups) for _ in group.trajectories],
            normalisers=algorithm.normalisers(counts),
            rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        )


@dataclass(frozen=True)
class Measured:
    """What the forward pass of one micro-batch gave, and perhaps its backward pass."""

    members: list[int]
    """Places in the minibatch."""
    rows: PackedRows
    log_probs: Tensor
    """[N] of the sampled tokens, detached."""
    squared_norms: Tensor | None = None
    """[B] of nᵢ ∇log π, detached."""
    relative_errors: Tensor | None = None
    """[B] of the squared norms."""


def evidence_of(parts: Sequence[Measured], batch: Minibatch) -> Evidence:
    """Gather micro-batches into one [B, A] table on the CPU, in their order."""
    members = [i for part in parts for i in part.members]
    trajectories = [batch.trajectories[i] for i in members]
    width = max(part.rows.width for part in parts)
    log_probs = torch.zeros(len(members), width, dtype=torch.float32)
    behaviour = torch.zeros_like(log_probs)
    mask = torch.zeros(len(members), width, dtype=torch.bool)
    begin = 0
    for part in parts:
        end = begin + len(part.members)
        log_probs[begin:end, : part.rows.width] = part.rows.spread(part.log_probs).float().cpu()
        begin = end
    for row, trajectory in enumerate(trajectories):
        sampled = torch.from_numpy(trajectory.log_probs[trajectory.action_mask])
        behaviour[row, : len(sampled)] = sampled
        mask[row, : len(sampled)] = True
    norms = [part.squared_norms for part in parts if part.squared_norms is not None]
    return Evidence(
        log_probs=log_probs,
        behaviour_log_probs=behaviour,
        mask=mask,
        rewards=batch.rewards[members],
        groups=torch.tensor([batch.groups[i] for i in members]),
        squared_score_norms=torch.cat(norms).cpu() if norms else None,
    )
