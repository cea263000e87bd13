"""Rollout loops: an environment may do whatever it likes; it costs its own episode and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from vcpo.environments.protocol import Episode, Problem, Split
from vcpo.errors import ContextOverflowError, DataError, EnvironmentFailure, NonFiniteError, VcpoError
from vcpo.pipeline.rollout import GroupOrder, RolloutLoop
from vcpo.samplers.protocol import Completion
from vcpo.samplers.random import uniforms
from vcpo.trajectory import Group, Trajectory

END = 0
PROMPT = [5, 6, 7]


class CountingSampler:
    """Draws each token from (seed, position) alone, one turn of the event loop a token."""

    version = 3
    context_length = 16

    def __init__(self) -> None:
        self.calls = 0
        self.greedy_calls = 0
        self.released: list[int] = []
        self.sessions: set[int] = set()
        self.error: Exception | None = None

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
        self.calls += 1
        self.greedy_calls += greedy
        assert session is not None
        self.sessions.add(session)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        places = np.arange(len(tokens), len(tokens) + max_tokens, dtype=np.uint64)
        drawn = uniforms(np.full(max_tokens, seed, np.uint64), places)
        chosen = [1 + int(9 * u) for u in drawn]
        return Completion(chosen, [-math.log(9)] * max_tokens, [self.version] * max_tokens, "stop")

    def release(self, session: int) -> None:
        self.released.append(session)

    async def update(self, version: int, weights: Any) -> str:
        raise AssertionError("not part of a rollout")


Play = Callable[[Problem, Episode], Awaitable[Any]]


class Scripted:
    """An environment whose episodes are a function given by the test."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.asked: list[tuple[int, Split]] = []

    def problem(self, index: int, split: Split) -> Problem:
        self.asked.append((index, split))
        return Problem(index, f"problem {index}")

    async def play(self, problem: Problem, episode: Episode) -> float:
        return await self._play(problem, episode)


async def well_behaved(problem: Problem, episode: Episode) -> float:
    episode.observe(PROMPT)
    first = await episode.act(2)
    episode.observe([8])
    await episode.act(2)
    return float(first[0])


def make_loop(
    play: Play, *, size: int = 3, seed: int = 0, timeout: float = 30.0
) -> tuple[RolloutLoop, CountingSampler]:
    sampler = CountingSampler()
    loop = RolloutLoop(
        Scripted(play), sampler, group_size=size, seed=seed, stop=frozenset((END,)), timeout_seconds=timeout
    )
    return loop, sampler


def play_one(play: Play, **settings: Any) -> Group:
    loop, _ = make_loop(play, **settings)
    return asyncio.run(loop.play_group(GroupOrder(4, 2)))


def first_attempts_only(trouble: Play) -> Play:
    """``trouble`` the first time an episode is played, then good behaviour."""
    attempts = 0

    async def play(problem: Problem, episode: Episode) -> Any:
        nonlocal attempts
        attempts += 1
        return await (trouble if attempts == 1 else well_behaved)(problem, episode)

    return play


def assert_failed(trajectory: Trajectory, note: str) -> None:
    assert trajectory.outcome == "failed"
    assert trajectory.reward == 0.0
    assert (len(trajectory.tokens), trajectory.action_count) == (0, 0)
    assert trajectory.note == note


def assert_well_played(trajectory: Trajectory) -> None:
    assert trajectory.outcome == "finished"
    assert trajectory.note == ""
    assert trajectory.action_mask.tolist() == [False] * 3 + [True] * 2 + [False] + [True] * 2
    assert trajectory.tokens[:3].tolist() == PROMPT
    assert trajectory.reward == trajectory.tokens[3]


def same(a: Trajectory, b: Trajectory) -> bool:
    return a.reward == b.reward and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "action_mask", "log_probs", "versions")
    )


# Good behaviour


def test_a_group_has_its_members_in_order_with_versions_and_number() -> None:
    group = play_one(well_behaved, size=5)
    assert (group.index, group.admitted_version, len(group.trajectories)) == (4, 2, 5)
    for trajectory in group.trajectories:
        assert_well_played(trajectory)
        assert set(trajectory.versions[trajectory.action_mask]) == {3}
    assert group.oldest_version == 3


def test_the_same_order_gives_the_same_group_and_nothing_else_does() -> None:
    once, again = play_one(well_behaved), play_one(well_behaved)
    assert all(same(a, b) for a, b in zip(once.trajectories, again.trajectories, strict=True))
    other_seed = play_one(well_behaved, seed=1)
    assert not any(same(a, b) for a, b in zip(once.trajectories, other_seed.trajectories, strict=True))
    first, second, third = once.trajectories
    assert not same(first, second)
    assert not same(second, third)


