"""How a publication reaches the samplers of a Ray run. Each way is a :class:`Delivery`; :func:`delivery_for`
chooses.

=============== ============================== ================================ ========================
who             waits for                      woken by                         gives up after
=============== ============================== ================================ ========================
meeting         learner and all samplers       the group of torch               MEETING_SECONDS of
                                                                                vcpo_rendezvous
broadcast       learner and all samplers       the group of torch, which        runtime.timeout_seconds
                                               notices who is gone
a step          the learner's part of the      the learner's answer             as the broadcast
                broadcast before it
=============== ============================== ================================ ========================
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from vcpo.config import Config
from vcpo.errors import LearnerLost, PublicationError, SamplerLost, VcpoError, WorkerError
from vcpo.pipeline.ports import Publication


class Taker(Protocol):
    """A sampler that is there. All of these may raise SamplerLost."""

    @property
    def name(self) -> str: ...

    def take(self, publication: Publication) -> asyncio.Future[str]:
        """Tell it now; the answer is the checksum of what it serves."""
        ...

    async def ranks(self) -> int: ...

    async def meet(self, *, address: str, port: int, offset: int, world_size: int) -> None: ...


class Giver(Protocol):
    """The learner. It does one thing after the other, so that its weights change with a step alone. All of
    these may raise LearnerLost."""

    async def place(self) -> tuple[str, int]:
        """Address and port where others can meet it."""
        ...

    async def meet(self, *, address: str, port: int, world_size: int) -> None: ...

    async def broadcast(self) -> None: ...

    async def offer(self) -> Publication:
        """Its weights of now, in the object store."""
        ...


class Delivery(Protocol):
    """One way for weights to travel."""

    def to(self, taker: Taker, publication: Publication) -> Awaitable[str]:
        """Bring one sampler to these weights; the checksum of what it serves."""
        ...

    def send(self, publication: Publication) -> Awaitable[object]:
        """All samplers that are there have been told: do the learner's part."""
        ...

    async def sent(self) -> None:
        """Returns when the learner's weights may change."""
        ...

    async def over(self) -> None:
        """Returns when no sampler is in the middle of it; who has left the fleet is in none that comes."""
        ...


class ByObjectStore:
    """The learner has put them there; each sampler fetches them."""

    def to(self, taker: Taker, publication: Publication) -> Awaitable[str]:
        return taker.take(publication)

    def send(self, publication: Publication) -> Awaitable[object]:
        return asyncio.sleep(0)

    async def sent(self) -> None:
        pass

    async def over(self) -> None:
        pass


@dataclass
class _Part:
    """Of one sampler in one broadcast."""

    taker: Taker
    answer: asyncio.Future[str]
    taking: asyncio.Future[str] | None = None
    """None if it has not come to that."""


