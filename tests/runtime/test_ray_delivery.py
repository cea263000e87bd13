"""Broadcasts to samplers that come, go and fail: who is in which group, and what all get in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from vcpo.errors import LearnerLost, PublicationError, SamplerLost, VcpoError, WorkerError
from vcpo.pipeline.ports import Publication
from vcpo.runtime.ray.delivery import ByBroadcast, Taker


def weights(version: int, source: str = "announced") -> Publication:
    return Publication(version, f"checksum-{version}", source)


@dataclass
class Learner:
    """Its weights are its version. It does one thing after the other, as an actor does."""

    version: int = 0
    heard: list[str] = field(default_factory=list)
    errors: dict[str, VcpoError] = field(default_factory=dict)
    """What goes wrong next, once."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    members: int = 0

    async def _do(self, what: str) -> None:
        async with self.turn:
            self.heard.append(what)
            await asyncio.sleep(0.01)
            if (error := self.errors.pop(what.partition(" ")[0], None)) is not None:
                raise error

    async def place(self) -> tuple[str, int]:
        return "there", 7

    async def meet(self, *, address: str, port: int, world_size: int) -> None:
        assert (address, port) == ("there", 7)
        await self._do(f"meet {world_size}")

    async def broadcast(self) -> None:
        await self._do("broadcast")

    async def offer(self) -> Publication:
        await self._do("offer")
        return weights(self.version, "stored")

    async def step(self) -> Publication:
        await self._do("step")
        self.version += 1
        return weights(self.version)


@dataclass
class Sampler:
    name: str
    workers: int = 1
    heard: list[str] = field(default_factory=list)
    errors: dict[str, VcpoError] = field(default_factory=dict)
    checksum: str | None = None

    def _do(self, what: str) -> None:
        self.heard.append(what)
        if (error := self.errors.pop(what.partition(" ")[0], None)) is not None:
            raise error

    def take(self, publication: Publication) -> asyncio.Future[str]:
        async def taking() -> str:
            self._do(f"{publication.source} {publication.version}")
            await asyncio.sleep(0.005)
            return self.checksum or publication.checksum

        return asyncio.ensure_future(taking())

    async def ranks(self) -> int:
        self._do("ranks")
        return self.workers

    async def meet(self, *, address: str, port: int, offset: int, world_size: int) -> None:
        self._do(f"meet {offset}/{world_size}")


class Scene:
    def __init__(self, failures: int = 3) -> None:
        self.learner, self.notes = Learner(), []
        self.delivery = ByBroadcast(self.learner, self.notes.append, failures)

    async def publish(self, publication: Publication, *samplers: Taker) -> list[str | BaseException]:
        """As the controller does it: tell all samplers, then the learner, then wait for both."""
        told = [asyncio.ensure_future(_within(self.delivery.to(s, publication))) for s in samplers]
        await asyncio.sleep(0)
        sent = self.delivery.send(publication)
        answers, _ = await asyncio.gather(asyncio.gather(*told, return_exceptions=True), sent)
        return answers


async def _within(answer: Any) -> Any:
    return await answer