def test_a_group_is_the_same_whatever_is_played_beside_it() -> None:
    loop, _ = make_loop(well_behaved)
    alone = play_one(well_behaved)
    crowd = asyncio.run(loop.play_groups(GroupOrder(n, 2) for n in (9, 4, 1)))
    assert [g.index for g in crowd] == [9, 4, 1]
    assert all(same(a, b) for a, b in zip(crowd[1].trajectories, alone.trajectories, strict=True))


def test_runs_of_different_seeds_see_different_problems() -> None:
    loop, _ = make_loop(well_behaved)
    other, _ = make_loop(well_behaved, seed=1)
    streams = [{lo.training_index(i) for i in range(1000)} for lo in (loop, other)]
    assert [len(s) for s in streams] == [1000, 1000]
    assert not streams[0] & streams[1]


def test_an_evaluation_repeats_itself_and_is_not_the_training() -> None:
    environment, sampler = Scripted(well_behaved), CountingSampler()
    loop = RolloutLoop(environment, sampler, group_size=2, seed=0, stop=frozenset((END,)), timeout_seconds=9)
    first = asyncio.run(loop.evaluate(2, 3, greedy=False))
    second = asyncio.run(loop.evaluate(3, 2, greedy=False))
    assert environment.asked == [(i, "held_out") for i in (2, 3, 4, 3, 4)]
    assert all(same(a, b) for a, b in zip(first[1:], second, strict=True))
    assert sampler.greedy_calls == 0
    asyncio.run(loop.evaluate(0, 1, greedy=True))
    assert sampler.greedy_calls == 2


def test_every_session_is_released_whatever_happens() -> None:
    async def fails_for_some(problem: Problem, episode: Episode) -> float:
        reward = await well_behaved(problem, episode)
        if reward > 4:
            raise RuntimeError("no luck")
        return reward

    loop, sampler = make_loop(fails_for_some, size=12)
    asyncio.run(loop.play_group(GroupOrder(0, 0)))
    assert len(sampler.sessions) > 12, "some episodes were retried"
    assert sorted(sampler.released) == sorted(sampler.sessions)


# Environments that raise


async def raises(problem: Problem, episode: Episode) -> float:
    await well_behaved(problem, episode)
    raise KeyError("tool")


def test_an_episode_that_raises_once_counts_by_its_second_attempt() -> None:
    group = play_one(first_attempts_only(raises))
    undisturbed = play_one(well_behaved)
    for trajectory in group.trajectories:
        assert_well_played(trajectory)
    pairs = list(zip(group.trajectories, undisturbed.trajectories, strict=True))
    assert [same(a, b) for a, b in pairs] == [False, True, True], "the retry has other random numbers"


def test_an_episode_that_raises_twice_is_failed_with_the_reason() -> None:
    loop, sampler = make_loop(raises, size=2)
    group = asyncio.run(loop.play_group(GroupOrder(0, 7)))
    for trajectory in group.trajectories:
        assert_failed(trajectory, "KeyError: 'tool'")
    assert sampler.calls == 2 * 2 * 2, "two members, two attempts, two turns"
    assert group.oldest_version == 7, "nothing was sampled: the version at admission"


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, None, "good", [1.0], 1j])
def test_a_reward_that_is_no_finite_number_fails_the_episode(reward: Any) -> None:
    async def play(problem: Problem, episode: Episode) -> Any:
        await well_behaved(problem, episode)
        return reward

    for trajectory in play_one(play).trajectories:
        assert_failed(trajectory, f"the environment's reward is {reward!r}, not a finite number")


@pytest.mark.parametrize("reward", [True, 1, np.float32(1), np.array(1.0), "1"])
def test_whatever_is_a_number_is_a_reward(reward: Any) -> None:
    async def play(problem: Problem, episode: Episode) -> Any:
        episode.observe(PROMPT)
        return reward

    assert play_one(play).rewards == [1.0] * 3


def test_an_observation_that_does_not_fit_fails_the_episode() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        episode.observe([1] * 17)
        raise AssertionError("not reached")

    for trajectory in play_one(play).trajectories:
        assert trajectory.outcome == "failed"
        assert trajectory.note.startswith("17 observed tokens do not fit: 0 of 16 context tokens are used")


def test_an_episode_without_an_act_is_a_record_without_actions() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        episode.observe(PROMPT)
        return 0.5

    for trajectory in play_one(play).trajectories:
        assert (trajectory.outcome, trajectory.reward, trajectory.action_count) == ("finished", 0.5, 0)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), TimeoutError("the tool's own")])