class ByBroadcast:
    """Learner and samplers form a group, which is made anew when others are there than the time before.
    Whoever comes between two broadcasts, or was in one that failed, gets the weights by the object store."""

    def __init__(self, learner: Giver, note: Callable[[str], None], failures: int) -> None:
        """More than so many ``failures`` in a row end the run."""
        self._learner, self._note, self._allowed = learner, note, failures
        self._parts: list[_Part] = []
        """Who has been told of the next broadcast."""
        self._version = -1
        """Of the last broadcast."""
        self._group: list[Taker] = []
        """With whom the learner is in a group."""
        self._sending: asyncio.Future[None] | None = None
        self._finishing: asyncio.Future[None] | None = None
        self._offered: asyncio.Future[Publication] | None = None
        self._failures = 0

    def to(self, taker: Taker, publication: Publication) -> Awaitable[str]:
        if publication.version <= self._version:
            return asyncio.ensure_future(self._late(taker, publication))
        part = _Part(taker, asyncio.get_running_loop().create_future())
        self._parts.append(part)
        return part.answer

    def send(self, publication: Publication) -> Awaitable[object]:
        parts, self._parts = self._parts, []
        self._version, self._offered = publication.version, None
        self._sending = asyncio.ensure_future(self._send(publication, parts))
        self._finishing = asyncio.ensure_future(self._finish(publication, parts, self._sending))
        return self._finishing

    async def sent(self) -> None:
        if self._sending is not None:
            await asyncio.wait([self._sending])  # its errors are told elsewhere

    async def over(self) -> None:
        if self._finishing is not None:
            await asyncio.wait([self._finishing])

    async def _send(self, publication: Publication, parts: Sequence[_Part]) -> None:
        """The learner's part."""
        takers = [part.taker for part in parts]
        if not takers:
            return
        if takers != self._group:
            self._group = []
            await self._meet(takers)
            self._group = takers
        for part in parts:
            part.taking = part.taker.take(publication)
        await self._learner.broadcast()

    async def _meet(self, takers: Sequence[Taker]) -> None:
        """Returns, or raises, when nobody waits for anybody any more."""
        counts = await asyncio.gather(*(taker.ranks() for taker in takers))
        address, port = await self._learner.place()
        place: dict[str, Any] = {"address": address, "port": port, "world_size": 1 + sum(counts)}
        offsets = accumulate(counts, initial=1)
        answers = await asyncio.gather(
            self._learner.meet(**place),
            *(taker.meet(offset=o, **place) for taker, o in zip(takers, offsets, strict=False)),
            return_exceptions=True,
        )
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in sorted(errors, key=lambda error: not isinstance(error, LearnerLost)):
            raise error

    async def _finish(
        self, publication: Publication, parts: Sequence[_Part], sending: asyncio.Future[None]
    ) -> None:
        """Answer for every sampler of a broadcast, whatever became of it."""
        error = await _outcome(sending)
        if isinstance(error, LearnerLost):
            raise error
        outcomes = [error if part.taking is None else await _outcome(part.taking) for part in parts]
        troubles = [o for o in (error, *outcomes) if isinstance(o, VcpoError)]
        self._count(troubles)
        await asyncio.gather(*(self._answer(publication, p, o) for p, o in zip(parts, outcomes, strict=True)))

    def _count(self, troubles: Sequence[VcpoError]) -> None:
        if not troubles:
            self._failures = 0
            return
        self._group, self._failures = [], self._failures + 1
        if self._failures > self._allowed:
            raise WorkerError(
                f"{self._failures} broadcasts of weights in a row failed (runtime.restarts): "
                f"{troubles[0]}; sampler.transfer = 'files' does without"
            )
        self._note(f"a broadcast of weights failed, and the object store carries them: {troubles[0]}")

    async def _answer(self, publication: Publication, part: _Part, outcome: Any) -> None:
        own = part.taking is not None and isinstance(outcome, SamplerLost | PublicationError)
        if isinstance(outcome, VcpoError) and not own:  # or None: it has not come to that
            outcome = await _outcome(asyncio.ensure_future(self._late(part.taker, publication)))
        if part.answer.done():  # nobody waits for it any more
            return
        if isinstance(outcome, VcpoError):
            part.answer.set_exception(outcome)
        else:
            part.answer.set_result(outcome)

    async def _late(self, taker: Taker, publication: Publication) -> str:
        """By the object store, with the learner's weights of now: newer ones if a step is under way."""
        if self._offered is None:
            self._offered = asyncio.ensure_future(self._learner.offer())
        offered = await asyncio.shield(self._offered)
        checksum = await taker.take(offered)
        return publication.checksum if checksum == offered.checksum else checksum


async def _outcome(work: asyncio.Future[Any]) -> Any:
    """What it returned, or the error of ours that it raised."""
    try:
        return await work
    except VcpoError as error:
        return error


def delivery_for(config: Config, learner: Giver, note: Callable[[str], None]) -> Delivery:
    if config.sampler.transfer == "collective":
        return ByBroadcast(learner, note, config.runtime.restarts)
    return ByObjectStore()
