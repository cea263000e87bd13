"""The maze: the smallest multi-turn task on which reinforcement learning truly learns.

Cells of the size × size grid are lettered row by row from ``a``. The prompt ``bfk>p:a`` says: walls at
b, f and k, the goal is p, you are at a. The model emits U, D, L or R, the environment answers with the
letter of the cell reached, unchanged after a bump or any other token, and so on:

    bfk>p:aDeDiRj…

The start comes last, so that the model reads the cell it is in from the last token at every move, the
first included. Reward 1 on reaching the goal within ``max_turns`` moves, which ends the episode; else 0.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from vcpo.config import EnvironmentConfig
from vcpo.environments.protocol import Codec, Demonstration, Episode, Problem, Split
from vcpo.environments.splits import draw
from vcpo.errors import ConfigError

LETTERS = "abcdefghijklmnopqrstuvwxy"
MOVES = "UDLR"
REVERSE = {"U": "D", "D": "U", "L": "R", "R": "L"}
MAX_SIZE = 5
"""Side of the largest grid that the letters can name."""


class Layout(NamedTuple):
    """A maze as the environment knows it; cells are numbered row by row from 0."""

    walls: frozenset[int]
    start: int
    goal: int


class Maze:
    """Walk from start to goal, one token a move; the grid's graph is worked out once."""

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        _check(config)
        self._size, self._walls, self._max_turns = config.size, config.walls, config.max_turns
        self._ids = _single_tokens(codec, self.alphabet(config))
        self._move_of = {self._ids[move]: move for move in MOVES}
        self._neighbours = [_neighbours(cell, config.size) for cell in range(config.size**2)]
        for split in ("train", "held_out"):
            self.problem(0, split)

    @classmethod
    def alphabet(cls, config: EnvironmentConfig) -> str:
        """Cells, moves and the two separators."""
        return LETTERS[: config.size**2] + MOVES + ">:"

    def problem(self, index: int, split: Split) -> Problem:
        """Maze ``index`` of the split: walls, start and goal uniform among those that can be solved."""
        return draw(index, split, self._propose)

    def check_context(self, context_length: int) -> None:
        """Raise ConfigError if an episode of ``max_turns`` moves would not fit."""
        needed = self._walls + len(">p:a") + 2 * self._max_turns - 1
        if needed > context_length:
            raise ConfigError(
                f"a maze of {self._walls} walls and {self._max_turns} moves needs {needed} tokens and the "
                f"context holds {context_length}; raise model.context_length or lower environment.max_turns"
            )

    async def play(self, problem: Problem, episode: Episode) -> float:
        """Ask for one move at a time; the cell reached is shown only if another move follows."""
        layout: Layout = problem.answer
        cell = layout.start
        episode.observe(self._encode(problem.prompt))
        for turn in range(1, self._max_turns + 1):
            move = await episode.act(max_tokens=1, stop=frozenset())
            if not move:
                break
            cell = self._reached(layout, cell, move[0])
            if cell == layout.goal:
                return 1.0
            if turn < self._max_turns:
                episode.observe([self._ids[LETTERS[cell]]])
        return 0.0

    def demonstrations(self, seed: int) -> Iterator[Demonstration]:
        """Random walks of training mazes, whether or not they reach the goal: they teach the format and
        which moves are legal, not how to solve a maze."""
        rng = random.Random(seed)
        while True:
            problem = self.problem(rng.getrandbits(40), "train")
            walk = self._random_walk(problem.answer, rng)
            yield Demonstration(
                tokens=self._encode(problem.prompt + walk),
                action_mask=[False] * len(problem.prompt) + [char in MOVES for char in walk],
            )

    def _encode(self, text: str) -> list[int]:
        """One token a character, whatever merges the tokenizer knows."""
        return [self._ids[char] for char in text]

    def _propose(self, rng: random.Random) -> tuple[str, Layout] | None:
        *walls, start, goal = rng.sample(range(self._size**2), self._walls + 2)
        layout = Layout(frozenset(walls), start, goal)
        if not self._solvable(layout):
            return None
        return "".join(LETTERS[w] for w in sorted(walls)) + f">{LETTERS[goal]}:{LETTERS[start]}", layout

    def _solvable(self, layout: Layout) -> bool:
        """Whether the goal is within ``max_turns`` moves: breadth-first, one ring of cells a turn."""
        seen = {layout.start, *layout.walls}
        ring = [layout.start]
        for _ in range(self._max_turns):
            ring = {to for cell in ring for to in self._neighbours[cell].values()} - seen
            if layout.goal in ring:
                return True
            seen |= ring
        return False

    def _reached(self, layout: Layout, cell: int, token: int) -> int:
        to = self._neighbours[cell].get(self._move_of.get(token, ""), cell)
        return cell if to in layout.walls else to

    def _random_walk(self, layout: Layout, rng: random.Random) -> str:
        """Moves and cells in turn: legal moves, uniform, turning straight back only where it is the only
        one; no cell after the last move, as in play."""
        cell, last, walk = layout.start, "", ""
        for turn in range(1, self._max_turns + 1):
            legal = {m: to for m, to in self._neighbours[cell].items() if to not in layout.walls}
            onward = [m for m in legal if m != REVERSE.get(last)]
            last = rng.choice(onward or list(legal))
            cell, walk = legal[last], walk + last
            if cell == layout.goal or turn == self._max_turns:
                break
            walk += LETTERS[cell]
        return walk


def _check(config: EnvironmentConfig) -> None:
    if config.size > MAX_SIZE:
        raise ConfigError(f"environment.size = {config.size}: a maze's side is at most {MAX_SIZE}; lower it")
    free = config.size**2 - 2
    if config.walls > free:
        raise ConfigError(
            f"environment.walls = {config.walls}: a maze of side {config.size} has room for at most {free} "
            "beside start and goal; lower it or raise environment.size"
        )


def _single_tokens(codec: Codec, alphabet: str) -> dict[str, int]:
    """Token of each character; ConfigError unless there is one for each and all differ."""
    encoded = {char: codec.encode(char) for char in alphabet}
    ids = {char: tokens[0] for char, tokens in encoded.items() if len(tokens) == 1}
    if len(set(ids.values())) < len(alphabet):
        raise ConfigError(
            f"the maze needs a tokenizer in which each character of {alphabet!r} is a token of its own, and "
            "this model's is not; leave model.name empty for the small model, or take another model"
        )
    return ids


def _neighbours(cell: int, size: int) -> dict[str, int]:
    """Cell beyond each move that stays in the grid."""
    row, column = divmod(cell, size)
    inside = {"U": row > 0, "D": row < size - 1, "L": column > 0, "R": column < size - 1}
    offset = {"U": -size, "D": size, "L": -1, "R": 1}
    return {move: cell + offset[move] for move in MOVES if inside[move]}
