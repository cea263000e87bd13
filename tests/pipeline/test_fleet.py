"""Samplers that come, go and are slow: who plays what, and under which weights."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from vcpo.errors import PublicationError, SamplerLost, WorkerError
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Publication
from vcpo.pipeline.rollout import GroupOrder


def orders(first: int, count: int) -> list[GroupOrder]:
    return [GroupOrder(number, 0, None) for number in range(first, first + count)]


def weights(version: int) -> Publication:
    return Publication(version, f"checksum-{version}", None)


@dataclass
class Port:
    """Plays nothing: tests say what arrives."""

    name: str
    lost: bool = False
    checksum: str | None = None
    heard: list[str] = field(default_factory=list)
    """Versions and groups, in order."""
    busy_seconds: float = 1.0

    async def publish(self, publication: Publication) -> str:
        self.heard.append(f"v{publication.version}")
        await asyncio.sleep(0)
        self._check()
        return self.checksum or publication.checksum

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        self._check()
        self.heard += [str(order.index) for order in orders]

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> list[float]:
        await asyncio.sleep(0)
        self._check()
        return [float(i) for i in range(first, first + count)]

    def _check(self) -> None:
        if self.lost:
            raise SamplerLost(f"{self.name} is gone")

    @property
    def groups(self) -> list[int]:
        return [int(what) for what in self.heard if not what.startswith("v")]


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def fleet_of(*ports: Port, clock: Callable[[], float] | None = None, timeout: float = 5.0) -> Fleet:
    return Fleet(ports, timeout_seconds=timeout, clock=clock or Clock())


def go(work: Awaitable[Any] | Coroutine[Any, Any, Any]) -> None:
    async def within() -> None:
        await asyncio.wait_for(work, 10)

    asyncio.run(within())


def test_equal_samplers_get_equal_shares() -> None:
    async def work() -> None:
        ports = [Port(f"s{i}") for i in range(3)]
        fleet = fleet_of(*ports)
        await fleet.order(orders(0, 9))
        assert [len(port.groups) for port in ports] == [3, 3, 3]

    go(work())


def test_who_joins_is_given_the_newest_weights_before_any_group() -> None:
    async def work() -> None:
        first, second = Port("first"), Port("second")
        fleet = fleet_of(first)
        await fleet.publish(weights(3))
        await fleet.order(orders(0, 4))
        await fleet.join(second)
        await fleet.order(orders(4, 4))
        assert second.heard[0] == "v3"
        assert second.groups == [4, 5, 6, 7]  # the first has four already
        assert fleet.describe(5)["second"] | {"tokens_per_second": 0} == {
            "version": 3,
            "lag": 2,
            "checksum": "checksum-3",
            "tokens_per_second": 0,
            "outstanding_groups": 4,
            "outstanding_tokens": 0.0,
        }

    go(work())


def test_weights_published_while_somebody_joins_reach_it_too() -> None:
    async def work() -> None:
        fleet, joining = fleet_of(Port("first")), Port("joining")
        await fleet.publish(weights(1))
        entry = asyncio.ensure_future(fleet.join(joining))
        await asyncio.sleep(0)
        await fleet.publish(weights(2))
        await entry
        await fleet.order(orders(0, 2))
        assert joining.heard == ["v1", "v2", "1"]
        assert fleet.members["joining"].version == 2

    go(work())


def test_what_a_lost_sampler_had_is_played_by_others_once() -> None:
    async def work() -> None:
        staying, leaving = Port("staying"), Port("leaving")
        fleet = fleet_of(staying, leaving)
        await fleet.order(orders(0, 6))
        mine, theirs = list(staying.groups), list(leaving.groups)
        assert fleet.finished(theirs[0], 10)
        await fleet.leave("leaving", "its node is down")
        assert staying.groups == mine + theirs[1:]
        # What the lost one had sent all the same comes late: the first to arrive counts.
        assert fleet.finished(theirs[1], 10)
        assert not fleet.finished(theirs[1], 10)
        assert not fleet.finished(theirs[0], 10)
        assert fleet.departures == ["leaving: its node is down"]
        assert fleet.busy_seconds == 2.0  # of both
        await fleet.leave("leaving", "again")

    go(work())


def test_a_sampler_that_is_found_lost_when_it_is_asked_costs_nothing() -> None:
    async def work() -> None:
        staying, leaving = Port("staying"), Port("leaving")
        fleet = fleet_of(staying, leaving)
        leaving.lost = True
        await fleet.order(orders(0, 4))
        assert sorted(staying.groups) == [0, 1, 2, 3]
        assert list(fleet.members) == ["staying"]
        await fleet.publish(weights(1))

    go(work())


def test_a_sampler_that_is_lost_while_it_takes_weights_leaves() -> None:
    async def work() -> None:
        staying, leaving = Port("staying"), Port("leaving")
        fleet = fleet_of(staying, leaving)
        await fleet.order(orders(0, 2))
        leaving.lost = True
        await fleet.publish(weights(1))
        assert staying.groups == [0, 1]

    go(work())


def test_groups_wait_for_somebody_to_join() -> None:
    async def work() -> None:
        alone, late = Port("alone"), Port("late")
        fleet = fleet_of(alone)
        await fleet.publish(weights(1))
        await fleet.order(orders(0, 2))
        await fleet.leave("alone", "killed")
        await fleet.order(orders(2, 1))
        assert "a sampler, for 3 groups; the last that left: alone: killed" in fleet.busy()
        await fleet.join(late)
        assert late.heard == ["v1", "0", "1", "2"]

    go(work())


def test_who_serves_other_weights_may_not_join() -> None:
    async def work() -> None:
        fleet = fleet_of(Port("first"))
        await fleet.publish(weights(1))
        with pytest.raises(PublicationError, match="liar serves other weights than version 1"):
            await fleet.join(Port("liar", checksum="other"))
        await fleet.order(orders(0, 1))

    go(work())


def test_who_serves_other_weights_is_named() -> None:
    async def work() -> None:
        fleet = fleet_of(Port("first"), Port("liar", checksum="other"))
        with pytest.raises(PublicationError, match="liar serves other weights than version 7"):
            await fleet.publish(weights(7))

    go(work())


def test_evaluation_is_shared_and_a_lost_share_is_done_again() -> None:
    async def work() -> None:
        ports = [Port("a"), Port("b"), Port("c")]
        fleet = fleet_of(*ports)
        assert await fleet.evaluate(7, greedy=True) == [0, 1, 2, 3, 4, 5, 6]
        ports[1].lost = True
        assert await fleet.evaluate(7, greedy=False) == [0, 1, 2, 3, 4, 5, 6]
        assert list(fleet.members) == ["a", "c"]
        assert await fleet.evaluate(1, greedy=False) == [0]

    go(work())


def test_an_evaluation_without_anybody_waits_and_then_says_so() -> None:
    async def work() -> None:
        fleet = fleet_of(timeout=0.05)
        with pytest.raises(WorkerError, match=r"no sampler was there for 0\.05 s .* none has joined"):
            await fleet.evaluate(3, greedy=True)
        asking = asyncio.ensure_future(fleet_of(timeout=5.0).evaluate(3, greedy=True))
        await asyncio.sleep(0)
        asking.cancel()

    go(work())


def test_a_slow_sampler_is_given_little() -> None:
    """One plays a group a second, the other one in ten seconds. Counting groups would give them equally many,
    and a window that is first in, first out would wait for the slow one all the time."""

    async def work() -> None:
        clock = Clock()
        seconds, ports = {"fast": 1.0, "slow": 10.0}, {name: Port(name) for name in ("fast", "slow")}
        fleet = fleet_of(*ports.values(), clock=clock)
        await fleet.order(orders(0, 24))  # twelve each: nothing is known yet
        due, done = dict(seconds), {"fast": 0, "slow": 0}
        for given in range(24, 624):
            name = min(due, key=lambda n: due[n])
            clock.now = due[name]
            due[name] += seconds[name]
            if done[name] < len(ports[name].groups):
                assert fleet.finished(ports[name].groups[done[name]], 100)
                done[name] += 1
                await fleet.order(orders(given, 1))
        assert 0.06 < done["slow"] / sum(done.values()) < 0.12  # what they can do is 1 to 10
        assert len(ports["slow"].groups) - done["slow"] <= 3
        assert fleet.describe(0)["fast"]["tokens_per_second"] == pytest.approx(100.0, rel=0.05)

    go(work())


def test_one_that_was_slow_once_is_tried_again() -> None:
    async def work() -> None:
        clock = Clock()
        good, late = Port("good"), Port("late")
        fleet = fleet_of(good, late, clock=clock)
        await fleet.order(orders(0, 2))
        clock.now = 1.0
        assert fleet.finished(0, 10)
        clock.now = 40.0
        assert fleet.finished(1, 10)  # forty times as long
        await fleet.order(orders(2, 2))
        assert late.groups == [1]
        for number in range(2, 200):
            clock.now += 1.0
            assert fleet.finished(number, 10)
            await fleet.order(orders(number + 2, 1))
        assert len(late.groups) > 1

    go(work())


def test_a_silent_sampler_is_given_nothing_more() -> None:
    async def work() -> None:
        clock = Clock()
        good, silent = Port("good"), Port("silent")
        fleet = fleet_of(good, silent, clock=clock)
        await fleet.order(orders(0, 4))
        for number in list(good.groups):
            clock.now += 1.0
            assert fleet.finished(number, 10)
        for number in list(silent.groups)[:1]:
            assert fleet.finished(number, 10)
        clock.now += 60.0
        for number in range(4, 24):
            await fleet.order(orders(number, 1))
            clock.now += 1.0
            if number in good.groups:
                assert fleet.finished(number, 10)
        assert len(silent.groups) == 2

    go(work())


def test_who_retires_finishes_what_it_has_and_gets_nothing_more() -> None:
    async def work() -> None:
        first, second = Port("first"), Port("second")
        fleet = fleet_of(first, second)
        await fleet.order(orders(0, 4))
        retiring = asyncio.ensure_future(fleet.retire("second"))
        await asyncio.sleep(0)
        await fleet.order(orders(4, 2))
        assert (first.groups, second.groups) == ([0, 2, 4, 5], [1, 3])
        assert fleet.finished(1, 10)
        await asyncio.sleep(0.15)
        assert not retiring.done() and set(fleet.members) == {"first", "second"}
        assert fleet.finished(3, 10)
        await retiring
        assert set(fleet.members) == {"first"}
        assert not fleet.finished(3, 10)
        await fleet.retire("nobody")

    go(work())


def test_what_a_retiring_sampler_had_is_played_by_others_if_it_dies() -> None:
    async def work() -> None:
        first, second = Port("first"), Port("second")
        fleet = fleet_of(first, second)
        await fleet.order(orders(0, 4))
        retiring = asyncio.ensure_future(fleet.retire("second"))
        await asyncio.sleep(0)
        await fleet.leave("second", "it died")
        await retiring
        assert first.groups == [0, 2, 1, 3]

    go(work())


def test_an_evaluation_that_loses_a_sampler_asks_those_that_serve() -> None:
    """And not one that is only on its way in."""

    @dataclass
    class Joining(Port):
        async def publish(self, publication: Publication) -> str:
            await asyncio.sleep(5)
            return publication.checksum

    async def scene() -> None:
        ports = [Port("one"), Port("two", lost=False)]
        fleet = fleet_of(*ports)
        await fleet.publish(weights(1))
        joining = asyncio.ensure_future(fleet.join(Joining("three")))
        await asyncio.sleep(0)
        ports[1].lost = True
        assert await fleet.evaluate(2, greedy=False) == [0.0, 1.0]
        joining.cancel()

    go(scene())
