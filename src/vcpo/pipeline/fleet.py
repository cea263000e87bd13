"""The samplers of a run: who is there, what each has to do, what each serves.

A fleet may change while the run goes on. Who joins is brought to the newest weights and then gets groups; the
unfinished groups of one that leaves are given to the others, under the weights that are newest by then. While
nobody is there, groups wait for the next who joins.

**Balance.** A group goes to the sampler that would be through first: outstanding tokens over tokens a second.
How long a group will be is not known before it is played, so the mean of those that are finished stands for
it; a sampler that has been silent for longer than its pace allows counts as slower. So a slow one is given
little, and the window does not wait for it more often than it must.

=============== ========================= ====================================== ==========================
who             waits for                 woken by                               gives up after
=============== ========================= ====================================== ==========================
evaluate        a sampler, if none is     join                                   runtime.timeout_seconds
                there
join, publish   a sampler's checksum      the sampler; SamplerLost               as its port does
=============== ========================= ====================================== ==========================
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vcpo.errors import PublicationError, SamplerLost, WorkerError
from vcpo.pipeline.ports import Publication, Rewards, SamplerPort
from vcpo.pipeline.rollout import GroupOrder

log = logging.getLogger(__name__)

HALF_LIFE = 30.0
"""Seconds after which what a sampler did counts half in its pace."""
SETTLED = 1.0
"""Seconds of work before which its pace is not believed."""
RETIRE_SECONDS = 0.1
"""Between two looks at whether a sampler that is to go has finished."""


@dataclass
class Member:
    """One sampler of the fleet."""

    port: SamplerPort
    serving: bool
    """Whether it may be given groups: it has the newest weights, or they are before any group on its way."""
    version: int = -1
    checksum: str = ""
    orders: dict[int, GroupOrder] = field(default_factory=dict)
    """Unfinished groups."""
    tokens: float = 0.0
    """Of finished groups, older ones counting less; likewise the seconds in which it had something to do."""
    seconds: float = 0.0
    worked: float = 0.0
    """All of those seconds, undiminished."""
    mark: float = 0.0
    """When it last finished a group, or last got the first one after idling."""

    def begin(self, order: GroupOrder, now: float) -> None:
        if not self.orders:  # what it did before it idled is forgotten too
            self._age(now)
        self.orders[order.index] = order

    def finish(self, number: int, tokens: int, now: float) -> None:
        del self.orders[number]
        passed = self._age(now)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + passed
        self.worked += passed

    def _age(self, now: float) -> float:
        """Let what it did count less; the seconds since the mark, which is set to ``now``."""
        passed, self.mark = now - self.mark, now
        decay = 0.5 ** (passed / HALF_LIFE)
        self.tokens, self.seconds = decay * self.tokens, decay * self.seconds
        return passed

    @property
    def rate(self) -> float | None:
        """Tokens a second; None as long as it has finished nothing."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def seconds_for(self, groups: int, tokens: float, best: float | None, now: float) -> float:
        """How long it would take for so many groups of so many tokens. ``best``: the best rate of any, which
        is assumed where none is known, and more and more of one that idles. Without, the number of groups."""
        if best is None:
            return float(groups)
        silent, pace = now - self.mark, tokens / best
        if self.rate and self.worked >= SETTLED:
            belief = 1.0 if self.orders else 0.5 ** (silent / HALF_LIFE)
            pace += belief * (tokens / self.rate - pace)
        return groups * (max(pace, silent) if self.orders else pace)


