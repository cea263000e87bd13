"""Rollout loops: play the episodes of a group, many at once, whatever the environment does.

An environment that raises, takes too long or returns something that is no reward costs its own episode: it
is logged, retried once with other random numbers, and then recorded as failed: reward 0, no tokens to
train on. Code that blocks (a loop without ``await``, a blocking read) would stop every episode of the
process; it is interrupted by an alarm signal after the same time. Only an episode's own time counts: not
the time it waits for the sampler, nor the time that another one blocked. Errors of the sampler are nobody's
episode: they end the run. So does an environment of which no episode has ever worked, at its first
evaluation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from vcpo.environments.protocol import Environment, Episode, FiniteEnvironment, Problem, Split
from vcpo.errors import EnvironmentFailure
from vcpo.samplers.protocol import Completer
from vcpo.samplers.random import derive_seed
from vcpo.samplers.tasks import gather_all
from vcpo.trajectory import Group, Trajectory

log = logging.getLogger(__name__)

ATTEMPTS = 2
BLOCKING_SECONDS = 0.1
"""An environment that runs this long without ``await`` has blocked the others (asyncio's own threshold)."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class GroupOrder:
    """A group to be played."""

    index: int
    """Its number in the order of admission."""
    version: int
    """The learner's version at admission."""
    problem: int | None = None
    """Place of its problem in the run's training stream; None: its number."""


def training_index(seed: int, place: int) -> int:
    """The training problem at ``place`` of a run's stream: different seeds see different streams."""
    return (seed << 32) + place


class RolloutLoop:
    """Plays groups of one environment with one sampler."""

    def __init__(
        self,
        environment: Environment,
        sampler: Completer,
        *,
        group_size: int,
        seed: int,
        stop: frozenset[int],
        timeout_seconds: float,
    ) -> None:
        self._environment, self._sampler = environment, sampler
        self._group_size, self._seed, self._stop = group_size, seed, stop
        self._timeout = timeout_seconds
        self._alarm = _Alarm(timeout_seconds)
        self._limits: set[_TimeLimit] = set()
        """Time limits of the episodes in flight."""
        self._sessions = 0
        self._worked = False
        """Whether any episode was ever played to its end."""

    async def play_group(self, order: GroupOrder) -> Group:
        """Play all episodes of one prompt."""
        begun = time.perf_counter()
        index = self.training_index(order.index if order.problem is None else order.problem)
        seeds = [derive_seed(self._seed, order.index, member) for member in range(self._group_size)]
        return Group(
            index=order.index,
            problem=index,
            trajectories=tuple(await self._play_problem(index, "train", seeds)),
            seconds=time.perf_counter() - begun,
            admitted_version=order.version,
        )

    def training_index(self, place: int) -> int:
        """The training problem at ``place`` of this run's stream."""
        return training_index(self._seed, place)

    async def play_groups(self, orders: Iterable[GroupOrder]) -> list[Group]:
        return await gather_all(self.play_group(order) for order in orders)

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> list[Trajectory]:
        """Play ``count`` held-out problems once each, as far as there are so many; the same random numbers
        every time."""
        if isinstance(self._environment, FiniteEnvironment):
            count = max(0, min(count, self._environment.problem_count("held_out") - first))
        played = await gather_all(
            self._play_problem(i, "held_out", [derive_seed(self._seed, -1, i)], greedy=greedy)
            for i in range(first, first + count)
        )
        trajectories = [t for group in played for t in group]
        if trajectories and not self._worked:
            raise EnvironmentFailure(
                f"the environment failed in all of {len(trajectories)} episodes; "
                f"the first: {trajectories[0].note}"
            )
        return trajectories

    async def _play_problem(
        self, index: int, split: Split, seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Trajectory]:
        """One episode of the problem for each seed."""
        try:
            with self._alarm:
                problem = self._environment.problem(index, split)
        except Exception as error:
            note = f"could not make {split} problem {index}: {type(error).__name__}: {error}"
            log.warning("the environment %s", note)
            return [_failed(note)] * len(seeds)
        return await gather_all(self._play(problem, seed, greedy=greedy) for seed in seeds)

    async def _play(self, problem: Problem, seed: int, *, greedy: bool = False) -> Trajectory:
        note = ""
        for attempt in range(ATTEMPTS):
            self._sessions += 1
            session = self._sessions
            episode = Episode(
                self._sampler,
                seed=derive_seed(seed, attempt) if attempt else seed,
                session=session,
                stop=self._stop,
                greedy=greedy,
            )
            try:
                return await self._attempt(problem, episode)
            except BaseException as error:
                if episode.sampler_error is not None:
                    raise episode.sampler_error from None
                if not _costs_its_episode(error):
                    raise
                note = f"{type(error).__name__}: {error}"
                if isinstance(error, EnvironmentFailure):
                    note = str(error)
                which = f"attempt {attempt + 1} of {ATTEMPTS}"
                log.warning("episode of problem %d failed (%s): %s", problem.index, which, note)
            finally:
                self._sampler.release(session)
        return _failed(note)

    async def _attempt(self, problem: Problem, episode: Episode) -> Trajectory:
        try:
            async with asyncio.timeout(None) as timeout:
                with _TimeLimit(timeout, episode, self._timeout, self._limits) as limit:
                    play = self._environment.play(problem, episode)
                    reward = await _Guarded(play, self._alarm, limit, partial(self._excuse, limit))
        except TimeoutError:
            if timeout.expired():
                raise EnvironmentFailure(f"took longer than {self._timeout:g} s") from None
            raise
        if episode.sampler_error is not None:  # the environment hid it
            raise episode.sampler_error
        trajectory = episode.trajectory(_checked(reward))
        self._worked = True
        return trajectory

    def _excuse(self, own: _TimeLimit, blocked: float) -> None:
        """An episode blocked the event loop: that is not the others' time."""
        for limit in self._limits:
            if limit is not own:
                limit.excused += blocked


class _TimeLimit:
    """Ends an episode that has taken ``seconds`` of its own, by making ``timeout`` expire. An environment
    that catches the cancellation has as long again to clean up, and is then abandoned."""

    def __init__(
        self, timeout: asyncio.Timeout, episode: Episode, seconds: float, in_flight: set[_TimeLimit]
    ) -> None:
        self._timeout, self._episode, self._seconds, self._in_flight = timeout, episode, seconds, in_flight
        self.excused = 0.0
        """Seconds that others blocked."""
        self.expired = self.abandoned = False

    def __enter__(self) -> _TimeLimit:
        self._task = asyncio.current_task()
        self._begun = time.perf_counter()
        self._in_flight.add(self)
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._check)
        return self

    def __exit__(self, *error: object) -> None:
        self._in_flight.discard(self)
        self._timer.cancel()

    def _check(self) -> None:
        own = time.perf_counter() - self._begun - self.excused - self._episode.sampling_seconds
        loop = asyncio.get_running_loop()
        if own < self._seconds:
            self._timer = loop.call_later(self._seconds - own, self._check)
        elif not self.expired:
            self.expired = True
            self._timeout.reschedule(loop.time())
            self._timer = loop.call_later(self._seconds, self._check)
        elif self._task is not None:
            self.abandoned = True
            self._task.cancel()