def test_what_is_no_ordinary_exception_costs_its_episode_too(error: BaseException) -> None:
    """An environment that exits, that cancels a task of its own and awaits it, or whose tool timed out."""

    async def play(problem: Problem, episode: Episode) -> float:
        await asyncio.sleep(0)
        raise error

    for trajectory in play_one(play).trajectories:
        assert_failed(trajectory, f"{type(error).__name__}: {error}")


class NoProblem(Scripted):
    """Makes problem 5, and no other."""

    def problem(self, index: int, split: Split) -> Problem:
        if index != 5:
            raise IndexError("no such line")
        return super().problem(index, split)


def loop_without_problems() -> RolloutLoop:
    return RolloutLoop(
        NoProblem(well_behaved),
        CountingSampler(),
        group_size=2,
        seed=0,
        stop=frozenset((END,)),
        timeout_seconds=9,
    )


def test_a_problem_that_cannot_be_made_costs_its_group_and_no_other() -> None:
    loop = loop_without_problems()
    good, bad = asyncio.run(loop.play_groups([GroupOrder(5, 0), GroupOrder(6, 0)]))
    for trajectory in good.trajectories:
        assert_well_played(trajectory)
    for trajectory in bad.trajectories:
        assert_failed(trajectory, "could not make train problem 6: IndexError: no such line")


def test_an_environment_that_never_worked_ends_the_run_at_its_first_evaluation() -> None:
    loop = loop_without_problems()
    with pytest.raises(
        EnvironmentFailure, match="failed in all of 3 episodes; the first: could not make held_out"
    ):
        asyncio.run(loop.evaluate(0, 3, greedy=True))
    asyncio.run(loop.play_group(GroupOrder(5, 0)))  # it works: from now on failures are counted, not raised
    assert [t.outcome for t in asyncio.run(loop.evaluate(0, 3, greedy=True))] == ["failed"] * 3


# Environments that hang


def test_an_episode_that_waits_for_ever_is_cut_and_the_others_are_not() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        if problem.index == 1:
            episode.observe(PROMPT)
            await asyncio.Event().wait()
        return await well_behaved(problem, episode)

    loop, _ = make_loop(play, size=2, timeout=0.2)
    good, hung = asyncio.run(loop.play_groups([GroupOrder(0, 0), GroupOrder(1, 0)]))
    for trajectory in good.trajectories:
        assert_well_played(trajectory)
    for trajectory in hung.trajectories:
        assert_failed(trajectory, "took longer than 0.2 s")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # its coroutine resists to the end
def test_an_episode_that_catches_its_cancellation_is_abandoned() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        while problem.index == 1:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(100)
        return await well_behaved(problem, episode)

    async def rounds() -> list[Group]:
        loop, _ = make_loop(play, size=2, timeout=0.2)
        return await asyncio.wait_for(loop.play_groups([GroupOrder(0, 0), GroupOrder(1, 0)]), 20)

    good, stubborn = asyncio.run(rounds())
    for trajectory in good.trajectories:
        assert_well_played(trajectory)
    for trajectory in stubborn.trajectories:
        assert_failed(trajectory, "took longer than 0.2 s")


def test_an_episode_that_is_cut_has_time_to_clean_up() -> None:
    cleaned: list[int] = []

    async def play(problem: Problem, episode: Episode) -> float:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            cleaned.append(problem.index)
        return 0.0

    for trajectory in play_one(play, size=1, timeout=0.3).trajectories:
        assert_failed(trajectory, "took longer than 0.3 s")
    assert cleaned == [4, 4], "both attempts"


def test_an_episode_that_blocks_is_interrupted_and_the_others_are_unharmed() -> None:
    """The others wait longer than their time limit because one blocks, twice: it is not charged to them."""
    interrupted, begun_of = 0, Counter[int]()

    async def play(problem: Problem, episode: Episode) -> float:
        nonlocal interrupted
        begun_of[problem.index] += 1
        await asyncio.sleep(0)
        if problem.index == 1:
            begun = time.monotonic()
            try:
                time.sleep(60)
            finally:
                interrupted += time.monotonic() - begun < 30
        await asyncio.sleep(0.15)
        return await well_behaved(problem, episode)

    loop, _ = make_loop(play, size=2, timeout=0.3)
    orders = [GroupOrder(n, 0) for n in (0, 1, 2)]
    before, blocked, after = asyncio.run(loop.play_groups(orders))
    assert interrupted == 4
    for trajectory in blocked.trajectories:
        assert_failed(trajectory, "blocked the event loop for longer than environment.timeout_seconds")
    for trajectory in (*before.trajectories, *after.trajectories):
        assert_well_played(trajectory)
    assert begun_of == {0: 2, 1: 4, 2: 2}, "none of the others had to be played again"


