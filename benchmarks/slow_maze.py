"""The maze with a slow tool: each episode waits once, log-normally, before it learns how it ended."""

from __future__ import annotations

import asyncio
import math
import random

from vcpo.environments.maze import Maze
from vcpo.environments.protocol import Episode, Problem

MEDIAN_SECONDS, SIGMA = 0.05, 1.0


class SlowMaze(Maze):
    """``environment.kind = "benchmarks.slow_maze:SlowMaze"``."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        reward = await super().play(problem, episode)
        await asyncio.sleep(random.lognormvariate(math.log(MEDIAN_SECONDS), SIGMA))
        return reward