def _costs_its_episode(error: BaseException) -> bool:
    """False for a cancellation from outside, which ends the run. An environment that cancels something of
    its own, or exits, costs its episode like one that raises."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit)


def _checked(reward: Any) -> float:
    """``reward`` as a finite float, or EnvironmentFailure."""
    try:
        number = float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise EnvironmentFailure(f"the environment's reward is {reward!r}, not a finite number")
    return number


def _failed(note: str) -> Trajectory:
    """The record of an episode that failed twice: nothing sampled, reward 0."""
    empty = np.zeros(0)
    return Trajectory(
        tokens=empty.astype(np.int32),
        action_mask=empty.astype(bool),
        log_probs=empty.astype(np.float32),
        versions=empty.astype(np.int32),
        reward=0.0,
        outcome="failed",
        note=note,
    )


class _Guarded:
    """Awaits a coroutine, and interrupts any stretch of it that blocks the event loop for too long.

    Works where signals can be received (the main thread); elsewhere only ``asyncio.timeout`` protects.
    ``on_blocked`` hears how long each stretch took that blocked the others.
    """

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, float],
        alarm: _Alarm,
        limit: _TimeLimit,
        on_blocked: Callable[[float], None],
    ) -> None:
        self._coroutine, self._alarm, self._limit, self._on_blocked = coroutine, alarm, limit, on_blocked

    def __await__(self) -> Generator[Any, Any, float]:
        # Python's own rules of delegation (PEP 380) between the event loop and the environment's coroutine.
        value: Any = None
        thrown: BaseException | None = None
        while True:
            begun = time.perf_counter()
            try:
                with self._alarm:
                    waiting = self._coroutine.send(value) if thrown is None else self._coroutine.throw(thrown)
            except StopIteration as stop:
                return stop.value
            finally:
                if (blocked := time.perf_counter() - begun) > BLOCKING_SECONDS:
                    self._on_blocked(blocked)
            value, thrown = None, None
            try:
                value = yield waiting
            except BaseException as error:
                if self._limit.abandoned:
                    self._abandon()
                    raise
                thrown = error

    def _abandon(self) -> None:
        """Never resume the coroutine again; the cancellation goes on as that of the time limit."""
        with contextlib.suppress(RuntimeError):  # "coroutine ignored GeneratorExit": it catches that too
            self._coroutine.close()
        if (task := asyncio.current_task()) is not None:
            task.uncancel()  # of the two cancellations, the one that asyncio.timeout does not know


class _Alarm:
    """Within it, code that blocks for longer than ``seconds`` is interrupted by :func:`_on_alarm`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, _on_alarm)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            # Again and again, for code that catches whatever is raised in it.
            signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise EnvironmentFailure("blocked the event loop for longer than environment.timeout_seconds")
