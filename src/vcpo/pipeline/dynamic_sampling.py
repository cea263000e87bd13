"""Dynamic sampling: groups whose rewards are all equal are not trained on, and others are played instead.

Their advantages are 0 under any baseline of the group, so they make the minibatch smaller without saying so.
DAPO (arXiv 2503.14476, section 3.2) samples on until a minibatch is full of groups with different rewards.

Departures: DAPO plays another whole batch until enough is there and forgets what is left over; here one
group is admitted for each that is skipped (:mod:`vcpo.pipeline.window`), and none is forgotten. verl gives up
after ``max_num_gen_batches`` = 10 batches without enough; here, after as many groups in a row without a
signal, groups are trained on as they come until one with a signal is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from vcpo.config import Config

log = logging.getLogger(__name__)

BATCHES = 10
"""So many minibatches of groups in a row are skipped at most."""


def dynamic_sampling(config: Config) -> bool:
    """Whether a run of ``config`` skips groups without a signal. Asked in the learner's process, which has
    imported torch, as the methods need it."""
    from vcpo.algorithms.catalog import get_algorithm

    chosen = config.pipeline.dynamic_sampling
    return get_algorithm(config.algorithm.name).dynamic_sampling if chosen is None else chosen


class Sieve:
    """Decides which finished groups are trained on, one after the other."""

    def __init__(self, prompts: int, in_a_row: int = 0, kept: Iterable[int] = ()) -> None:
        """``in_a_row`` and ``kept`` resume a run (:meth:`position`)."""
        self._limit = BATCHES * prompts
        self._in_a_row, self._kept = in_a_row, set(kept)
        self._warned = False

    def keeps(self, number: int, rewards: Sequence[float]) -> bool:
        """Whether group ``number`` is to be trained on. A group that was kept before stays kept."""
        if number in self._kept:
            return True
        if len(set(rewards)) > 1:
            self._in_a_row = 0
        elif self._in_a_row < self._limit:
            self._in_a_row += 1
            return False
        elif not self._warned:
            self._warned = True
            log.warning(
                "%d groups in a row had equal rewards: until rewards differ, groups are trained on as they "
                "come; are the problems all too easy, or all too hard?",
                self._limit,
            )
        self._kept.add(number)
        return True

    def forget(self, numbers: Iterable[int]) -> None:
        """Groups ``numbers`` are trained on."""
        self._kept.difference_update(numbers)

    def position(self) -> dict[str, Any]:
        """What resumes the run: the arguments ``in_a_row`` and ``kept``."""
        return {"in_a_row": self._in_a_row, "kept": sorted(self._kept)}
