"""The controller: admits prompts, feeds the learner, publishes its weights, writes down what happened.

It is the only place that knows both wings, and it holds no tensor: groups pass through as bytes, weights
as a reference that the runtime understands. Where learner and samplers live (child processes, one
process, a cluster) is the runtime's business, behind the two ports.

::

            admit                 groups                    step
    Window ───────► SamplerPort ─────────► collect ─► Journal ─► run ─────────► LearnerPort
       ▲                 ▲                    │ finish            ▲ │                │
       │                 │                    ▼                   │ │                │
       │                 │                  Window ── take ───────┘ │ complete       │
       └─────────────────┼──────────────────────────────────────────┘                │
                         └────────────────────── publish ◄───────────────────────────┘

Two loops in one event loop:

========== ============================ ==================================== =====================
loop       waits for                    woken by                             gives up after
========== ============================ ==================================== =====================
collect    a finished group             any sampler                          never: ends with run
collect    room for orders that take    every sampler                        never: ends with run
           the place of skipped groups
run        P groups it may take         collect                              runtime.timeout_seconds
run        the learner's step           the learner                          runtime.timeout_seconds
both       the learner's choice, where  the learner                          runtime.timeout_seconds
           problems are selected
run        the publication before last  every sampler's checksum             runtime.timeout_seconds
run        an evaluation                every sampler                        runtime.timeout_seconds
========== ============================ ==================================== =====================

Every wait also ends when a worker dies (the runtime cancels ``run`` and raises the worker's error) or when
``stop`` is called: at once, or, where a sampler is waited for, when ``hurry`` follows. Order on the channel
to a sampler is the order of calls here: weights are sent before the groups admitted after them, which is what
the bound in :mod:`vcpo.pipeline.window` rests on. A sampler's checksum is compared with the learner's while
the next step runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vcpo.config import Config
from vcpo.errors import CheckpointError, WorkerError
from vcpo.monitor.progress import Progress
from vcpo.monitor.sinks import MetricsWriter
from vcpo.pipeline.dynamic_sampling import Sieve
from vcpo.pipeline.evaluation import accuracy
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.journal import Journal
from vcpo.pipeline.ports import Arrivals, LearnerPort, Outcome, Publication, Rewards
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.window import Window
from vcpo.trajectory import Group, Outline

T = TypeVar("T")


class GivenUpError(Exception):
    """What was waited for will not be there: the run was asked to stop, and that took too long."""


@dataclass
class Controller:
    """Runs the pipeline until ``config.pipeline.steps`` steps are taken."""

    config: Config
    learner: LearnerPort
    fleet: Fleet
    arrivals: Arrivals
    journal: Journal
    writer: MetricsWriter
    progress: Progress
    window: Window
    version: int = 0
    sieve: Sieve | None = None
    """Says which finished groups are trained on; None: all."""
    unheard: list[Outcome] = field(default_factory=list)
    """Of skipped groups that the learner has not heard of; kept where problems are selected."""

    def __post_init__(self) -> None:
        self._arrived = asyncio.Event()
        self._stopped, self._hurried = asyncio.Event(), False
        self._limits: set[asyncio.Timeout] = set()
        """Of what is waited for and can be given up."""
        self._broken: BaseException | None = None
        self._published: asyncio.Future[Any] | None = None
        self._begun = time.perf_counter()
        self._last_accuracy: dict[str, float] = {}
        self._unsifted: dict[int, Outline] = {}
        """Finished groups that the sieve has not seen."""
        self._skipped: list[int] = []
        """Since the last checkpoint."""
        self._skipped_groups = self._skipped_tokens = self._skipped_failures = 0
        self._busy = 0.0
        self.seconds_evaluating = 0.0

    def stop(self) -> None:
        """Finish the step in progress, write a checkpoint, end."""
        self._stopped.set()
        self._arrived.set()

    def hurry(self) -> None:
        """After ``stop``: give up what is being played or evaluated; those who wait get GivenUpError."""
        self._hurried = True
        for limit in self._limits:
            limit.reschedule(0.0)

    async def collect(self) -> None:
        """Journal groups as they arrive, and have others played in the place of those that are skipped. Never
        ends by itself; an error of it (a full disk) ends ``run``."""
        try:
            while True:
                self._keep([await self.arrivals.get()])
                # In one process ``run`` does it, between two waits, so that the order is always the same.
                if self.config.pipeline.mode == "async" and self._sift():
                    await self._admit()
        except GivenUpError:
            pass  # the run ends
        except Exception as error:  # nobody awaits this task before the end of the run
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Something that nobody awaits has failed: ``run`` ends with it."""
        self._broken = error
        self._arrived.set()

    def _keep(self, batch: list[tuple[str, int, bytes]]) -> None:
        """Journal ``batch`` and whatever else has arrived."""
        while not self.arrivals.empty():
            batch.append(self.arrivals.get_nowait())
        new = [
            (number, record)
            for _, number, record in batch
            if self.fleet.finished(number, Group.outline_of(record).tokens)
        ]
        self.journal.append(new)
        for number, record in new:
            self._finish(number, record)
        self._arrived.set()

    def _finish(self, number: int, record: bytes) -> None:
        if self.sieve is None:
            self.window.finish(number)
        else:
            self._unsifted[number] = Group.outline_of(record)

    def _sift(self) -> bool:
        """Let finished groups into the window, or skip them, in their order; true if one was skipped."""
        waiting, self._unsifted = self._unsifted, {}
        skipped: list[int] = []
        for number, group in sorted(waiting.items()):
            if self.sieve is None or self.sieve.keeps(number, group.rewards):
                self.window.finish(number)
                continue
            self.window.skip(number)
            self._skipped_tokens += group.tokens
            self._skipped_failures += group.failed
            skipped.append(number)
            if self._selects:
                self.unheard.append((group.problem, sum(group.rewards) / len(group.rewards)))
        self._skipped += skipped
        self._skipped_groups += len(skipped)
        return bool(skipped)

    async def publish_initial(self, publication: Publication) -> None:
        """Bring every sampler to the learner's weights before anything is played."""
        await self._publish(publication)
        await self._publication_served()

    async def run(self) -> bool:
        """Train; true if all steps were taken, false if stopped before."""
        pipeline, admitting = self.config.pipeline, 0.0
        with contextlib.suppress(GivenUpError):
            admitting = await self._admit()
        while self.version < pipeline.steps:
            taken, waited = await self._minibatch()
            if taken is None:
                break
            row = await self._step(taken)
            begun = time.perf_counter()
            with contextlib.suppress(GivenUpError):  # the step counts; no other one follows
                await self._evaluate_if_due(row)
                begun = time.perf_counter()
                await self._admit()
            waited += admitting + time.perf_counter() - begun
            self._record(row | {"seconds_waiting": waited})
            admitting = 0.0
            if self._due(self.config.learner.checkpoint_every):
                await self.checkpoint()
        with contextlib.suppress(GivenUpError):
            await self._publication_served()
        await self.checkpoint()
        return self.version >= pipeline.steps

    async def checkpoint(self) -> None:
        """Write a checkpoint of the last complete step; groups used before it are forgotten."""
        self._keep([])
        position, skipped, self._skipped = self._position(), self._skipped, []
        await self.learner.checkpoint(position)
        self.journal.forget_before(self.version, skipped)

    def _position(self) -> dict[str, Any]:
        """Where to resume: of the window, of the sieve, and what the learner has not heard of."""
        sieve = {} if self.sieve is None else {"sieve": self.sieve.position()}
        unheard = {"unheard": list(self.unheard)} if self._selects else {}
        return self.window.position() | sieve | unheard

    @property
    def _selects(self) -> bool:
        return self.config.pipeline.selection != "all"

    async def evaluate(self, problems: int, *, greedy: bool) -> Rewards:
        """Rewards on the first held-out problems, shared out among the samplers."""
        begun, busy = time.perf_counter(), self.fleet.busy_seconds
        rewards = await self._unless_hurried(self.fleet.evaluate(problems, greedy=greedy))
        self.seconds_evaluating += time.perf_counter() - begun
        self._busy += self.fleet.busy_seconds - busy  # not a step's sampling
        return rewards

    # One turn of the run loop

    async def _minibatch(self) -> tuple[list[int] | None, float]:
        """Wait until a step's groups can be taken; None if stopped."""
        begun = time.perf_counter()
        while not self._stopped.is_set():
            if self._broken is not None:
                raise self._broken
            self._arrived.clear()
            if self._sift():
                await self._admit()
            if (taken := self.window.take()) is not None:
                return taken, time.perf_counter() - begun
            try:
                async with asyncio.timeout(self.config.runtime.timeout_seconds):
                    await self._arrived.wait()
            except TimeoutError:
                raise WorkerError(self._silence()) from None
        return None, time.perf_counter() - begun

    async def _step(self, taken: list[int]) -> dict[str, Any]:
        records = [self._record_of(number) for number in taken]
        begun = time.perf_counter()
        self.journal.mark(taken, self.version)
        skipped, self.unheard = self.unheard, []
        result = await self.learner.step(records, skipped)
        published = time.perf_counter()
        with contextlib.suppress(GivenUpError):  # nobody plays with these weights any more
            await self._publish(result.publication)
        self.window.complete()
        if self.sieve is not None:
            self.sieve.forget(taken)
        self.version += 1
        now = time.perf_counter()
        return result.metrics | {
            "step": self.version,
            "version": self.version,
            "seconds_training": published - begun,
            "seconds_publishing": now - published,
        }

    def _record_of(self, number: int) -> bytes:
        record = self.journal.read(number)
        if record is None:
            raise CheckpointError(
                f"group {number} is missing from the journal: was the run folder changed by hand?"
            )
        return record

    async def _publish(self, publication: Publication) -> None:
        """Send weights to every sampler, once all of them serve the weights sent before."""
        await self._publication_served()
        served = self.fleet.publish(publication)
        sent = self.learner.send(publication)
        self._published = asyncio.ensure_future(_both(sent, served))
        self._published.add_done_callback(self._on_verified)

    def _on_verified(self, verification: asyncio.Future[None]) -> None:
        """A sampler that serves something else is reported now, not when the next weights are sent."""
        if not verification.cancelled() and (error := verification.exception()) is not None:
            self.fail(error)

    async def _publication_served(self) -> None:
        if self._published is not None:
            await self._unless_hurried(self._published)
            self._published = None

    async def _unless_hurried(self, work: Awaitable[T]) -> T:
        """What ``work`` gives. Raises GivenUpError, and cancels it, if the run must end now."""
        limit = asyncio.timeout(0 if self._hurried else None)
        try:
            async with limit:
                self._limits.add(limit)
                return await work
        except TimeoutError:
            if limit.expired():
                raise GivenUpError from None
            raise
        finally:
            self._limits.discard(limit)

    async def _evaluate_if_due(self, row: dict[str, Any]) -> None:
        """Evaluate the version just made if it is due, before anything new is admitted under it."""
        if self._due(self.config.evaluation.every) and self.version < self.config.pipeline.steps:
            await self._publication_served()
            rewards = await self.evaluate(self.config.evaluation.problems, greedy=False)
            greedy = await self.evaluate(self.config.evaluation.problems, greedy=True)
            self._last_accuracy = {"accuracy": accuracy(rewards), "greedy_accuracy": accuracy(greedy)}
            row |= self._last_accuracy

    async def _admit(self) -> float:
        """Hand out the groups that the window has room for; those the journal holds need no rollout.

        Returns the seconds it took: a runtime that plays groups at once makes the learner wait here, until
        none of them is skipped.
        """
        begun = time.perf_counter()
        await self._order()
        while self.sieve is not None:
            self._keep([])
            if not self._sift():
                break
            await self._order()
        return time.perf_counter() - begun

    async def _order(self) -> None:
        remaining = self.config.pipeline.steps - self.version
        missing: list[int] = []
        for number in self.window.admit(remaining * self.config.pipeline.prompts):
            if self.journal.has(number):
                self._finish(number, self._record_of(number))
            else:
                missing.append(number)
        problems = await self._problems(missing)
        orders = [
            GroupOrder(number, self.version, problem)
            for number, problem in zip(missing, problems, strict=True)
        ]
        await self._unless_hurried(self.fleet.order(orders))

    async def _problems(self, numbers: Sequence[int]) -> Sequence[int | None]:
        """What groups play; None: the problem of their number."""
        return await self.learner.choose(numbers) if self._selects and numbers else [None] * len(numbers)

    def _record(self, row: dict[str, Any]) -> None:
        elapsed = time.perf_counter() - self._begun
        spent = row["seconds_training"] + row["seconds_waiting"] + row["seconds_publishing"]
        busy, self._busy = self._busy, self.fleet.busy_seconds
        row |= {
            "elapsed": elapsed,
            "tokens_per_second": row["tokens"] / max(spent, 1e-9),
            "seconds_sampling": self._busy - busy,
        }
        if self.config.pipeline.mode == "async":
            row |= {"samplers": self.fleet.describe(self.version)}
        if self.sieve is not None:
            row |= {
                "skipped_groups": self._skipped_groups,
                "skipped_tokens": self._skipped_tokens,
                "skipped_failed_episodes": self._skipped_failures,
            }
            self._skipped_groups = self._skipped_tokens = self._skipped_failures = 0
        self.writer.write(row)
        self.progress.advance(row | self._last_accuracy)

    def _due(self, every: int) -> bool:
        return bool(every) and self.version % every == 0

    def _silence(self) -> str:
        return (
            f"no group finished within {self.config.runtime.timeout_seconds:g} s (runtime.timeout_seconds); "
            f"waiting for {self.fleet.busy() or 'nobody: the window is empty'}"
        )


async def _both(sent: Awaitable[object], served: Awaitable[None]) -> None:
    await asyncio.gather(sent, served)
