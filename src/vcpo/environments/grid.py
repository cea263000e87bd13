"""Walks on a grid, one token a move, over cells that are to be reached: what maze and collect share.

Cells of the size × size grid are lettered row by row from ``a``. The prompt ``bfk>jp:a`` says: walls at
b, f and k, targets at j and p, you are at a. The model emits U, D, L or R, the environment answers with
the letter of the cell reached, unchanged after a bump or any other token, and so on:

    bfk>jp:aDeDiRj…

The start comes last, so that the model reads the cell it is in from the last token at every move, the
first included. Targets may be reached in any order, and nothing marks one that was: the model has to
remember where it has been. The walk ends when all were reached, or with move ``max_turns``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

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
    """A grid as the environment knows it; cells are numbered row by row from 0."""

    walls: frozenset[int]
    start: int
    targets: frozenset[int]


class Walk:
    """Where a walker is, and which targets it has not reached yet."""

    def __init__(self, layout: Layout) -> None:
        self.walls, self.cell, self.left = layout.walls, layout.start, layout.targets

    def go(self, cell: int) -> None:
        """Be in ``cell`` now."""
        self.cell, self.left = cell, self.left - {cell}


class GridWalk:
    """Reach every target from the start; the grid's graph is worked out once. Subclasses reward the walk."""

    noun: ClassVar[str]
    """What errors call it, such as ``maze``."""
    also_lower: ClassVar[str] = ""
    """What else than walls may be too many."""

    def __init__(self, codec: Codec, config: EnvironmentConfig, targets: int) -> None:
        self._size, self._walls, self._targets = config.size, config.walls, targets
        self._max_turns = config.max_turns
        self._check_room()
        self._ids = self._single_tokens(codec, self.alphabet(config))
        self._move_of = {self._ids[move]: move for move in MOVES}
        self._neighbours = [_neighbours(cell, config.size) for cell in range(config.size**2)]
        for split in ("train", "held_out"):
            self.problem(0, split)

    @classmethod
    def alphabet(cls, config: EnvironmentConfig) -> str:
        """Cells, moves and the two separators."""
        return LETTERS[: config.size**2] + MOVES + ">:"

    def problem(self, index: int, split: Split) -> Problem:
        """Problem ``index`` of the split: walls, start and targets uniform among those that can be solved."""
        return draw(index, split, self._propose)

    def check_context(self, context_length: int) -> None:
        """Raise ConfigError if an episode of ``max_turns`` moves would not fit."""
        needed = self._walls + self._targets + len(">:a") + 2 * self._max_turns - 1
        if needed > context_length:
            raise ConfigError(
                f"a {self.noun} of {self._walls} walls and {self._max_turns} moves needs {needed} tokens and "
                f"the context holds {context_length}; raise model.context_length or lower "
                "environment.max_turns"
            )

    async def reach(self, problem: Problem, episode: Episode) -> int:
        """Play the walk and count the targets reached. One move is asked for at a time; the cell reached is
        shown only if another move follows."""
        walk = Walk(problem.answer)
        episode.observe(self._encode(problem.prompt))
        for turn in range(1, self._max_turns + 1):
            move = await episode.act(max_tokens=1, stop=frozenset())
            if not move:
                break
            walk.go(self._beyond(walk, move[0]))
            if not walk.left or turn == self._max_turns:
                break
            episode.observe([self._ids[LETTERS[walk.cell]]])
        return self._targets - len(walk.left)

    def demonstrations(self, seed: int) -> Iterator[Demonstration]:
        """Random walks of training problems, whether or not they reach a target: they teach the format and
        which moves are legal, not where to go."""
        rng = random.Random(seed)
        while True:
            problem = self.problem(rng.getrandbits(40), "train")
            text = problem.prompt + self._random_walk(problem.answer, rng)
            yield Demonstration(self._encode(text), action_mask=[char in MOVES for char in text])

    def _encode(self, text: str) -> list[int]:
        """One token a character, whatever merges the tokenizer knows."""
        return [self._ids[char] for char in text]

    def _propose(self, rng: random.Random) -> tuple[str, Layout] | None:
        cells = rng.sample(range(self._size**2), self._walls + 1 + self._targets)
        walls, start, targets = cells[: self._walls], cells[self._walls], cells[self._walls + 1 :]
        layout = Layout(frozenset(walls), start, frozenset(targets))
        if not self._solvable(layout):
            return None
        return f"{_letters(walls)}>{_letters(targets)}:{LETTERS[start]}", layout

    def _solvable(self, layout: Layout) -> bool:
        """Whether ``max_turns`` moves can reach every target: breadth-first over pairs of the cell and the
        targets left, one ring a move."""
        ring = {(layout.start, layout.targets)}
        seen = set(ring)
        for _ in range(self._max_turns):
            ring = {
                (to, left - {to})
                for cell, left in ring
                for to in self._neighbours[cell].values()
                if to not in layout.walls
            } - seen
            if any(not left for _, left in ring):
                return True
            seen |= ring
        return False

    def _beyond(self, walk: Walk, token: int) -> int:
        """The cell that a sampled token leads to."""
        to = self._neighbours[walk.cell].get(self._move_of.get(token, ""), walk.cell)
        return walk.cell if to in walk.walls else to

    def _random_walk(self, layout: Layout, rng: random.Random) -> str:
        """Moves and cells in turn: legal moves, uniform, turning straight back only where it is the only
        one; no cell after the last move, as in play."""
        walk, last, text = Walk(layout), "", ""
        for turn in range(1, self._max_turns + 1):
            legal = {m: to for m, to in self._neighbours[walk.cell].items() if to not in layout.walls}
            onward = [m for m in legal if m != REVERSE.get(last)]
            last = rng.choice(onward or list(legal))
            walk.go(legal[last])
            text += last
            if not walk.left or turn == self._max_turns:
                break
            text += LETTERS[walk.cell]
        return text

    def _check_room(self) -> None:
        if self._size > MAX_SIZE:
            raise ConfigError(
                f"environment.size = {self._size}: a {self.noun}'s side is at most {MAX_SIZE}; lower it"
            )
        if self._size**2 < self._walls + 1 + self._targets:
            raise ConfigError(
                f"a {self.noun} of side {self._size} has {self._size**2} cells: too few for {self._walls} "
                f"walls, a start and {self._targets} to reach; lower environment.walls{self.also_lower} or "
                "raise environment.size"
            )

    def _single_tokens(self, codec: Codec, alphabet: str) -> dict[str, int]:
        """Token of each character; ConfigError unless there is one for each and all differ."""
        encoded = {char: codec.encode(char) for char in alphabet}
        ids = {char: tokens[0] for char, tokens in encoded.items() if len(tokens) == 1}
        if len(set(ids.values())) < len(alphabet):
            raise ConfigError(
                f"the {self.noun} needs a tokenizer in which each character of {alphabet!r} is a token of "
                "its own, and this model's is not; leave model.name empty for the small model, or take "
                "another model"
            )
        return ids


def _letters(cells: Iterable[int]) -> str:
    return "".join(LETTERS[cell] for cell in sorted(cells))


def _neighbours(cell: int, size: int) -> dict[str, int]:
    """Cell beyond each move that stays in the grid."""
    row, column = divmod(cell, size)
    inside = {"U": row > 0, "D": row < size - 1, "L": column > 0, "R": column < size - 1}
    offset = {"U": -size, "D": size, "L": -1, "R": 1}
    return {move: cell + offset[move] for move in MOVES if inside[move]}