def test_blocking_a_little_again_and_again_does_not_buy_time() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        for _ in range(20):
            time.sleep(0.11)
            await asyncio.sleep(0)
        return 1.0

    for trajectory in play_one(play, size=2, timeout=0.3).trajectories:
        assert_failed(trajectory, "took longer than 0.3 s")


def test_a_blocking_loop_that_catches_everything_is_interrupted_again() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        for _ in range(3):
            try:
                time.sleep(60)
            except Exception:
                continue
        return 1.0

    assert play_one(play, size=2, timeout=0.1).rewards == [1.0, 1.0]


def test_no_alarm_is_left_behind() -> None:
    play_one(well_behaved, timeout=0.1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_episode_that_hangs_once_counts_by_its_second_attempt() -> None:
    async def hangs(problem: Problem, episode: Episode) -> float:
        episode.observe(PROMPT)
        await asyncio.sleep(3600)
        return 9.0

    for trajectory in play_one(first_attempts_only(hangs), timeout=0.2).trajectories:
        assert_well_played(trajectory)


# What is nobody's episode


@pytest.mark.parametrize("error", [NonFiniteError("logits", None, "broken"), VcpoError("the engine is gone")])
def test_an_error_of_the_sampler_is_raised_as_itself_and_ends_everything(error: VcpoError) -> None:
    async def watched() -> None:
        loop, sampler = make_loop(well_behaved)
        sampler.error = error
        try:
            await loop.play_groups(GroupOrder(n, 0) for n in range(3))
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "an episode goes on"

    with pytest.raises(type(error)) as raised:
        asyncio.run(watched())
    assert raised.value is error


def test_an_error_of_the_sampler_ends_everything_though_the_environment_hides_it() -> None:
    async def play(problem: Problem, episode: Episode) -> float:
        episode.observe(PROMPT)
        try:
            await episode.act(2)
        except Exception:
            return 1.0
        return 0.0

    loop, sampler = make_loop(play)
    sampler.error = NonFiniteError("logits", None, "broken")
    with pytest.raises(NonFiniteError):
        asyncio.run(loop.play_group(GroupOrder(4, 2)))


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ContextOverflowError("too long"), "too long"),
        (EnvironmentFailure("no token 99"), "no token 99"),
    ],
)
def test_a_request_that_the_sampler_refuses_costs_its_episode(error: Exception, note: str) -> None:
    loop, sampler = make_loop(well_behaved)
    sampler.error = error
    assert_failed(asyncio.run(loop.play_group(GroupOrder(4, 2))).trajectories[0], note)


def test_an_error_of_our_own_that_is_the_environments_costs_its_episode() -> None:
    for error, note in (
        (ContextOverflowError("too long"), "too long"),
        (DataError("line 3"), "DataError: line 3"),
    ):

        async def play(problem: Problem, episode: Episode, error: Exception = error) -> float:
            raise error

        assert_failed(play_one(play).trajectories[0], note)


def test_misuse_of_an_episode_costs_that_episode() -> None:
    async def without_prompt(problem: Problem, episode: Episode) -> float:
        await episode.act(2)
        return 1.0

    async def twice_at_once(problem: Problem, episode: Episode) -> float:
        episode.observe(PROMPT)
        await asyncio.gather(episode.act(2), episode.act(2))
        return 1.0

    assert_failed(
        play_one(without_prompt).trajectories[0], "act before observe: show the model a prompt first"
    )
    assert_failed(play_one(twice_at_once).trajectories[0], "two calls of act at once: await the first")


def test_waiting_for_the_sampler_is_not_charged_to_the_episode() -> None:
    """The sampler takes 0.5 s a turn, the environment 0.05 s; the limit is 0.3 s."""

    class Slow(CountingSampler):
        async def generate(self, tokens: Any, **settings: Any) -> Completion:
            await asyncio.sleep(0.5)
            return await super().generate(tokens, **settings)

    async def play(problem: Problem, episode: Episode) -> float:
        await asyncio.sleep(0.05)
        return await well_behaved(problem, episode)

    loop = RolloutLoop(
        Scripted(play), Slow(), group_size=1, seed=0, stop=frozenset((END,)), timeout_seconds=0.3
    )
    assert_well_played(asyncio.run(loop.play_group(GroupOrder(4, 2))).trajectories[0])


def test_cancelling_a_group_cancels_its_episodes_and_is_no_failure() -> None:
    ended: list[str] = []

    async def play(problem: Problem, episode: Episode) -> float:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")
        return 0.0

    async def cancelled() -> int:
        loop, sampler = make_loop(play)
        playing = asyncio.ensure_future(loop.play_group(GroupOrder(0, 0)))
        await asyncio.sleep(0.01)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        return len(sampler.released)

    assert asyncio.run(cancelled()) == 3
    assert ended == ["cleaned up"] * 3, "each once: not retried"
