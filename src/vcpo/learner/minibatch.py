"""A minibatch as the learner sees it, and the evidence that its parts give to an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
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
    """[B] float32, as the algorithm shapes them."""
    version: int = 0
    """The learner's, before the step."""
    masked_tokens: int = 0
    """Sampled tokens that were taken out of the loss as off-policy prefixes."""

    @property
    def action_tokens(self) -> int:
        return sum(t.action_count for t in self.trajectories)

    @staticmethod
    def of(
        groups: Sequence[Group],
        algorithm: Algorithm,
        *,
        version: int = 0,
        longest_answer: int = 0,
        mask_off_policy_prefix: bool = False,
    ) -> Minibatch:
        """``longest_answer``: sampled tokens a turn may have, for algorithms that punish overlong ones: by
        the longest turn of an episode.
        ``mask_off_policy_prefix``: of each trajectory only what its newest version sampled is trained on
        (:func:`without_off_policy_prefix`); weights, ESS and normalisers are of these tokens too.

        Raises VcpoError if there is no group, or a trajectory begins with a sampled token.
        """
        if not groups:
            raise VcpoError("a step needs at least one group")
        whole = [t for g in groups for t in g.trajectories]
        trajectories = [without_off_policy_prefix(t) for t in whole] if mask_off_policy_prefix else whole
        for i, t in enumerate(trajectories):
            if t.action_mask[:1].any():
                raise VcpoError(
                    f"trajectory {i} begins with a sampled token: an episode must observe a prompt first"
                )
        lengths = torch.tensor([t.action_count for t in whole])
        counts = torch.tensor([t.action_count for t in trajectories])
        turns = torch.tensor([longest_turn(t) for t in whole])
        rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float32)
        return Minibatch(
            trajectories=trajectories,
            groups=[g for g, group in enumerate(groups) for _ in group.trajectories],
            normalisers=algorithm.normalisers(counts),
            rewards=algorithm.shaped_rewards(rewards, turns, longest_answer),
            version=version,
            masked_tokens=int(lengths.sum() - counts.sum()),
        )


def longest_turn(trajectory: Trajectory) -> int:
    """Tokens of the longest stretch that was sampled without an observation between."""
    edges = np.flatnonzero(np.diff(trajectory.action_mask.astype(np.int8), prepend=0, append=0))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def without_off_policy_prefix(trajectory: Trajectory) -> Trajectory:
    """The trajectory with the tokens out of its action mask that an older version sampled than its newest.

    What Slime does with partial rollouts (``mask_offpolicy_in_partial_rollout``): the prefix conditions the
    rest and is not trained on itself. A trajectory of a single version is returned as it is.
    """
    mask = trajectory.action_mask
    if not mask.any():
        return trajectory
    newest = trajectory.versions[mask].max()
    kept = mask & (trajectory.versions == newest)
    return trajectory if kept.sum() == mask.sum() else replace(trajectory, action_mask=kept)


@dataclass(frozen=True)
class Figures:
    """What was measured of some trajectories: of one micro-batch, or of all that a rank had."""

    members: list[int]
    """Places in the minibatch."""
    log_probs: Tensor
    """[N] of the sampled tokens, trajectory by trajectory, detached."""
    squared_norms: Tensor | None = None
    """[B] of nᵢ ∇log π, detached."""
    relative_errors: Tensor | None = None
    """[B] of the squared norms."""
    distributions: Tensor | None = None
    """[2, N] entropy and energy of the distribution of each sampled token."""
    values: Tensor | None = None
    """[N] the critic's, detached."""


@dataclass(frozen=True, kw_only=True)
class Measured(Figures):
    """What the forward pass of one micro-batch gave, and perhaps its backward pass."""

    rows: PackedRows


def evidence_of(parts: Sequence[Figures], batch: Minibatch) -> Evidence:
    """Gather micro-batches into one [B, A] table on the CPU, in their order."""
    members = [i for part in parts for i in part.members]
    trajectories = [batch.trajectories[i] for i in members]
    width = max([1, *(t.action_count for t in trajectories)])
    behaviour = torch.zeros(len(members), width, dtype=torch.float32)
    lags = torch.zeros(len(members), width, dtype=torch.long)
    mask = torch.zeros(len(members), width, dtype=torch.bool)
    for row, trajectory in enumerate(trajectories):
        sampled = torch.from_numpy(trajectory.log_probs[trajectory.action_mask])
        behaviour[row, : len(sampled)] = sampled
        versions = torch.from_numpy(trajectory.versions[trajectory.action_mask].astype("int64"))
        lags[row, : len(sampled)] = batch.version - versions
        mask[row, : len(sampled)] = True
    norms = [part.squared_norms for part in parts if part.squared_norms is not None]
    entropies, energies = (
        _table([None if p.distributions is None else p.distributions[k] for p in parts], mask) for k in (0, 1)
    )
    log_probs = _table([part.log_probs for part in parts], mask)
    assert log_probs is not None
    return Evidence(
        log_probs=log_probs,
        behaviour_log_probs=behaviour,
        mask=mask,
        rewards=batch.rewards[members],
        groups=torch.tensor([batch.groups[i] for i in members], dtype=torch.long),
        lags=lags,
        squared_score_norms=torch.cat(norms).cpu() if norms else None,
        entropies=entropies,
        energies=energies,
        values=_table([part.values for part in parts], mask),
    )


def _table(parts: Sequence[Tensor | None], mask: Tensor) -> Tensor | None:
    """[B, A] float32 of the values of each part's sampled tokens; None if a part has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    table = torch.zeros(mask.shape, dtype=torch.float32)
    table[mask] = torch.cat(known).float().cpu()
    return table
