"""Coins to collect: longer episodes than the maze's, and a reward that can be graded.

A walk on a grid (:mod:`vcpo.environments.grid`) over several targets, the coins: in ``bfk>jlp:aDeDiRj…``
they lie at j, l and p, and reaching a cell takes its coin. ``environment.reward`` says what an episode
earns: ``graded`` the share of the coins taken, ``all`` 1 for every coin, else 0. Full success is 1 under
both.
"""

from __future__ import annotations

from vcpo.config import EnvironmentConfig
from vcpo.environments.grid import GridWalk
from vcpo.environments.protocol import Codec, Episode, Problem


class Collect(GridWalk):
    """Take every coin within ``max_turns`` moves."""

    noun = "grid to collect on"
    also_lower = " or environment.coins"

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        self._graded = config.reward == "graded"
        super().__init__(codec, config, targets=config.coins)

    async def play(self, problem: Problem, episode: Episode) -> float:
        """The share of the coins taken, or with reward ``all`` whether every one was."""
        taken = await self.reach(problem, episode)
        return taken / self._targets if self._graded else float(taken == self._targets)
