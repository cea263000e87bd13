"""Twins for the tests of grids: a codec, a sampler that follows a script, a grid by coordinates."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations
from typing import Any, Protocol

from vcpo.environments.grid import Layout
from vcpo.environments.protocol import Episode, Problem
from vcpo.samplers.protocol import Completion
from vcpo.trajectory import Trajectory

DELTAS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
BACK = {"U": "D", "D": "U", "L": "R", "R": "L", "": ""}
LETTERS = "abcdefghijklmnopqrstuvwxy"


class CharCodec:
    """Character i of the alphabet is token 100 + i; 0 ends."""

    end_id = 0

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet

    def encode(self, text: str) -> list[int]:
        return [100 + self.alphabet.index(char) for char in text]

    encode_prompt = encode

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.alphabet[token - 100] for token in tokens if token >= 100)


class ScriptedSampler:
    """Samples the tokens of a script, one a call; the n-th has version n and log-prob −n/4."""

    def __init__(self, script: Sequence[int], context_length: int = 64) -> None:
        self.script, self.context_length, self.version, self.calls = list(script), context_length, 0, 0

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int, stop: frozenset[int], **_: Any
    ) -> Completion:
        assert (max_tokens, stop) == (1, frozenset())
        self.calls += 1
        return Completion([self.script[self.calls - 1]], [-self.calls / 4], [self.calls], "length")

    def release(self, session: int) -> None: ...

    async def update(self, version: int, weights: Mapping[str, Any]) -> str:
        return ""


class Played(Protocol):
    async def play(self, problem: Problem, episode: Episode) -> float: ...


def play(environment: Played, problem: Problem, sampler: ScriptedSampler) -> Trajectory:
    async def run() -> Trajectory:
        episode = Episode(sampler, seed=0, session=0, stop=frozenset((0,)))
        return episode.trajectory(await environment.play(problem, episode))

    return asyncio.run(run())


def hand_problem(prompt: str) -> Problem:
    """What ``prompt`` describes."""
    walls, targets, start = (map(LETTERS.index, part) for part in prompt.replace(":", ">").split(">"))
    return Problem(0, prompt, Layout(frozenset(walls), next(start), frozenset(targets)))


class Twin:
    """A grid read from its prompt, by coordinates."""

    def __init__(self, prompt: str, size: int) -> None:
        walls, targets, start = prompt.replace(":", ">").split(">")
        self.size = size
        self.wall_letters = walls
        self.walls = {self.at(letter) for letter in walls}
        self.targets = [self.at(letter) for letter in targets]
        self.start = self.at(start)

    @property
    def goal(self) -> tuple[int, int]:
        """The target, where it is the only one."""
        (goal,) = self.targets
        return goal

    def at(self, letter: str) -> tuple[int, int]:
        place = LETTERS.index(letter)
        return place // self.size, place % self.size

    def letter(self, cell: tuple[int, int]) -> str:
        return LETTERS[cell[0] * self.size + cell[1]]

    def step(self, cell: tuple[int, int], move: str) -> tuple[int, int]:
        row, column = cell[0] + DELTAS[move][0], cell[1] + DELTAS[move][1]
        inside = 0 <= row < self.size and 0 <= column < self.size
        return (row, column) if inside and (row, column) not in self.walls else cell

    def shortest(self) -> str | None:
        """A shortest walk to all targets: the best of their orders, a shortest path from each to the next."""
        walks = []
        for order in permutations(self.targets):
            paths = [self.path(*leg) for leg in pairwise([self.start, *order])]
            walks.append(None if None in paths else "".join(filter(None, paths)))
        return min(filter(None, walks), key=len, default=None)

    def path(self, start: tuple[int, int], end: tuple[int, int]) -> str | None:
        """A shortest path, breadth-first."""
        queue, seen = deque([(start, "")]), {start}
        while queue:
            cell, path = queue.popleft()
            if cell == end:
                return path
            for move in DELTAS:
                if (to := self.step(cell, move)) not in seen:
                    seen.add(to)
                    queue.append((to, path + move))
        return None

    def walk_moves(self, cell: tuple[int, int], last: str) -> list[str]:
        legal = [move for move in DELTAS if self.step(cell, move) != cell]
        return [move for move in legal if move != BACK[last]] or legal

    def chance(self, cell: tuple[int, int], last: str, turns: int) -> float:
        """Exact probability that the random walk of the demonstrations reaches the goal."""
        if cell == self.goal:
            return 1.0
        if turns == 0:
            return 0.0
        moves = self.walk_moves(cell, last)
        return sum(self.chance(self.step(cell, m), m, turns - 1) for m in moves) / len(moves)