class Fleet:
    """Samplers that share the groups of a run."""

    def __init__(
        self,
        ports: Iterable[SamplerPort] = (),
        *,
        timeout_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ports`` are there from the beginning, before any weights are published."""
        self._members = {port.name: Member(port, serving=True) for port in ports}
        self._timeout, self._clock = timeout_seconds, clock
        self._backlog: list[GroupOrder] = []
        """Groups that nobody plays."""
        self._holders: dict[int, str] = {}
        """Who plays each unfinished group."""
        self._current: Publication | None = None
        self._joined = asyncio.Event()
        self._tokens, self._groups = 0.0, 0
        self._gone_seconds = 0.0
        """Busy time of members that have left."""
        self.departures: list[str] = []
        """Who left, and why, in order."""

    @property
    def members(self) -> Mapping[str, Member]:
        return self._members

    @property
    def busy_seconds(self) -> float:
        """Time that all engines have spent computing."""
        return self._gone_seconds + sum(member.port.busy_seconds for member in self._members.values())

    async def join(self, port: SamplerPort) -> None:
        """Bring a sampler to the newest weights; from then on it shares the work."""
        member = self._members[port.name] = Member(port, serving=False)
        try:
            if (sent := self._current) is not None:  # what is published meanwhile is sent to it too
                self._accept(member, sent, await port.publish(sent))
        except SamplerLost as lost:
            await self.leave(port.name, str(lost))
            return
        if self._members.get(port.name) is member:
            member.serving = True
            self._joined.set()
            await self.order([])

    async def leave(self, name: str, why: str) -> None:
        """Do without a sampler; others play what it has not finished. Unknown names are ignored."""
        member = self._members.pop(name, None)
        if member is None:
            return
        log.info("%s has left: %s", name, why)
        self.departures.append(f"{name}: {why}")
        self._gone_seconds += member.port.busy_seconds
        for number in member.orders:
            self._holders.pop(number, None)
        await self.order(list(member.orders.values()))

    async def retire(self, name: str) -> None:
        """Give a sampler nothing more; returns when it has finished what it has, and is gone."""
        member = self._members.get(name)
        if member is None:
            return
        member.serving = False
        await self.order([])
        while member.orders and self._members.get(name) is member:
            await asyncio.sleep(RETIRE_SECONDS)
        await self.leave(name, "it is not wanted any more")

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        """Hand out groups, and those that wait for somebody."""
        waiting, self._backlog = [*self._backlog, *orders], []
        chosen: dict[str, list[GroupOrder]] = {}
        for order in sorted(waiting, key=lambda order: order.index):
            member = self._soonest()
            if member is None:
                self._backlog.append(order)
                continue
            member.begin(order, self._clock())
            self._holders[order.index] = member.port.name
            chosen.setdefault(member.port.name, []).append(order)
        await asyncio.gather(*(self._send(self._members[name], mine) for name, mine in chosen.items()))

    async def _send(self, member: Member, orders: Sequence[GroupOrder]) -> None:
        try:
            await member.port.order(orders)
        except SamplerLost as lost:
            await self.leave(member.port.name, str(lost))

    def _soonest(self) -> Member | None:
        """Who would be through first with one more group; None if nobody may be given one."""
        serving = [member for member in self._members.values() if member.serving]
        if len(serving) < 2:
            return serving[0] if serving else None
        now, tokens = self._clock(), self._tokens / self._groups if self._groups else 1.0
        rates = [member.rate for member in serving if member.rate and member.worked >= SETTLED]
        best = max(rates, default=None)
        return min(serving, key=lambda m: m.seconds_for(len(m.orders) + 1, tokens, best, now))

    def finished(self, number: int, tokens: int) -> bool:
        """A group has arrived; false if it had arrived before, from another sampler, and is to be dropped."""
        name = self._holders.pop(number, None)
        if name is None:
            return False
        self._members[name].finish(number, tokens, self._clock())
        self._tokens, self._groups = self._tokens + tokens, self._groups + 1
        return True

    def publish(self, publication: Publication) -> Awaitable[None]:
        """Send weights to all who are there, now. The answer comes when all serve them.

        Raises PublicationError for one that serves something else.
        """
        self._current = publication
        sent = [(member, member.port.publish(publication)) for member in self._members.values()]
        return self._all_serve(publication, sent)

    async def _all_serve(
        self, publication: Publication, sent: Sequence[tuple[Member, Awaitable[str]]]
    ) -> None:
        answers = await asyncio.gather(*(answer for _, answer in sent), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if fatal := next((error for error in errors if not isinstance(error, SamplerLost)), None):
            raise fatal
        for (member, _), answer in zip(sent, answers, strict=True):
            if isinstance(answer, str):
                self._accept(member, publication, answer)
            elif self._members.get(member.port.name) is member:
                await self.leave(member.port.name, str(answer))

    @staticmethod
    def _accept(member: Member, publication: Publication, answer: str) -> None:
        if answer != publication.checksum:
            raise PublicationError(
                f"{member.port.name} serves other weights than version {publication.version}: "
                f"its checksum is {answer}, the learner's {publication.checksum}"
            )
        member.version, member.checksum = max(member.version, publication.version), answer

    async def evaluate(self, problems: int, *, greedy: bool) -> Rewards:
        """Rewards on the first held-out problems, shared out; what a lost sampler had is done by another."""
        serving = await self._somebody()
        share = -(-problems // len(serving))
        parts = [
            (i * share, min(share, problems - i * share)) for i in range(len(serving)) if i * share < problems
        ]
        rewards = await asyncio.gather(
            *(self._evaluate(serving[i], first, count, greedy) for i, (first, count) in enumerate(parts))
        )
        return [reward for part in rewards for reward in part]

    async def _evaluate(self, member: Member, first: int, count: int, greedy: bool) -> Rewards:
        while True:
            try:
                return await member.port.evaluate(first, count, greedy=greedy)
            except SamplerLost as lost:
                if self._members.get(member.port.name) is member:
                    await self.leave(member.port.name, str(lost))
                serving = await self._somebody()
                member = serving[first % len(serving)]

    async def _somebody(self) -> list[Member]:
        """Who may be given work; waits until there is one."""
        while not (serving := [member for member in self._members.values() if member.serving]):
            self._joined.clear()
            try:
                async with asyncio.timeout(self._timeout):
                    await self._joined.wait()
            except TimeoutError:
                raise WorkerError(
                    f"no sampler was there for {self._timeout:g} s (runtime.timeout_seconds); {self.absence}"
                ) from None
        return serving

    @property
    def absence(self) -> str:
        """Why nobody is there, as far as it is known."""
        return f"the last that left: {self.departures[-1]}" if self.departures else "none has joined"

    def describe(self, learner_version: int) -> dict[str, dict[str, Any]]:
        """Figures of every sampler, for the metrics of a step."""
        return {
            name: {
                "version": member.version,
                "lag": learner_version - member.version,
                "checksum": member.checksum,
                "tokens_per_second": member.rate,
                "outstanding_groups": len(member.orders),
                "outstanding_tokens": len(member.orders) * (self._tokens / max(self._groups, 1)),
            }
            for name, member in self._members.items()
        }

    def busy(self) -> str:
        """Who has how many groups, for an error that says for whom it waited."""
        counts = [f"{name} ({len(m.orders)} groups)" for name, m in self._members.items() if m.orders]
        return ", ".join(counts) or (
            f"a sampler, for {len(self._backlog)} groups; {self.absence}" if self._backlog else ""
        )
