"""The episode: what is shown, sampled and recorded, and what happens at the edge of the context."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vcpo.environments.protocol import Episode
from vcpo.errors import ContextOverflowError, EnvironmentFailure, NonFiniteError
from vcpo.samplers.protocol import Completion

END = 0


class ScriptedSampler:
    """Answers each call with the next tokens of a script; version and log-prob tell calls apart."""

    def __init__(self, script: Sequence[Sequence[int]], context_length: int = 100) -> None:
        self.script, self.context_length, self.version = (
            [list(tokens) for tokens in script],
            context_length,
            0,
        )
        self.calls: list[dict[str, Any]] = []

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        stop: frozenset[int],
        seed: int,
        greedy: bool = False,
        session: int | None = None,
    ) -> Completion:
        call = len(self.calls)
        self.calls.append(
            {"tokens": list(tokens), "max_tokens": max_tokens, "stop": stop, "seed": seed}
            | {"greedy": greedy, "session": session}
        )
        sampled = self.script[call][:max_tokens]
        return Completion(
            tokens=sampled,
            log_probs=[-(call + 1) - i / 8 for i in range(len(sampled))],
            versions=[10 * (call + 1) + i for i in range(len(sampled))],
            finish="stop" if sampled and sampled[-1] in stop else "length",
        )

    def release(self, session: int) -> None: ...

    async def update(self, version: int, weights: Mapping[str, Any]) -> str:
        return ""


def episode_of(sampler: ScriptedSampler, greedy: bool = False) -> Episode:
    return Episode(sampler, seed=7, session=3, stop=frozenset((END,)), greedy=greedy)


def test_record_of_two_turns() -> None:
    sampler = ScriptedSampler([[5], [6, 7, END]])
    episode = episode_of(sampler, greedy=True)

    async def play() -> None:
        episode.observe([1, 2, 3])
        assert await episode.act(max_tokens=1, stop=frozenset()) == [5]
        episode.observe([4])
        assert await episode.act(max_tokens=9) == [6, 7, END]

    asyncio.run(play())
    record = episode.trajectory(0.5)
    assert record.tokens.tolist() == [1, 2, 3, 5, 4, 6, 7, END]
    assert record.action_mask.tolist() == [False, False, False, True, False, True, True, True]
    assert record.log_probs.tolist() == [0, 0, 0, -1, 0, -2, -2.125, -2.25]
    assert record.versions.tolist() == [-1, -1, -1, 10, -1, 20, 21, 22]
    assert (record.reward, record.outcome, record.note) == (0.5, "finished", "")
    assert (record.action_count, record.oldest_version) == (4, 10)
    assert sampler.calls[0] == {
        "tokens": [1, 2, 3],
        "max_tokens": 1,
        "stop": frozenset(),
        "seed": 7,
        "greedy": True,
        "session": 3,
    }
    assert sampler.calls[1]["tokens"] == [1, 2, 3, 5, 4]
    assert sampler.calls[1]["stop"] == {END}


def test_one_move_without_a_stop_token_is_not_truncated() -> None:
    episode = episode_of(ScriptedSampler([[5]]))
    episode.observe([1])
    asyncio.run(episode.act(max_tokens=1, stop=frozenset()))
    assert episode.outcome == "finished"


def test_an_answer_cut_by_its_limit_is_truncated() -> None:
    episode = episode_of(ScriptedSampler([[5, 6, 7, END]]))
    episode.observe([1])
    assert asyncio.run(episode.act(max_tokens=3)) == [5, 6, 7]
    assert episode.outcome == "truncated"


def test_an_answer_is_cut_by_the_context() -> None:
    sampler = ScriptedSampler([[5, 6, 7, END]], context_length=5)
    episode = episode_of(sampler)
    episode.observe([1, 2, 3])
    assert asyncio.run(episode.act(max_tokens=9)) == [5, 6]
    assert sampler.calls[0]["max_tokens"] == 2
    assert (episode.outcome, episode.room) == ("truncated", 0)


def test_acting_without_room_asks_nobody() -> None:
    sampler = ScriptedSampler([], context_length=2)
    episode = episode_of(sampler)
    episode.observe([1, 2])
    assert asyncio.run(episode.act(max_tokens=1, stop=frozenset())) == []
    assert episode.outcome == "truncated"
    assert sampler.calls == []
    assert episode.trajectory(0).oldest_version is None


def test_an_observation_fills_the_context_but_not_more() -> None:
    episode = episode_of(ScriptedSampler([], context_length=4))
    episode.observe([1, 2])
    episode.observe([3, 4])
    with pytest.raises(ContextOverflowError, match="1 observed tokens do not fit: 4 of 4"):
        episode.observe([5])
    assert episode.tokens == [1, 2, 3, 4]
    assert issubclass(ContextOverflowError, EnvironmentFailure)


def test_failure_is_recorded_with_its_reason() -> None:
    record = episode_of(ScriptedSampler([])).trajectory(0.0, outcome="failed", note="timed out")
    assert (record.outcome, record.note, len(record.tokens)) == ("failed", "timed out", 0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_must_be_finite(reward: float) -> None:
    with pytest.raises(NonFiniteError, match="reward"):
        episode_of(ScriptedSampler([])).trajectory(reward)
