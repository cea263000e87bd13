"""Countdown: ``3 5 7=22:`` asks for an expression that uses each number once and equals the target, such
as ``3*5+7``. Checked by a parser of its own in exact rational arithmetic; nothing is evaluated.

A large model is asked in words, by ``environment.template``, and may reason before it answers: see
:func:`answer_in`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from operator import add, floordiv, mul, sub
from typing import NamedTuple

from vcpo.config import EnvironmentConfig
from vcpo.environments.answers import last_boxed
from vcpo.environments.protocol import Codec, Demonstration, Episode, Problem, Split
from vcpo.environments.splits import draw
from vcpo.environments.templates import check_template, fill
from vcpo.errors import ConfigError

LARGEST_NUMBER = 20
LARGEST_TARGET = 99
MAX_SIZE = 6
"""The most numbers given."""

MAX_EXPRESSION = 200
"""Characters of the longest expression read: a bound on the parser's recursion."""

NUMBER_SEPARATOR = ", "
"""Between the numbers in a template."""

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, "/": floordiv}
TOKEN = re.compile(r"[0-9]+|[^ ]")
ANSWER_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
SPELLINGS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "×": "*", "÷": "/", "\N{MINUS SIGN}": "-"}
"""How else an operator may be written in a marked answer."""

SIGNS = re.compile("|".join(map(re.escape, SPELLINGS)))


class Puzzle(NamedTuple):
    """Numbers and target, with one solution (there may be others)."""

    numbers: tuple[int, ...]
    target: int
    solution: str


class Countdown:
    """``size`` numbers of 1 to 20 and a target of 1 to 99, solvable by construction; reward 1 for a response
    whose answer is right, and that came to its end."""

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        self._codec, self._size, self._max_tokens = codec, config.size, config.max_tokens
        self._template = config.template
        _check(config)
        for split in ("train", "held_out"):
            self.problem(0, split)

    @classmethod
    def alphabet(cls, config: EnvironmentConfig) -> str:
        """Digits, operators, parentheses, the separators, and what is shown besides by the template."""
        known = "0123456789+-*/() =:"
        shown = fill(config.template, numbers=NUMBER_SEPARATOR, target="")
        return known + "".join(sorted({*shown} - {*known}))

    def problem(self, index: int, split: Split) -> Problem:
        """Numbers independent and uniform, target that of a random expression tree over them."""
        return draw(index, split, self._propose)

    def check_context(self, context_length: int) -> None:
        """Raise ConfigError if the longest prompt and the longest solution would not fit."""
        largest = Puzzle((LARGEST_NUMBER,) * self._size, LARGEST_TARGET, "")
        needed = len(self._shown(largest)) + _longest_answer(self._size)
        if needed > context_length:
            raise ConfigError(
                f"countdown with {self._size} numbers needs {needed} tokens and the context holds "
                f"{context_length}; raise model.context_length or lower environment.size"
            )

    async def play(self, problem: Problem, episode: Episode) -> float:
        """One response, whose answer is judged by :func:`check_expression`."""
        puzzle: Puzzle = problem.answer
        episode.observe(self._shown(puzzle))
        response = await episode.act(self._max_tokens)
        ended = episode.outcome != "truncated"
        text = answer_in(self._codec.decode(response))
        return float(ended and check_expression(text, puzzle.numbers, puzzle.target))

    def demonstrations(self, seed: int) -> Iterator[Demonstration]:
        """Solutions of training puzzles."""
        rng = random.Random(seed)
        while True:
            puzzle: Puzzle = self.problem(rng.getrandbits(40), "train").answer
            shown = self._shown(puzzle)
            learned = [*self._codec.encode(puzzle.solution), self._codec.end_id]
            yield Demonstration(shown + learned, [False] * len(shown) + [True] * len(learned))

    def _shown(self, puzzle: Puzzle) -> list[int]:
        """The short prompt as it stands; the template as a message to the model."""
        if not self._template:
            return self._codec.encode(_prompt(puzzle.numbers, puzzle.target))
        numbers = NUMBER_SEPARATOR.join(map(str, puzzle.numbers))
        text = fill(self._template, numbers=numbers, target=str(puzzle.target))
        return self._codec.encode_prompt(text)

    def _propose(self, rng: random.Random) -> tuple[str, Puzzle] | None:
        numbers = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(self._size))
        tree = _random_tree(numbers, rng)
        if tree is None or not 1 <= tree.value <= LARGEST_TARGET:
            return None
        return _prompt(numbers, tree.value), Puzzle(numbers, tree.value, tree.text)


