"""Where each trajectory's positions lie in the packed rows: computed once a batch, shared by all layers.

P = R·T positions are numbered row by row. N trajectories own some of them each; the rest is padding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from vcpo.errors import VcpoError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BUDGET = 2**24
"""Default for the most numbers that a block's temporaries hold (64 MiB in float32)."""


def precise(values: Tensor) -> Tensor:
    """The values in float32 or better: sums of squares in half precision would be worth little."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Block:
    """n trajectories of similar length, padded to the longest, T."""

    members: Int[Tensor, " n"]
    """Which trajectories."""
    index: Int[Tensor, "n T"]
    """Their positions; padding repeats a trajectory's first."""
    padding: Int[Tensor, " m"]
    """The places in [n·T] that are padding."""
    start: int | None
    """First position, if the block is one unbroken run of positions: then nothing need be copied."""

    def gather(self, values: Float[Tensor, "P d"]) -> Float[Tensor, "n T d"]:
        """The trajectories' rows of ``values``; padding repeats a row of the same trajectory."""
        if self.start is not None:
            rows = values[self.start : self.start + self.index.numel()]
        else:
            rows = values.index_select(0, self.index.flatten())
        return precise(rows).view(*self.index.shape, -1)

    def gather_padded(self, values: Float[Tensor, "P d"]) -> Float[Tensor, "n T d"]:
        """The same with zeros as padding: enough for one factor of a product."""
        rows = self.gather(values)
        if len(self.padding):
            rows.flatten(0, 1).index_fill_(0, self.padding, 0)
        return rows


@dataclass(frozen=True)
class Layout:
    """The positions of N trajectories, in [P]."""

    positions: Int[Tensor, " Q"]
    """Positions that belong to a trajectory, those of trajectory 0 first."""
    offsets: Int[Tensor, " N"]
    """Where each trajectory begins in ``positions``."""
    lengths: Int[Tensor, " N"]
    """How many positions each trajectory has."""
    by_length: Int[Tensor, " N"]
    """The trajectories, longest first."""
    sorted_lengths: list[int]
    """Lengths in that order, without the empty ones."""
    budget: int
    """The most numbers that one block's temporaries hold, unless a single trajectory needs more."""
    _blocks: dict[tuple[int, int], Block] = field(default_factory=dict)

    @staticmethod
    def of(segments: Int[Tensor, "*P"], count: int, budget: int = BUDGET) -> Layout:
        """Read the trajectory ids (-1: padding) of packed rows, or of any list of positions."""
        owners = segments.flatten()
        lengths = torch.bincount(owners + 1, minlength=count + 1)
        if len(lengths) != count + 1:
            raise VcpoError(f"segments name trajectory {len(lengths) - 2}, but there are only {count}")
        padding, lengths = lengths[0], lengths[1:]
        by_length = lengths.argsort(descending=True, stable=True)
        return Layout(
            positions=owners.argsort(stable=True)[padding:],
            offsets=lengths.cumsum(0) - lengths,
            lengths=lengths,
            by_length=by_length,
            sorted_lengths=[n for n in lengths[by_length].tolist() if n],
            budget=budget,
        )

    @property
    def longest(self) -> int:
        """Length of the longest trajectory; 1 if all are empty."""
        return max(self.sorted_lengths, default=1)

    @property
    def count(self) -> int:
        """N."""
        return len(self.lengths)

    @property
    def mean_length(self) -> float:
        """Mean length of the trajectories that are not empty; 0 if all are."""
        return sum(self.sorted_lengths) / max(len(self.sorted_lengths), 1)

    def zeros(self, like: Tensor) -> Float[Tensor, " N"]:
        """A number for each trajectory."""
        return precise(like[:0]).new_zeros(self.count)

    def blocks(self, cost: Callable[[int], int]) -> Iterator[Block]:
        """Cut the trajectories, longest first, into blocks that fit the budget.

        ``cost(T)`` counts the numbers that the temporaries of one trajectory padded to T hold. A block
        ends where lengths fall to half of its longest, so that at most half of it is padding.
        """
        start = 0
        while start < len(self.sorted_lengths):
            longest = self.sorted_lengths[start]
            similar = bisect_left(self.sorted_lengths, -(longest // 2), lo=start, key=lambda n: -n)
            stop = min(start + max(1, self.budget // cost(longest)), max(similar, start + 1))
            if (start, stop) not in self._blocks:
                self._blocks[start, stop] = self.block_of(self.by_length[start:stop])
            yield self._blocks[start, stop]
            start = stop

    def block_of(self, members: Int[Tensor, " n"]) -> Block:
        """These trajectories. One that is empty is all padding, with the positions of another."""
        lengths = self.lengths[members, None]
        place = torch.arange(max(int(lengths.max()), 1), device=members.device)
        within = place < lengths
        index = self.positions[
            (self.offsets[members, None] + place * within).clamp(max=len(self.positions) - 1)
        ]
        padding = (~within).flatten().nonzero()[:, 0]
        first = int(index[0, 0])
        run = torch.arange(first, first + index.numel(), device=index.device).view_as(index)
        unbroken = not len(padding) and torch.equal(index, run)
        return Block(members, index, padding, first if unbroken else None)

    @cached_property
    def spans(self) -> list[slice | Tensor]:
        """Where each trajectory's positions lie: a slice if they are one run, else their index."""
        spans: list[slice | Tensor] = []
        for index in self.positions.split(self.lengths.tolist()):
            first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
            run = last - first + 1 == len(index)  # positions are in ascending order
            spans.append(slice(first, last + 1) if run else index)
        return spans

    def spread(self, values: Float[Tensor, " N"], positions: int) -> Float[Tensor, " P"]:
        """Each trajectory's number at its positions, 0 on padding."""
        spread = values.new_zeros(positions)
        spread[self.positions] = torch.repeat_interleave(values, self.lengths)
        return spread

    def sums(self, values: Float[Tensor, "P d"]) -> Float[Tensor, "N d"]:
        """Σ of each trajectory's rows of ``values``."""
        return functional.embedding_bag(
            self.positions, precise(values).contiguous(), self.offsets, mode="sum"
        )

    def token_sums(
        self, tokens: Int[Tensor, " P"], values: Float[Tensor, "P d"]
    ) -> tuple[Float[Tensor, "U d"], Int[Tensor, " U"]]:
        """Σ of ``values`` over positions that share trajectory and token, and the trajectory of each sum."""
        owners = torch.repeat_interleave(self.lengths)
        tokens = tokens[self.positions]
        vocabulary = tokens.amax() + 1 if len(tokens) else 1
        keys, order = (owners * vocabulary + tokens).sort()
        unique, counts = keys.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
        sums = functional.embedding_bag(
            self.positions[order], precise(values).contiguous(), offsets, mode="sum"
        )
        return sums, unique // vocabulary