def go(work: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        await asyncio.wait_for(work, 10)

    asyncio.run(within())


def test_a_group_is_made_once_and_anew_for_others() -> None:
    async def scene() -> None:
        here, one, two = Scene(), Sampler("one"), Sampler("two", workers=3)
        for version in (1, 2):
            assert await here.publish(weights(version), one, two) == [f"checksum-{version}"] * 2
        assert here.learner.heard == ["meet 5", "broadcast", "broadcast"]
        assert one.heard == ["ranks", "meet 1/5", "announced 1", "announced 2"]
        assert two.heard == ["ranks", "meet 2/5", "announced 1", "announced 2"]
        assert await here.publish(weights(3), two) == ["checksum-3"]
        assert here.learner.heard[3:] == ["meet 4", "broadcast"]
        assert two.heard[4:] == ["ranks", "meet 1/4", "announced 3"]
        assert await here.publish(weights(4)) == []
        assert here.learner.heard[5:] == []
        assert here.notes == []

    go(scene())


def test_who_comes_between_two_broadcasts_gets_what_is_stored() -> None:
    async def scene() -> None:
        here, one, late, later = Scene(), Sampler("one"), Sampler("late"), Sampler("later")
        await here.publish(await here.learner.step(), one)
        answers = await asyncio.gather(*(here.delivery.to(s, weights(1)) for s in (late, later)))
        assert answers == ["checksum-1"] * 2
        assert here.learner.heard == ["step", "meet 2", "broadcast", "offer"]  # stored once for both
        assert late.heard == later.heard == ["stored 1"]
        await here.publish(await here.learner.step(), one, late)
        assert here.learner.heard[4:] == ["step", "meet 3", "broadcast"]

    go(scene())


def test_who_comes_while_a_step_is_under_way_gets_what_the_learner_has_after_it() -> None:
    async def scene() -> None:
        here, late = Scene(), Sampler("late")
        await here.publish(weights(0))
        step = asyncio.ensure_future(here.learner.step())
        await asyncio.sleep(0)
        assert await here.delivery.to(late, weights(0)) == "checksum-0"  # newer is as good
        assert (step.done(), late.heard) == (True, ["stored 1"])
        late.checksum = "nonsense"
        assert await here.delivery.to(late, weights(0)) == "nonsense"

    go(scene())


def test_who_leaves_waits_until_the_others_have_what_it_may_hand_on() -> None:
    async def scene() -> None:
        here, one, leaving = Scene(), Sampler("one"), Sampler("leaving")
        await here.delivery.over()
        told = [here.delivery.to(sampler, weights(0)) for sampler in (one, leaving)]
        here.delivery.send(weights(0))
        await here.delivery.over()
        assert [await answer for answer in told] == ["checksum-0"] * 2

    go(scene())


def test_a_step_waits_until_the_weights_before_it_are_sent() -> None:
    async def scene() -> None:
        here, one = Scene(), Sampler("one")
        await here.delivery.sent()
        told = here.delivery.to(one, weights(0))
        here.delivery.send(weights(0))
        await here.delivery.sent()
        await here.learner.step()
        assert here.learner.heard == ["meet 2", "broadcast", "step"]
        assert await told == "checksum-0"

    go(scene())


@pytest.mark.parametrize(
    ("who", "place", "arrived"),
    [
        ("learner", "meet", ("stored 0", "stored 0")),
        ("learner", "broadcast", ("announced 0", "announced 0")),  # in time: their checksums say so
        ("one", "meet", ("stored 0", "stored 0")),
        ("one", "announced", ("stored 0", "announced 0")),
    ],
)
def test_a_broadcast_that_fails_is_made_up_for_and_the_next_group_is_another(
    who: str, place: str, arrived: tuple[str, str]
) -> None:
    async def scene() -> None:
        here, one, two = Scene(), Sampler("one"), Sampler("two")
        {"learner": here.learner, "one": one}[who].errors[place] = WorkerError("it went wrong")
        assert await here.publish(weights(0), one, two) == ["checksum-0"] * 2
        assert (one.heard[-1], two.heard[-1]) == arrived
        assert here.learner.heard.count("offer") == ("stored 0" in arrived)
        assert here.notes == [
            "a broadcast of weights failed, and the object store carries them: it went wrong"
        ]
        before = len(here.learner.heard)
        here.learner.version = 1
        assert await here.publish(weights(1), one, two) == ["checksum-1"] * 2
        assert here.learner.heard[before:] == ["meet 3", "broadcast"]

    go(scene())


@pytest.mark.parametrize("place", ["ranks", "meet", "announced"])
def test_a_sampler_that_is_lost_costs_the_others_nothing(place: str) -> None:
    async def scene() -> None:
        here, one, two = Scene(), Sampler("one"), Sampler("two")
        lost = SamplerLost("one is gone")
        one.errors = {place: lost, "stored": lost}
        answers = await here.publish(weights(0), one, two)
        assert answers == [lost, "checksum-0"]
        assert await here.publish(weights(1), two) == ["checksum-1"]
        assert here.learner.heard[-2:] == ["meet 2", "broadcast"]

    go(scene())


def test_wrong_weights_are_told_of_and_not_made_up_for() -> None:
    async def scene() -> None:
        here, one, two = Scene(), Sampler("one"), Sampler("two")
        one.errors["announced"] = wrong = PublicationError("one does not serve version 0")
        assert await here.publish(weights(0), one, two) == [wrong, "checksum-0"]
        assert "offer" not in here.learner.heard
        two.checksum = "nonsense"
        assert await here.publish(weights(1), two) == ["nonsense"]

    go(scene())


@pytest.mark.parametrize("place", ["meet", "broadcast", "offer"])
def test_a_lost_learner_is_told_of(place: str) -> None:
    async def scene() -> None:
        here, one = Scene(), Sampler("one")
        here.learner.errors[place] = lost = LearnerLost("learner-1 is gone")
        if place == "offer":
            one.errors["announced"] = WorkerError("connection closed")
            assert await here.publish(weights(0), one) == [lost]
            return
        here.delivery.to(one, weights(0))
        with pytest.raises(LearnerLost, match="learner-1 is gone"):
            await here.delivery.send(weights(0))

    go(scene())


def test_broadcasts_that_fail_again_and_again_end_the_run() -> None:
    async def scene() -> None:
        here, one = Scene(failures=2), Sampler("one")
        for version in range(7):
            if version != 2:
                here.learner.errors["broadcast"] = WorkerError("connection closed")
            told = here.delivery.to(one, weights(version))
            if version == 5:
                with pytest.raises(WorkerError, match=r"^3 broadcasts of weights in a row failed .* closed"):
                    await here.delivery.send(weights(version))
                return
            await asyncio.gather(told, here.delivery.send(weights(version)))

    go(scene())
