"""The held-out hash and the drawing of problems."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.environments.splits import draw, split_of
from vcpo.errors import ConfigError


def test_split_of_known_prompts() -> None:
    """The split must not change between versions or machines. ``b2sum -l 8`` gives these texts the bytes
    de, 44, db, 29 and 98: only the last is divisible by 8."""
    texts = ["a", "你好", "prompt 0", "prompt 25", "prompt 26"]
    assert [split_of(text) for text in texts] == ["train"] * 4 + ["held_out"]


def test_one_text_in_eight_is_held_out() -> None:
    held_out = sum(split_of(f"prompt {i}") == "held_out" for i in range(20_000))
    assert abs(held_out / 20_000 - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 20_000) ** 0.5


@settings(deadline=None)
@given(index=st.integers(0, 2**40))
def test_streams_are_independent_and_repeatable(index: int) -> None:
    def propose(rng: random.Random) -> tuple[str, int]:
        number = rng.getrandbits(64)
        return str(number), number

    train, held_out = draw(index, "train", propose), draw(index, "held_out", propose)
    assert (split_of(train.prompt), split_of(held_out.prompt)) == ("train", "held_out")
    assert train.prompt == str(train.answer)
    assert (train.index, held_out.index) == (index, index)
    assert train == draw(index, "train", propose)
    assert train.prompt != draw(index + 1, "train", propose).prompt


def test_rejected_candidates_are_passed_over() -> None:
    candidates = iter([None, None, ("a", 1)])
    assert draw(0, split_of("a"), lambda rng: next(candidates)).answer == 1


def test_settings_without_a_problem_are_an_error() -> None:
    other = "held_out" if split_of("a") == "train" else "train"
    with pytest.raises(ConfigError, match=rf"no {other} problem in 50000 draws.*environment\.size"):
        draw(0, other, lambda rng: ("a", None))
