"""The learner as actors, one for each of its ranks, which Ray starts together or not at all.

=============== ============================== ================================ ========================
who             waits for                      woken by                         gives up after
=============== ============================== ================================ ========================
start           a place for all ranks          Ray                              runtime.wait_seconds
request         every rank's answer            the actors                       runtime.timeout_seconds
                                                                                without a sign of life
a rank          the other ranks                a collective of torch            runtime.timeout_seconds
=============== ============================== ================================ ========================
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vcpo import __version__
from vcpo.config import Config
from vcpo.errors import ConfigError, LearnerLost, VcpoError, WorkerError
from vcpo.pipeline.ports import Begun, Outcome, Publication, StepResult
from vcpo.pipeline.processes import rank_request
from vcpo.pipeline.run_folder import RunFolder
from vcpo.runtime.ray.actors import LearnerActor
from vcpo.runtime.ray.cluster import REMEDY, needs_text, reason_of, taken_text
from vcpo.runtime.ray.delivery import delivery_for
from vcpo.runtime.replies import Reply, error_of

POLL_SECONDS = 1.0
WITH_SIGNS = ("prepare", "begin")
"""Requests that may take a warm start."""
NEXT_TO_NOTHING = {"CPU": 0.001}
"""A bundle cannot be empty."""
ALIVE_SECONDS = 5.0
"""How long a rank may take to say that it lives, when another one has failed."""


class Places:
    """Room in the cluster for all ranks, kept for the whole run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._group: PlacementGroup = placement_group(
            [rank_request(config).bundle or NEXT_TO_NOTHING] * config.runtime.learner_ranks, strategy="PACK"
        )

    async def ready(self) -> None:
        seconds = self._config.runtime.wait_seconds
        try:
            ready: Any = self._group.ready()
            async with asyncio.timeout(seconds):
                await ready
        except TimeoutError:
            raise ConfigError(
                f"the Ray cluster had no room for {needs_text(self._config)} within {seconds:g} s "
                f"(runtime.wait_seconds): {taken_text()}; {REMEDY}"
            ) from None
        except RayError as error:
            raise WorkerError(f"Ray has no place for the learner any more: {reason_of(error)}") from error

    def at(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)

    def close(self) -> None:
        remove_placement_group(self._group)