def answer_in(response: str) -> str:
    """The expression that a response gives as its answer: what the last ``\\boxed{}`` contains, else what is
    between the last ``<answer>`` and ``</answer>``, else the response itself.

    In a box or between tags, white space around it does not count, and LaTeX's signs, × and ÷ are read too.
    """
    marked = last_boxed(response)
    if marked is None:
        if not (tagged := ANSWER_TAGS.findall(response)):
            return response
        marked = tagged[-1]
    return SIGNS.sub(lambda sign: SPELLINGS[sign[0]], marked).strip()


def check_expression(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``text`` is an expression over ``+ - * / ( )`` and spaces that uses each of ``numbers``
    exactly once and whose exact rational value is ``target``.

    Any text is a valid argument. Anything but that is False: signs, powers, leading zeros, digits of
    other scripts, a division by zero, more than ``MAX_EXPRESSION`` characters.
    """
    if len(text) > MAX_EXPRESSION:
        return False
    tokens = TOKEN.findall(text)
    used = sorted(token for token in tokens if token[0] in "0123456789")
    if used != sorted(map(str, numbers)):
        return False
    try:
        return _Parser(tokens).value() == target
    except (_MalformedError, ZeroDivisionError):
        return False


class _MalformedError(ValueError):
    """Not an expression."""


class _Parser:
    """Recursive descent: sum = product (± product)*, product = atom (*/ atom)*, atom = number | ( sum )."""

    def __init__(self, tokens: list[str]) -> None:
        self._rest = tokens[::-1]

    def value(self) -> Fraction:
        result = self._sum()
        if self._rest:
            raise _MalformedError
        return result

    def _next_is(self, choices: str) -> bool:
        return bool(self._rest) and self._rest[-1] in choices

    def _sum(self) -> Fraction:
        result = self._product()
        while self._next_is("+-"):
            sign = self._rest.pop()
            term = self._product()
            result = result + term if sign == "+" else result - term
        return result

    def _product(self) -> Fraction:
        result = self._atom()
        while self._next_is("*/"):
            sign = self._rest.pop()
            factor = self._atom()
            result = result * factor if sign == "*" else result / factor
        return result

    def _atom(self) -> Fraction:
        if not self._rest:
            raise _MalformedError
        token = self._rest.pop()
        if token[0] in "0123456789":
            return Fraction(int(token))
        if token != "(":
            raise _MalformedError
        result = self._sum()
        if not self._next_is(")"):
            raise _MalformedError
        self._rest.pop()
        return result


class _Tree(NamedTuple):
    """An expression with a whole value; precedence 3 is a number."""

    value: int
    text: str
    precedence: int = 3


def _random_tree(numbers: Sequence[int], rng: random.Random) -> _Tree | None:
    """Join two random subtrees by a random operator until one is left; None where a division is not
    exact."""
    trees = [_Tree(number, str(number)) for number in numbers]
    while len(trees) > 1:
        left, right = (trees.pop(rng.randrange(len(trees))) for _ in range(2))
        joined = _join(left, rng.choice("+-*/"), right)
        if joined is None:
            return None
        trees.append(joined)
    return trees[0]


def _join(left: _Tree, operator: str, right: _Tree) -> _Tree | None:
    if operator == "/" and (right.value == 0 or left.value % right.value):
        return None
    value, rank = OPERATIONS[operator](left.value, right.value), PRECEDENCE[operator]
    # Equal rank on the right binds to the left when read back: harmless after + and *, wrong after - and /.
    tight = rank + (operator in "-/")
    return _Tree(value, _wrap(left, rank) + operator + _wrap(right, tight), rank)


def _wrap(tree: _Tree, least: int) -> str:
    return tree.text if tree.precedence >= least else f"({tree.text})"


def _prompt(numbers: Sequence[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))}={target}:"


def _longest_answer(size: int) -> int:
    """Tokens of the longest solution: two digits a number, an operator between, parentheses around every
    inner operation but the root, the end."""
    return 2 * size + (size - 1) + 2 * (size - 2) + 1


def _check(config: EnvironmentConfig) -> None:
    if config.template:
        check_template(config.template, ["numbers", "target"])
    if config.size > MAX_SIZE:
        raise ConfigError(
            f"environment.size = {config.size}: countdown gives at most {MAX_SIZE} numbers; lower it"
        )
    needed = _longest_answer(config.size)
    if config.max_tokens < needed:
        raise ConfigError(
            f"environment.max_tokens = {config.max_tokens}: solutions of {config.size} numbers take up to "
            f"{needed} tokens; raise it or lower environment.size"
        )
