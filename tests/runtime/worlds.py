"""Environments for the tests of whole runs: a module of its own, because child processes import it."""

from __future__ import annotations

import asyncio
from typing import Any

from vcpo.environments.protocol import Codec, Episode, Problem, Split


class Letters:
    """Two turns; the reward is the share of sampled letters that the prompt's letter equals or precedes:
    dense, so that every step of the smallest model has a gradient."""

    letters = "abcd"

    def __init__(self, codec: Codec, config: Any) -> None:
        self.codec = codec

    @classmethod
    def alphabet(cls, config: Any) -> str:
        return cls.letters + ">"

    def problem(self, index: int, split: Split) -> Problem:
        return Problem(index, self.letters[index % 4] + ">", self.letters[index % 4])

    async def play(self, problem: Problem, episode: Episode) -> float:
        episode.observe(self.codec.encode(problem.prompt))
        answer = await episode.act(4)
        episode.observe(self.codec.encode(">"))
        answer += await episode.act(3)
        text = self.codec.decode(answer)
        return sum(letter >= problem.answer for letter in text) / 7


class Constant(Letters):
    """The reward is 1 whatever happens."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        await super().play(problem, episode)
        return 1.0


class Half(Letters):
    """Problems with an odd number are worth 1 whatever happens."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        reward = await super().play(problem, episode)
        return 1.0 if problem.index % 2 else reward


class Tailed(Letters):
    """Every third problem takes six turns, the others one."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        episode.observe(self.codec.encode(problem.prompt))
        answer: list[int] = []
        for _ in range(1 if problem.index % 3 else 6):
            answer += await episode.act(4, stop=frozenset())
            episode.observe(self.codec.encode(">"))
        text = self.codec.decode(answer)
        return sum(letter >= problem.answer for letter in text) / len(answer)


class Silent(Letters):
    """The model is shown a prompt and never asked."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        episode.observe(self.codec.encode(problem.prompt))
        return float(problem.index % 2)


class Empty(Letters):
    """One token, which may be the end token, is all there is; an answer without text is worth 1."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        episode.observe(self.codec.encode(problem.prompt))
        return float(self.codec.decode(await episode.act(1)) == "")


class Unlucky(Letters):
    """Episodes of training problems with an odd number always fail."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        reward = await super().play(problem, episode)
        if problem.index % 2:
            raise RuntimeError(f"no luck with {problem.index}")
        return reward


class Hopeless(Letters):
    """Every episode fails."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        raise RuntimeError("nothing works")


class Slow(Letters):
    """Each episode waits a little, as for a tool."""

    async def play(self, problem: Problem, episode: Episode) -> float:
        await asyncio.sleep(0.02)
        return await super().play(problem, episode)