class RayLearner:
    """One life of the learner: if one of its ranks dies, all begin anew."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        places: Places,
        on_loss: Callable[[float], None],
        note: Callable[[str], None],
    ) -> None:
        self._config, self._run, self._on_loss = config, run, on_loss
        self.delivery = delivery_for(config, self, note)
        """How its weights reach the samplers."""
        request, count = rank_request(config), config.runtime.learner_ranks
        self._names = [f"learner-{rank}" for rank in range(count)] if count > 1 else ["learner"]
        remote: Any = ray.remote
        kind = remote(concurrency_groups={"signs": 1})(LearnerActor)
        self._actors = [
            kind.options(
                num_cpus=request.cpus,
                num_gpus=request.gpus,
                max_restarts=0,  # its state would be lost: see vcpo.runtime.ray.run
                scheduling_strategy=places.at(rank),
            ).remote(name)
            for rank, name in enumerate(self._names)
        ]

    def kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    async def begin(self, resume: bool) -> tuple[Begun, Publication]:
        """Several ranks meet once the first has made the model they all load."""
        description = self._config.model_dump(mode="json")
        await self._all("configure", description, str(self._run.path), __version__)
        ranks: list[dict[str, Any] | None] = [None]
        if len(self._actors) > 1:
            await self._all_do("prepare", {"resume": resume}, of=self._actors[:1])
            address, port = await self.place()
            common = {"size": len(self._actors), "meeting": f"tcp://{address}:{port}"}
            ranks = [{"rank": rank, **common} for rank in range(len(self._actors))]
        sent = [
            actor.do.remote("begin", {"resume": resume, "ranks": place})
            for actor, place in zip(self._actors, ranks, strict=True)
        ]
        reply = await self._answers("begin", sent)
        return Begun(**reply["begun"]), Publication(**reply["publication"])

    async def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> StepResult:
        await self.delivery.sent()
        shared = ray.put(list(records))  # once, however many ranks there are
        reply = await self._all("step", shared, list(skipped))
        return StepResult(reply["metrics"], Publication(**reply["publication"]))

    def send(self, publication: Publication) -> Awaitable[object]:
        return self.delivery.send(publication)

    async def place(self) -> tuple[str, int]:
        first = asyncio.ensure_future(self._answer(self._names[0], self._actors[0].place.remote()))
        await self._patiently("place", [first])
        address, port = first.result()["place"]
        return address, port

    async def meet(self, *, address: str, port: int, world_size: int) -> None:
        """Join the broadcast of weights to engines, as its sender."""
        place = {"address": address, "port": port, "world_size": world_size}
        await self._all_do("meet", place, of=self._actors[:1])

    async def broadcast(self) -> None:
        await self._all_do("broadcast", {})

    async def offer(self) -> Publication:
        return Publication(**(await self._all("offer"))["publication"])

    async def choose(self, numbers: Sequence[int]) -> list[int]:
        return (await self._all_do("choose", {"numbers": list(numbers)}))["problems"]

    async def checkpoint(self, position: dict[str, Any]) -> None:
        await self._all_do("checkpoint", {"position": position})

    async def export(self, folder: Path) -> None:
        await self._all_do("export", {"folder": str(folder)})

    async def _all_do(self, what: str, arguments: dict[str, Any], of: Sequence[Any] | None = None) -> Reply:
        return await self._answers(what, [actor.do.remote(what, arguments) for actor in of or self._actors])

    async def _all(self, method: str, *arguments: Any) -> Reply:
        return await self._answers(
            method, [getattr(actor, method).remote(*arguments) for actor in self._actors]
        )

    async def _answers(self, what: str, sent: Sequence[Any]) -> Reply:
        """The first rank's answer, when all have answered. The first error of any is raised at once: the
        others may be waiting for that rank."""
        answers = [
            asyncio.ensure_future(self._answer(name, reference))
            for name, reference in zip(self._names, sent, strict=False)
        ]
        try:
            await self._patiently(what, answers)
        except VcpoError as error:
            raise await self._cause(error) from None
        finally:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
        return answers[0].result()

    async def _answer(self, name: str, reference: Any) -> Reply:
        try:
            reply = await reference
        except RayError as error:
            raise LearnerLost(f"{name} is gone ({reason_of(error)}); see {self._log(name)}") from None
        if "error" in reply:
            raise error_of(reply, name, self._log(name))
        return reply

    def _log(self, name: str) -> Path:
        return self._run.logs / f"{name}.log"

    async def _patiently(self, what: str, answers: Sequence[asyncio.Task[Reply]]) -> None:
        """Wait for all; give up when there was no sign of life for too long."""
        heard, limit = 0, self._config.runtime.timeout_seconds
        loop = asyncio.get_running_loop()
        last = loop.time()
        pending: set[asyncio.Task[Reply]] = set(answers)
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for answer in done:
                answer.result()
            if what in WITH_SIGNS and (losses := await self._losses(heard)):
                heard, last = heard + len(losses), loop.time()
                for loss in losses:
                    self._on_loss(loss)
            if pending and loop.time() - last > limit:
                waiting = [n for n, a in zip(self._names, answers, strict=False) if a in pending]
                raise WorkerError(
                    f"{', '.join(waiting)} did not answer {what!r} within {limit:g} s "
                    f"(runtime.timeout_seconds); see {self._log(waiting[0])}"
                )

    async def _losses(self, heard: int) -> list[float]:
        try:
            async with asyncio.timeout(ALIVE_SECONDS):
                return await self._actors[0].signs.remote(heard)
        except (TimeoutError, RayError):
            return []  # its own answer will tell

    async def _cause(self, error: VcpoError) -> VcpoError:
        """A rank that is gone makes the others fail too, and they may say so first."""
        if not isinstance(error, WorkerError) or isinstance(error, LearnerLost) or len(self._actors) == 1:
            return error
        asked = await asyncio.gather(
            *(asyncio.wait_for(actor.signs.remote(0), ALIVE_SECONDS) for actor in self._actors),
            return_exceptions=True,
        )
        for name, answer in zip(self._names, asked, strict=True):
            if isinstance(answer, BaseException):
                said = reason_of(answer) if isinstance(answer, RayError) else "it does not answer"
                return LearnerLost(f"{name} is gone ({said}); see {self._log(name)}")
        return error
