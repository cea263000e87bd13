"""Packing: trajectories of different lengths in few rows, cut into micro-batches by a token budget.

Several trajectories share a row; position ids restart at each, which transformers' attention reads as
"attend within your own sequence only" (no padding mask is needed). A few older architectures do not:
:func:`vcpo.policy.log_probs.keeps_packed_apart` tells, and the learner then gives each trajectory a row.
The rest of a row is one more sequence of padding whose outputs nobody reads.

Trajectories of one group stay in one micro-batch as long as the budget allows, because a baseline with
score norms needs the whole group before the first coefficient is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vcpo.errors import VcpoError
from vcpo.trajectory import Trajectory

PADDING = -1
"""Segment id of padding positions."""


@dataclass(frozen=True)
class PackedRows:
    """B trajectories in R rows of C positions; A is the most sampled tokens of one trajectory."""

    input_ids: Tensor
    """[R, C] int64."""
    position_ids: Tensor
    """[R, C] int64, restarting at each trajectory."""
    segments: Tensor
    """[R, C] int64: index of the trajectory within this micro-batch, -1 on padding."""
    action_rows: Tensor
    """[N] int64: row of each of the N sampled tokens, trajectory by trajectory."""
    action_columns: Tensor
    """[N] int64: column of each sampled token; its logits are one column before."""
    action_owners: Tensor
    """[N] int64: trajectory of each sampled token."""
    action_places: Tensor
    """[N] int64: how many sampled tokens of the same trajectory come before it."""
    count: int
    """B."""
    width: int
    """A."""

    def to(self, device: torch.device | str) -> PackedRows:
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return PackedRows(**moved)

    def spread(self, values: Tensor) -> Tensor:
        """[N] values of sampled tokens as [B, A], zero where a trajectory has fewer; differentiable."""
        table = values.new_zeros(self.count, self.width)
        return table.index_put((self.action_owners, self.action_places), values)


def row_layout(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: which trajectories share a row of ``capacity`` positions."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for r, room in enumerate(free):
            if lengths[i] <= room:
                rows[r].append(i)
                free[r] -= lengths[i]
                break
        else:
            rows.append([i])
            free.append(capacity - lengths[i])
    return rows


def pack(trajectories: Sequence[Trajectory], *, pad_id: int = 0, packed: bool = True) -> PackedRows:
    """Pack into rows as long as the longest trajectory; ``packed=False`` gives each a row of its own. No
    trajectory at all makes one row of padding, so that a model can be called.

    Raises VcpoError if a trajectory's first token is marked as sampled: no logits come before it.
    """
    for i, t in enumerate(trajectories):
        if t.action_mask[:1].any():
            raise VcpoError(f"trajectory {i} marks its first token as sampled: it needs a prompt before it")
    lengths = [len(t.tokens) for t in trajectories]
    capacity = max(max(lengths, default=1), 1)
    rows = (row_layout(lengths, capacity) if packed else [[i] for i in range(len(lengths))]) or [[]]
    ids = np.full((len(rows), capacity), pad_id, np.int64)
    positions = np.zeros((len(rows), capacity), np.int64)
    segments = np.full((len(rows), capacity), PADDING, np.int64)
    row_of = np.zeros(len(lengths), np.int64)
    start_of = np.zeros(len(lengths), np.int64)
    for r, members in enumerate(rows):
        column = 0
        for i in members:
            end = column + lengths[i]
            ids[r, column:end] = trajectories[i].tokens
            positions[r, column:end] = np.arange(lengths[i])
            segments[r, column:end] = i
            row_of[i], start_of[i] = r, column
            column = end
        positions[r, column:] = np.arange(capacity - column)
    actions = [np.flatnonzero(t.action_mask) for t in trajectories]
    counts = np.array([len(a) for a in actions], np.int64)
    owners = np.repeat(np.arange(len(lengths)), counts)
    places = np.concatenate([np.arange(n) for n in counts]) if len(counts) else np.zeros(0, np.int64)
    columns = np.concatenate(actions) + start_of[owners] if len(counts) else np.zeros(0, np.int64)
    tensor = torch.from_numpy
    return PackedRows(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        segments=tensor(segments),
        action_rows=tensor(row_of[owners]),
        action_columns=tensor(columns.astype(np.int64)),
        action_owners=tensor(owners),
        action_places=tensor(places.astype(np.int64)),
        count=len(lengths),
        width=max(int(counts.max(initial=0)), 1),
    )


def micro_batches(
    trajectories: Sequence[Trajectory],
    groups: Sequence[int],
    token_budget: int,
    *,
    packed: bool = True,
    kinds: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Cut a minibatch into units of micro-batches of at most ``token_budget`` padded tokens.

    A unit holds whole groups. Small groups share one micro-batch, which is then a unit; a group that does
    not fit the budget is a unit of several micro-batches. A trajectory longer than the budget gets a
    micro-batch of its own. With ``kinds``, one a trajectory, such a group is sorted by them and none of its
    micro-batches holds two. Returns indices: units > micro-batches > trajectories.
    """
    members: dict[int, list[int]] = {}
    for i, g in enumerate(groups):
        members.setdefault(g, []).append(i)

    def cost(indices: Sequence[int]) -> int:
        lengths = [len(trajectories[i].tokens) for i in indices]
        longest = max(lengths)
        if not packed or longest * len(lengths) <= token_budget:  # no need to know the rows
            return longest * len(lengths)
        return longest * len(row_layout(lengths, longest))

    units: list[list[list[int]]] = []
    current: list[int] = []
    for group in members.values():
        if cost([*current, *group]) <= token_budget:
            current = [*current, *group]
            continue
        if current:
            units.append([current])
        current = []
        if cost(group) <= token_budget:
            current = list(group)
        else:
            units.append(_split(group, cost, token_budget, kinds))
    if current:
        units.append([current])
    return units


def _split(
    group: Sequence[int],
    cost: Callable[[Sequence[int]], int],
    token_budget: int,
    kinds: Sequence[float] | None,
) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in group if kinds is None else sorted(group, key=lambda i: kinds[i]):
        alike = bool(batches) and (kinds is None or kinds[i] == kinds[batches[-1][-1]])
        if alike and cost([*batches[-1], i]) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
