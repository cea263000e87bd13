"""The gradient of a minibatch, made by several ranks together (FSDP2).

Each rank has the whole minibatch, and so knows without a word who measures what. Two ways:

- **Whole groups**: as long as every rank's groups, a few at a time, fit its token budget, each rank decides
  about its own, as a rank alone does.
- **Spread**: a group that is larger than a rank's budget, fewer groups than ranks, or a method that looks at
  the whole minibatch. Then trajectories are shared out; what each rank measured of its own (log-probs of
  sampled tokens, score norms) is gathered, and every rank makes the same decisions about all of them.

A pass through the model is a thing that all ranks do together (they lend each other the parameters), so all
of them make as many: one that has nothing left passes a row of padding, whose gradient is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo.algorithms.composition import Evidence, Update
from vcpo.learner.accumulate import Accumulator, Contribution
from vcpo.learner.minibatch import Figures, Minibatch, evidence_of
from vcpo.learner.ranks import Ranks
from vcpo.policy.packing import micro_batches

Cut = list[list[int]]
"""Micro-batches: places in the minibatch."""


@dataclass(frozen=True)
class Shares:
    """Who measures what."""

    cuts: Sequence[Cut]
    """The micro-batches of each rank."""
    spread: bool
    """Whether groups are divided among ranks or micro-batches."""

    @property
    def rounds(self) -> int:
        """How many passes every rank makes."""
        return max(map(len, self.cuts))

    def of(self, rank: int) -> Cut:
        """Filled up with empty ones to as many as anyone has."""
        return [*self.cuts[rank], *([] for _ in range(self.rounds - len(self.cuts[rank])))]

    def members(self, rank: int) -> list[int]:
        return [place for part in self.cuts[rank] for place in part]


class RanksAccumulator(Accumulator):
    """Adds gradients of minibatches to sharded parameters; every rank calls it with the same minibatch.

    The contributions are of the rank's own trajectories.
    """

    def __init__(self, ranks: Ranks, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._ranks, self._gain = ranks, float(ranks.size)
        self._shares: Shares

    def accumulate(self, batch: Minibatch) -> list[Contribution]:
        if self._tape is not None:
            self._tape.seed = batch.version
        self._shares = self.shares(batch)
        own = self._shares.of(self._ranks.rank)
        if self._shares.spread and (self._shares.rounds > 1 or self._needs_two_passes):
            return [self._in_two_passes(own, batch)]
        return [self._at_once(part, batch) for part in own]

    def shares(self, batch: Minibatch) -> Shares:
        """The same on every rank."""
        lengths = [len(t.tokens) for t in batch.trajectories]
        groups: dict[int, list[int]] = {}
        for place, group in enumerate(batch.groups):
            groups.setdefault(group, []).append(place)
        if (
            not self._algorithm.spans_minibatch
            and not self._needs_two_passes
            and len(groups) >= self._ranks.size
        ):
            whole = list(groups.values())
            dealt = deal([sum(lengths[i] for i in group) for group in whole], self._ranks.size)
            units = [self._units([i for g in hand for i in whole[g]], batch) for hand in dealt]
            if all(len(unit) == 1 for of_rank in units for unit in of_rank):
                return Shares([[unit[0] for unit in of_rank] for of_rank in units], spread=False)
        hands = deal(lengths, self._ranks.size)
        return Shares([self._pieces(hand, batch) for hand in hands], spread=True)

    @property
    def _needs_two_passes(self) -> bool:
        """Whether a record of the first pass cannot give the gradient: with score norms, where tokens of a
        trajectory have different coefficients. (A rank alone looks at the coefficients; ranks must agree.)"""
        return self._tape is not None and not self._algorithm.weighs_tokens_alike

    def _units(self, hand: Sequence[int], batch: Minibatch) -> list[Cut]:
        units = micro_batches(
            [batch.trajectories[i] for i in hand],
            [batch.groups[i] for i in hand],
            self._budget,
            packed=self._packed,
        )
        return [[[hand[i] for i in part] for part in unit] for unit in units]

    def _pieces(self, hand: Sequence[int], batch: Minibatch) -> Cut:
        """Micro-batches of trajectories, whatever their groups."""
        trajectories = [batch.trajectories[i] for i in hand]
        units = micro_batches(trajectories, range(len(hand)), self._budget, packed=self._packed)
        return [[hand[i] for i in part] for unit in units for part in unit]

    def _decide(self, parts: Sequence[Figures], batch: Minibatch) -> tuple[Evidence, Update]:
        own = [i for part in parts for i in part.members]
        if not self._shares.spread:
            return super()._decide(parts, batch) if own else self._nothing(parts, batch)
        everyone = [i for rank in range(self._ranks.size) for i in self._shares.members(rank)]
        evidence, update = super()._decide([self._gathered(parts, everyone)], batch)
        begin = sum(len(self._shares.members(rank)) for rank in range(self._ranks.rank))
        places = range(begin, begin + len(own))
        return evidence.rows(places), update.rows(places)

    def _gathered(self, parts: Sequence[Figures], members: list[int]) -> Figures:
        """What all ranks measured, in the order of the ranks."""

        def gather(own: Sequence[Tensor | None]) -> Tensor | None:
            known = [tensor for tensor in own if tensor is not None]
            return self._ranks.gathered(torch.cat([t.cpu() for t in known])) if known else None

        log_probs = gather([part.log_probs for part in parts])
        assert log_probs is not None
        distributions = gather([None if p.distributions is None else p.distributions.mT for p in parts])
        return Figures(
            members,
            log_probs,
            gather([part.squared_norms for part in parts]),
            gather([part.relative_errors for part in parts]),
            None if distributions is None else distributions.mT,
            gather([part.values for part in parts]),
        )

    def _nothing(self, parts: Sequence[Figures], batch: Minibatch) -> tuple[Evidence, Update]:
        """Of a row of padding."""
        evidence = evidence_of(parts, batch)
        table, one = torch.zeros(0, 1), torch.zeros(0)
        by_token = self._algorithm.importance.level.per_token
        return evidence, Update(
            coefficients=table,
            advantages=table if self._algorithm.baseline.per_token else one,
            baselines=table if self._algorithm.baseline.per_token else one,
            log_weights=one,
            used_log_weights=table if by_token else one,
            log_ratios=table,
            limited=table.bool() if by_token or self._algorithm.token_masks else one.bool(),
            value_targets=table if self._algorithm.needs_values else None,
        )


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
    """Share out items so that the most expensive hand is cheap: the dearest first, each to who has least.

    Every hand in rising order; the same for the same costs.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        poorest = sums.index(min(sums))
        dealt[poorest].append(item)
        sums[poorest] += costs[item]
    return [sorted(hand) for hand in dealt]
