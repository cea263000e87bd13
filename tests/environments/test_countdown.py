"""The expression checker against Python's own arithmetic, and problems that are solvable."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import islice, product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcpo.config import EnvironmentConfig
from vcpo.environments.countdown import MAX_EXPRESSION, Countdown, answer_in, check_expression
from vcpo.environments.protocol import (
    ContextChecked,
    DemonstratingEnvironment,
    Environment,
    Episode,
    SmallModelEnvironment,
)
from vcpo.errors import ConfigError
from vcpo.samplers.protocol import Completion

END = 0


class CharCodec:
    """Character i of the alphabet is token i + 1; 0 ends."""

    end_id = END

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet

    def encode(self, text: str) -> list[int]:
        return [1 + self.alphabet.index(char) for char in text]

    encode_prompt = encode

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.alphabet[token - 1] for token in tokens if token != END)


class OneAnswer:
    """Samples one given answer, cut at the limit."""

    context_length, version = 64, 3

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer = list(answer)

    async def generate(
        self, tokens: Sequence[int], *, max_tokens: int, stop: frozenset[int], **_: Any
    ) -> Completion:
        sampled = self.answer[:max_tokens]
        finish = "stop" if sampled and sampled[-1] in stop else "length"
        return Completion(sampled, [-0.5] * len(sampled), [self.version] * len(sampled), finish)

    def release(self, session: int) -> None: ...

    async def update(self, version: int, weights: Mapping[str, Any]) -> str:
        return ""


def countdown_of(**settings: int | str) -> tuple[Countdown, CharCodec]:
    config = EnvironmentConfig.model_validate({"kind": "countdown", **settings})
    codec = CharCodec(Countdown.alphabet(config))
    return Countdown(codec, config), codec


COUNTDOWN, CODEC = countdown_of(size=3)

Exact = Fraction | None
"""A value, or None where something is divided by zero."""


def apply(left: Exact, operator: str, right: Exact) -> Exact:
    if left is None or right is None or (operator == "/" and right == 0):
        return None
    if operator == "/":
        return left / right
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


Tree = tuple[str, list[int], Exact]
"""Fully parenthesised text, its numbers, its value."""


def leaf(number: int) -> Tree:
    return str(number), [number], Fraction(number)


def joined(parts: tuple[Tree, str, Tree]) -> Tree:
    (a, numbers_a, x), operator, (b, numbers_b, y) = parts
    return f"({a}{operator}{b})", numbers_a + numbers_b, apply(x, operator, y)


TREES = st.recursive(
    st.integers(1, 30).map(leaf),
    lambda children: st.tuples(children, st.sampled_from("+-*/"), children).map(joined),
    max_leaves=7,
)


@settings(deadline=None)
@given(tree=TREES, spaced=st.booleans())
def test_parenthesised_trees_evaluate_exactly(tree: Tree, spaced: bool) -> None:
    text, numbers, value = tree
    text = text.replace("(", "( ").replace("+", " + ") if spaced else text
    if value is None:
        assert not any(check_expression(text, numbers, target) for target in range(-3, 4))
    else:
        near = round(value)
        assert check_expression(text, numbers, near) == (value == near)
        assert not check_expression(text, numbers, near + 1)
        assert not check_expression(text, [*numbers, 1], near)
        assert not check_expression(text, numbers[1:], near)


@settings(deadline=None)
@given(
    numbers=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    operators=st.lists(st.sampled_from("+-*/"), min_size=5, max_size=5),
)
def test_precedence_and_left_association_are_those_of_python(
    numbers: list[int], operators: list[str]
) -> None:
    """A chain without parentheses: Python evaluates the same text over Fractions."""
    operators = operators[: len(numbers) - 1]
    text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in spread(text))
    value = eval(exact, {"Fraction": Fraction})  # text made here, of digits and operators only
    assert check_expression(text, numbers, round(value)) == (value == round(value))
    if value == round(value):
        assert not check_expression(text, numbers, round(value) - 1)


def spread(text: str) -> list[str]:
    for operator in "+-*/":
        text = text.replace(operator, f" {operator} ")
    return text.split()


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("3*5+7", [3, 5, 7], 22),
        ("7 + 5 * 3", [3, 5, 7], 22),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),  # exact only in fractions
        ("8-4-2", [2, 4, 8], 2),
        ("8/4/2", [2, 4, 8], 1),
        ("8-(4-2)", [2, 4, 8], 6),
        ("((((5))))*2", [2, 5], 10),
        ("3-5", [3, 5], -2),
        ("0*5", [5, 0], 0),
        ("(" * 98 + "3" + ")" * 98 + "+4", [3, 4], 7),
    ],
)
def test_right_expressions(text: str, numbers: list[int], target: int) -> None:
    assert check_expression(text, numbers, target)


DEEP = 5000


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("", [3, 5], 8),
        (" ", [3, 5], 8),
        ("3+5", [3, 5, 5], 8),
        ("3+5+5", [3, 5], 13),
        ("3+3", [3, 5], 6),
        ("35", [3, 5], 35),
        ("3 5", [3, 5], 8),
        ("3+5=8", [3, 5], 8),
        ("8", [3, 5], 8),
        ("2**3", [2, 3], 8),
        ("2 * * 3", [2, 3], 8),
        ("7//2", [7, 2], 3),
        ("-3+5", [3, 5], 2),
        ("5+-3", [3, 5], 2),
        ("5--3", [3, 5], 8),
        ("+3+5", [3, 5], 8),
        ("3+", [3], 3),
        ("3+5+", [3, 5], 8),
        ("*3+5", [3, 5], 8),
        ("03+5", [3, 5], 8),
        ("3.0+5", [3, 5], 8),
        ("1_0+5", [10, 5], 15),
        ("1e1+5", [10, 5], 15),
        ("0x3+5", [3, 5], 8),
        ("٣+5", [3, 5], 8),
        ("３+5", [3, 5], 8),
        ("3²", [3, 2], 9),
        ("3×5", [3, 5], 15),
        ("3\u00a0+ 5", [3, 5], 8),
        ("3+5\n", [3, 5], 8),
        ("3/0+5", [3, 0, 5], 8),
        ("3/(5-5)", [3, 5, 5], 0),
        ("(3+5", [3, 5], 8),
        ("3+5)", [3, 5], 8),
        (")3+5(", [3, 5], 8),
        ("()3+5", [3, 5], 8),
        ("3(5)", [3, 5], 15),
        ("(3)(5)", [3, 5], 15),
        ("[3+5]", [3, 5], 8),
        ("3+5#", [3, 5], 8),
        ("3,5", [3, 5], 8),
        ("3+5;import os", [3, 5], 8),
        ("__import__('os')", [], 0),
        ("3+5+x", [3, 5], 8),
        ("3%5", [3, 5], 3),
        ("9" * 6000, [9], 9),
        ("9" * 150 + "+5", [9, 5], 14),
        ("(" * DEEP + "3" + ")" * DEEP, [3], 3),
        ("(" * MAX_EXPRESSION, [], 0),
        ("(" * 150 + "3", [3], 3),
        ("3" + " " * MAX_EXPRESSION + "+5", [3, 5], 8),
        ("3+5\x00", [3, 5], 8),
        ("\ud8003+5", [3, 5], 8),
    ],
)
def test_wrong_and_hostile_expressions(text: str, numbers: list[int], target: int) -> None:
    assert check_expression(text, numbers, target) is False


@settings(deadline=None)
@given(text=st.text() | st.text("0123456789+-*/() ", max_size=220))
@example(text="((")
def test_any_text_gets_an_answer(text: str) -> None:
    assert check_expression(text, [1, 2], 3) in (True, False)


@settings(deadline=None)
@given(text=st.text("12+-*/()", min_size=1, max_size=9))
def test_accepted_text_means_the_same_to_python(text: str) -> None:
    """Whatever is accepted is also valid Python with this value: no expression is let through by a
    reading of our own."""
    for target in range(-3, 4):
        if check_expression(text, [1, 2], target):
            exact = text.replace("1", "Fraction(1)").replace("2", "Fraction(2)")
            assert eval(exact, {"Fraction": Fraction}) == target


def test_every_short_text_by_brute_force() -> None:
    """All texts of up to five characters over these: exactly the ones that two numbers can form."""
    accepted = {
        text
        for length in range(1, 6)
        for text in map("".join, product("12+-*/()", repeat=length))
        if any(check_expression(text, [1, 2], target) for target in (-1, 0, 1, 2, 3))
    }
    forms = {f"{a}{o}{b}" for a, b in (("1", "2"), ("2", "1")) for o in "+-*/"} - {"1/2"}
    wrapped = {f"({form})" for form in forms}
    wrapped |= {f"({form[0]}){form[1:]}" for form in forms} | {f"{form[:2]}({form[2]})" for form in forms}
    assert accepted == forms | wrapped


@cache
def reachable(numbers: tuple[int, ...]) -> frozenset[Fraction]:
    """Every value that some expression over all of ``numbers`` (sorted) has."""
    if len(numbers) == 1:
        return frozenset((Fraction(numbers[0]),))
    values: set[Fraction] = set()
    for chosen in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if chosen >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not chosen >> i & 1)
        for x, y, operator in product(reachable(left), reachable(right), "+-*/"):
            if (value := apply(x, operator, y)) is not None:
                values.add(value)
    return frozenset(values)


@settings(deadline=None)
@given(index=st.integers(0, 2**40), split=st.sampled_from(["train", "held_out"]), size=st.integers(2, 4))
def test_problems_are_solvable(index: int, split: Any, size: int) -> None:
    problem = countdown_of(size=size)[0].problem(index, split)
    puzzle = problem.answer
    given_text, target = problem.prompt.removesuffix(":").split("=")
    assert [int(n) for n in given_text.split(" ")] == list(puzzle.numbers)
    assert int(target) == puzzle.target
    assert len(puzzle.numbers) == size
    assert all(1 <= n <= 20 for n in puzzle.numbers)
    assert 1 <= puzzle.target <= 99
    assert puzzle.target in reachable(tuple(sorted(puzzle.numbers)))
    assert problem == countdown_of(size=size)[0].problem(index, split)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_demonstrations_are_right(size: int) -> None:
    """Rendered with few parentheses, a solution still has the value of its tree, and fits its bound."""
    countdown, codec = countdown_of(size=size)
    for demonstration in islice(countdown.demonstrations(0), 200):
        prompt, solution = codec.decode(demonstration.tokens).split(":")
        numbers, target = prompt.split("=")
        assert check_expression(solution, [int(n) for n in numbers.split(" ")], int(target))
        assert demonstration.tokens[-1] == END
        shown = len(prompt) + 1
        assert demonstration.action_mask == [False] * shown + [True] * (len(solution) + 1)
        assert len(solution) + 1 <= 5 * size - 4


def test_splits_share_no_prompt() -> None:
    train = {COUNTDOWN.problem(i, "train").prompt for i in range(3000)}
    held_out = {COUNTDOWN.problem(i, "held_out").prompt for i in range(600)}
    shown = {CODEC.decode(d.tokens).split(":")[0] + ":" for d in islice(COUNTDOWN.demonstrations(0), 2000)}
    assert not held_out & (train | shown)
    assert len(train) > 2500


@pytest.mark.parametrize(("ending", "reward"), [([END], 1.0), ([], 0.0)])
def test_play(ending: list[int], reward: float) -> None:
    problem = COUNTDOWN.problem(0, "train")
    answer = [*CODEC.encode(problem.answer.solution), *ending]
    episode = Episode(OneAnswer(answer), seed=0, session=0, stop=frozenset((END,)))
    record = episode.trajectory(asyncio.run(COUNTDOWN.play(problem, episode)))
    shown = CODEC.encode(problem.prompt)
    assert record.reward == reward
    assert record.tokens.tolist() == shown + answer
    assert record.action_mask.tolist() == [False] * len(shown) + [True] * len(answer)
    assert record.versions.tolist() == [-1] * len(shown) + [3] * len(answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("3*5+7", "3*5+7"),
        ("so <answer> 3 * 5 + 7 </answer>", "3 * 5 + 7"),
        ("<answer>3+5</answer> no, <answer>\n3*5+7\n</answer>", "3*5+7"),
        ("<answer>3+5 <answer>3*5+7</answer>", "3*5+7"),
        (r"so $\boxed{3 \times 5 + 7}$", "3 * 5 + 7"),
        (r"\boxed{8 \div (4 \cdot 2)}", "8 / (4 * 2)"),
        ("<answer>8 ÷ 4 × 2</answer>", "8 / 4 * 2"),
        (r"<answer>1+1</answer> \boxed{3*5+7}", "3*5+7"),
        ("<answer>3*5+7", "<answer>3*5+7"),
        ("3 × 5", "3 × 5"),
        ("", ""),
    ],
)
def test_where_the_answer_of_a_response_is(response: str, answer: str) -> None:
    assert answer_in(response) == answer


TEMPLATE = "Make {target} of {numbers}.\n"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("First 3*5. <answer>{}</answer>", 1.0),
        ("First 3*5. \\boxed{{{}}}.", 1.0),
        ("{}", 1.0),
        ("First 3*5. {}", 0.0),
        ("<answer>{}</answer><answer>1</answer>", 0.0),
    ],
)
def test_a_large_model_is_asked_in_words_and_may_reason(response: str, reward: float) -> None:
    config = EnvironmentConfig.model_validate(
        {"kind": "countdown", "size": 3, "max_tokens": 60, "template": TEMPLATE}
    )
    codec = CharCodec(Countdown.alphabet(config) + "First<answer>boxd\\{}")
    countdown = Countdown(codec, config)
    problem = countdown.problem(0, "train")
    assert problem == COUNTDOWN.problem(0, "train")  # the words decide neither puzzle nor split
    puzzle = problem.answer
    answer = [*codec.encode(response.format(puzzle.solution)), END]
    episode = Episode(OneAnswer(answer), seed=0, session=0, stop=frozenset((END,)))
    record = episode.trajectory(asyncio.run(countdown.play(problem, episode)))
    shown = f"Make {puzzle.target} of {', '.join(map(str, puzzle.numbers))}.\n"
    assert codec.decode(record.tokens.tolist()) == shown + response.format(puzzle.solution)
    assert record.reward == reward
    (demonstration,) = islice(countdown.demonstrations(0), 1)
    assert codec.decode(demonstration.tokens).startswith("Make ")
    longest = len("Make 99 of 20, 20, 20.\n") + 11
    countdown.check_context(longest)
    with pytest.raises(ConfigError, match=rf"needs {longest} tokens .* holds {longest - 1}"):
        countdown.check_context(longest - 1)


def test_an_end_token_of_another_kind_ends_too() -> None:
    """Chat models often end a turn with a token that is not the tokenizer's end."""
    turn_end = len(CODEC.alphabet)  # the last character, as the model's own stop token
    problem = COUNTDOWN.problem(0, "train")
    answer = [*CODEC.encode(problem.answer.solution), turn_end]
    episode = Episode(OneAnswer(answer), seed=0, session=0, stop=frozenset((END, turn_end)))
    assert episode.outcome == "finished"
    asyncio.run(COUNTDOWN.play(problem, episode))
    assert episode.outcome == "finished"


def test_an_empty_answer_is_wrong() -> None:
    episode = Episode(OneAnswer([END]), seed=0, session=0, stop=frozenset((END,)))
    assert asyncio.run(COUNTDOWN.play(COUNTDOWN.problem(0, "train"), episode)) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 7}, "at most 6 numbers"),
        ({"size": 4, "max_tokens": 15}, "take up to 16 tokens"),
        ({"template": "Make {target}."}, r"template lacks \{numbers\}"),
        ({"template": "Make {target} of {numbers} for {prompt}."}, r"template has \{prompt\}"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        countdown_of(**settings)


def test_context_is_checked_to_the_token() -> None:
    longest = len("20 20 20=99:") + 11
    COUNTDOWN.check_context(longest)
    with pytest.raises(ConfigError, match=rf"needs {longest} tokens .* holds {longest - 1}"):
        COUNTDOWN.check_context(longest - 1)


def test_protocols() -> None:
    assert isinstance(COUNTDOWN, Environment)
    assert isinstance(COUNTDOWN, DemonstratingEnvironment)
    assert isinstance(COUNTDOWN, ContextChecked)
    assert isinstance(Countdown, SmallModelEnvironment)
