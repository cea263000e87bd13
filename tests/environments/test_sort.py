"""Sorting: what counts as right, and which prompts are held out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.config import EnvironmentConfig
from vcpo.environments.protocol import (
    ContextChecked,
    DemonstratingEnvironment,
    Environment,
    Episode,
    Problem,
    SmallModelEnvironment,
)
from vcpo.environments.sort import Sort
from vcpo.errors import ConfigError
from vcpo.samplers.protocol import Completion
from vcpo.trajectory import Trajectory

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


def sort_of(**settings: int) -> tuple[Sort, CharCodec]:
    config = EnvironmentConfig.model_validate({"kind": "sort", **settings})
    codec = CharCodec(Sort.alphabet(config))
    return Sort(codec, config), codec


SORT, CODEC = sort_of(size=6)
PROBLEM = Problem(0, "314159>", "113459")


def play(answer: Sequence[int]) -> Trajectory:
    async def run() -> Trajectory:
        episode = Episode(OneAnswer(answer), seed=0, session=0, stop=frozenset((END,)))
        return episode.trajectory(await SORT.play(PROBLEM, episode))

    return asyncio.run(run())


def test_protocols() -> None:
    assert isinstance(SORT, Environment)
    assert isinstance(SORT, DemonstratingEnvironment)
    assert isinstance(SORT, ContextChecked)
    assert isinstance(Sort, SmallModelEnvironment)


def test_right_answer_and_its_record() -> None:
    record = play([*CODEC.encode("113459"), END])
    assert (record.reward, record.outcome) == (1.0, "finished")
    assert record.tokens.tolist() == [*CODEC.encode("314159>113459"), END]
    assert record.action_mask.tolist() == [False] * 7 + [True] * 7
    assert record.versions.tolist() == [-1] * 7 + [3] * 7
    assert record.log_probs.tolist() == [0.0] * 7 + [-0.5] * 7


@pytest.mark.parametrize(
    ("text", "outcome"),
    [("", "finished"), ("113495", "finished"), ("11345", "finished"), ("1134599", "truncated")],
)
def test_wrong_answers(text: str, outcome: str) -> None:
    record = play([*CODEC.encode(text), END])
    assert (record.reward, record.outcome) == (0.0, outcome)


def test_right_digits_without_an_end_are_wrong() -> None:
    record = play(CODEC.encode("113459>"))
    assert (record.reward, record.outcome) == (0.0, "truncated")


@settings(deadline=None)
@given(index=st.integers(0, 2**40), split=st.sampled_from(["train", "held_out"]), size=st.integers(2, 26))
def test_answers_are_the_prompt_in_order(index: int, split: Any, size: int) -> None:
    problem = sort_of(size=size)[0].problem(index, split)
    digits = problem.prompt.removesuffix(">")
    assert len(digits) == size
    assert Counter(problem.answer) == Counter(digits)
    assert all(a <= b for a, b in zip(problem.answer, problem.answer[1:], strict=False))
    assert problem == sort_of(size=size)[0].problem(index, split)


def test_splits_share_no_prompt_and_cover_all() -> None:
    """All 1,000 prompts of three digits are met, each in one split, an eighth of them held out."""
    sort, codec = sort_of(size=3)
    train = {sort.problem(i, "train").prompt for i in range(9000)}
    held_out = {sort.problem(i, "held_out").prompt for i in range(1500)}
    shown = {codec.decode(d.tokens)[:4] for d in islice(sort.demonstrations(0), 2000)}
    assert not held_out & (train | shown)
    assert len(train | held_out) > 995
    assert 94 < len(held_out) < 156  # 125 within three standard errors
    first_digits = np.array([int(sort.problem(i, "train").prompt[0]) for i in range(2000)])
    assert abs(first_digits.mean() - 4.5) < 0.4


def test_demonstrations_are_right() -> None:
    for demonstration in islice(SORT.demonstrations(1), 200):
        shown, learned = demonstration.tokens[:7], demonstration.tokens[7:]
        assert demonstration.action_mask == [False] * 7 + [True] * 7
        assert learned == [*sorted(shown[:6]), END]


@pytest.mark.parametrize(("size", "max_tokens", "needed"), [(26, 26, 27), (6, 3, 7)])
def test_too_few_tokens_to_answer(size: int, max_tokens: int, needed: int) -> None:
    with pytest.raises(
        ConfigError, match=f"max_tokens = {max_tokens}: sorting {size} digits takes {needed} tok"
    ):
        sort_of(size=size, max_tokens=max_tokens)


def test_context_is_checked_to_the_token() -> None:
    SORT.check_context(14)
    with pytest.raises(ConfigError, match=r"needs 14 tokens .* holds 13"):
        SORT.check_context(13)
