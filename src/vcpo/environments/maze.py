"""The maze: the smallest multi-turn task on which reinforcement learning truly learns.

A walk on a grid (:mod:`vcpo.environments.grid`) with one target, the goal: ``bfk>p:aDeDiRj…``. Reward 1
on reaching it within ``max_turns`` moves, which ends the episode; else 0.
"""

from __future__ import annotations

from vcpo.config import EnvironmentConfig
from vcpo.environments.grid import GridWalk
from vcpo.environments.protocol import Codec, Episode, Problem


class Maze(GridWalk):
    """Walk from start to goal."""

    noun = "maze"

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        super().__init__(codec, config, targets=1)

    async def play(self, problem: Problem, episode: Episode) -> float:
        """1 if the walk reaches the goal, else 0."""
        return float(await self.reach(problem, episode))
