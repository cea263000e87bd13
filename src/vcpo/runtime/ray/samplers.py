"""Samplers as actors: each joins the fleet when Ray has started it, leaves when it dies, and joins again when
Ray has restarted it. Their number may change while a run goes on.

=============== ============================== ================================ ========================
who             waits for                      woken by                         gives up after
=============== ============================== ================================ ========================
slot            a place in the cluster         Ray                              never if another has one;
                                                                                else runtime.wait_seconds
slot            the engine to be ready         the actor                        runtime.timeout_seconds,
                                                                                then it is restarted
slot            the end of its sampler         any call that finds it gone      never
watch           a sign of life                 the actor: its answer, and, as   runtime.timeout_seconds,
                                               long as it has something to do,  then it is restarted
                                               engine time or a finished group
retire          its groups                     the fleet                        runtime.timeout_seconds
=============== ============================== ================================ ========================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from vcpo import __version__
from vcpo.config import Config
from vcpo.errors import ConfigError, EngineLost, SamplerLost, VcpoError, WorkerError
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Arrivals, Publication, Rewards
from vcpo.pipeline.processes import sampler_request
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.run_folder import RunFolder
from vcpo.runtime.ray.actors import SamplerActor
from vcpo.runtime.ray.cluster import REMEDY, reason_of, taken_text
from vcpo.runtime.ray.delivery import Delivery
from vcpo.runtime.replies import Reply, error_of

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
PATIENCE = 0.7
"""Of runtime.timeout_seconds: the controller, which waits for all of it, would end the run."""
CALLS_AT_ONCE = 1_000_000
"""Groups that a sampler may hold; what the engine does at once is its own affair."""
PAUSE_SECONDS = 0.5
"""Before an actor that Ray is restarting is asked again."""


class RaySampler:
    """One life of a sampler's actor."""

    def __init__(
        self,
        name: str,
        actor: Any,
        arrivals: Arrivals,
        delivery: Delivery,
        log_path: object,
        on_error: Callable[[Exception], None],
    ) -> None:
        self._name, self._actor, self._arrivals, self._log = name, actor, arrivals, log_path
        self._delivery = delivery
        self._on_error = on_error
        self._busy, self._before = 0.0, 0.0
        """Engine time in this life of the sampler, and before it: for a learner that is gone."""
        self._asked: set[asyncio.Future[Reply]] = set()
        """Answers that are waited for."""
        self._collecting: set[asyncio.Task[None]] = set()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to the reason when the actor is found to be gone."""
        self.groups = 0
        """Finished in this life."""
        self.life = ""
        """What tells this life from others; empty until Ray has found a place for it."""
        self.killed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def busy_seconds(self) -> float:
        return self._busy

    async def begin(self, *settings: Any) -> None:
        self._before = (await self._call("begin", *settings))["busy"]

    def publish(self, publication: Publication) -> Awaitable[str]:
        return self._delivery.to(self, publication)

    def take(self, publication: Publication) -> asyncio.Future[str]:
        sent = self._call("publish", publication.version, publication.source, publication.probe)
        return asyncio.ensure_future(self._checksum(publication, sent))

    async def _checksum(self, publication: Publication, sent: Awaitable[Reply]) -> str:
        checksum = (await sent)["checksum"]
        return publication.checksum if checksum is None else checksum  # None: it serves newer weights

    async def ranks(self) -> int:
        return (await self._call("ranks"))["ranks"]

    async def meet(self, *, address: str, port: int, offset: int, world_size: int) -> None:
        await self._call("meet", address, port, offset, world_size)

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        if self.lost.done():
            raise SamplerLost(f"{self._name} {self.lost.result()}")
        for order in orders:
            played = self._call("play", order.index, order.version, order.problem)
            collecting = asyncio.ensure_future(self._collect(order.index, played))
            self._collecting.add(collecting)
            collecting.add_done_callback(self._collecting.discard)

    async def _collect(self, index: int, played: Awaitable[Reply]) -> None:
        try:
            reply = await played
        except SamplerLost:
            return  # the slot tells the fleet, which has others play it
        except Exception as error:
            self._on_error(error)
            return
        self.groups += 1
        self._arrivals.put_nowait((self._name, index, reply["record"]))

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> Rewards:
        return (await self._call("evaluate", first, count, greedy))["rewards"]

    def _call(self, method: str, *arguments: Any) -> Awaitable[Reply]:
        """Send now; the answer, or the error it tells of, when it is awaited."""
        reference = getattr(self._actor, method).remote(*arguments)
        return self._answer(reference)

    async def _answer(self, reference: Any) -> Reply:
        answer = asyncio.ensure_future(_answer_of(reference))
        self._asked.add(answer)
        try:
            return self._checked(await answer)
        except asyncio.CancelledError:
            if not (self.lost.done() and answer.cancelled()):  # it is not the sampler that is given up
                raise
        except (RayError, SamplerLost) as error:
            self.gone(error)
        except EngineLost as error:
            self.kill(f"it has no engine any more: {error}")
        finally:
            self._asked.discard(answer)
            answer.cancel()
        raise SamplerLost(f"{self._name} {self.lost.result()}")

    def _checked(self, reply: Reply) -> Reply:
        if "error" in reply:
            raise error_of(reply, self._name, self._log)
        return reply

    def gone(self, why: object) -> None:
        """Wait for none of its answers: to what is asked while Ray restarts it, it answers much later."""
        if not self.lost.done():
            self.lost.set_result(f"is gone ({reason_of(why)}); see {self._log}")
        for answer in self._asked:
            answer.cancel()

    async def watch(self, timeout: float) -> None:
        """Ask for signs of life until there are none for ``timeout`` seconds; then have Ray restart it."""
        loop = asyncio.get_running_loop()
        progress, moved = (self._busy, self.groups), loop.time()
        while not self.lost.done():
            try:
                # Not asyncio.wait_for: until Python 3.12 it loses a cancellation that comes with the answer.
                async with asyncio.timeout(timeout):
                    reply = self._checked(await self._actor.busy.remote())
                self._busy = reply["busy"] - self._before
            except TimeoutError:
                self.kill(f"it did not answer for {timeout:g} s (runtime.timeout_seconds)")
            except (RayError, SamplerLost) as error:
                self.gone(error)
            if not self._asked or progress != (self._busy, self.groups):
                progress, moved = (self._busy, self.groups), loop.time()
            elif loop.time() - moved > timeout:
                self.kill(f"it did nothing for {timeout:g} s (runtime.timeout_seconds)")
            await asyncio.wait([self.lost], timeout=min(HEARTBEAT_SECONDS, timeout / 8))

    def kill(self, why: str) -> None:
        """Have Ray restart the actor."""
        if not self.lost.done():
            self.gone(why)
            self.killed = True
            ray.kill(self._actor, no_restart=False)

    def drop(self) -> None:
        """Wait for nothing any more."""
        for collecting in self._collecting:
            collecting.cancel()


async def _answer_of(reference: Any) -> Any:
    return await reference


class Samplers:
    """The samplers of a run, through all lives of its learner."""

    def __init__(
        self, config: Config, run: RunFolder, note: Callable[[str], None], kind: type = SamplerActor
    ) -> None:
        self._config, self._run, self._note = config, run, note
        self._timeout = config.runtime.timeout_seconds
        request = sampler_request(config)
        self._actor_class: Any = ray.remote(kind).options(
            num_cpus=request.cpus,
            num_gpus=request.gpus,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=CALLS_AT_ONCE,
        )
        self._actors: dict[int, Any] = {}
        self._slots: dict[int, asyncio.Task[None]] = {}
        self._serve: Callable[[int], Awaitable[None]] | None = None
        self.wanted = config.runtime.samplers
        self._joined = False
        """Whether any sampler has ever joined a fleet."""
        self._refused: dict[int, VcpoError] = {}
        """Errors of samplers that could not begin, until they can."""
        self._placed: set[int] = set()
        """Samplers that the cluster has had a place for."""
        self._killed: dict[int, str] = {}
        """The last life of each that was killed, which may answer for a moment yet."""

    def serve(
        self,
        fleet: Fleet,
        arrivals: Arrivals,
        policy: str,
        delivery: Delivery,
        on_error: Callable[[Exception], None],
    ) -> None:
        """Join ``fleet`` with all samplers, as they are ready."""

        async def slot(number: int) -> None:
            try:
                await self._slot(number, fleet, arrivals, policy, delivery, on_error)
            except Exception as error:
                on_error(error)

        self._serve = slot
        self._fleet, self._delivery = fleet, delivery
        for number in [number for number in self._actors if number >= self.wanted]:
            ray.kill(self._actors.pop(number))  # scaled down while there was no fleet to leave
        self._fill()

    def _fill(self) -> None:
        for number in range(self.wanted):
            if number not in self._slots and self._serve is not None:
                self._slots[number] = asyncio.ensure_future(self._serve(number))

    async def scale(self, count: int) -> None:
        """Have ``count`` samplers. Those that go finish their groups first."""
        if count == self.wanted or self._serve is None:  # while there is no learner: later
            return
        self._note(f"samplers: {count} in place of {self.wanted}")
        self.wanted = count
        self._fill()
        going = [number for number in self._slots if number >= count]
        await asyncio.gather(*(self._retire(number) for number in going))

    async def _retire(self, number: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await self._fleet.retire(self._name(number))
        slot = self._slots.pop(number, None)
        if slot is None:  # the learner was lost meanwhile, and all slots with it
            return
        slot.cancel()
        await asyncio.gather(slot, return_exceptions=True)
        await self._fleet.leave(self._name(number), "it is not wanted any more, and was not done in time")
        await self._delivery.over()
        ray.kill(self._actors.pop(number))

    async def pause(self) -> None:
        """Let go of the fleet: its learner is gone."""
        slots, self._slots, self._serve = self._slots, {}, None
        for slot in slots.values():
            slot.cancel()
        await asyncio.gather(*slots.values(), return_exceptions=True)

    async def close(self) -> None:
        await self.pause()
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    @staticmethod
    def _name(number: int) -> str:
        return f"sampler-{number}"

    async def _slot(
        self,
        number: int,
        fleet: Fleet,
        arrivals: Arrivals,
        policy: str,
        delivery: Delivery,
        on_error: Callable[[Exception], None],
    ) -> None:
        """One life of the sampler after another."""
        name = self._name(number)
        log_path = self._run.logs / f"{name}.log"
        if number not in self._actors:
            self._actors[number] = self._actor_class.remote(name)
        failures = 0
        while True:
            actor = self._actors[number]
            sampler = RaySampler(name, actor, arrivals, delivery, log_path, on_error)
            try:
                if await self._begun(sampler, actor, number, policy):
                    await self._live(sampler, fleet)
            finally:
                sampler.drop()
                if sampler.killed:
                    self._killed[number] = sampler.life
            why = sampler.lost.result()
            failures = 0 if sampler.groups else failures + 1
            if not self._joined and self._refused.keys() >= set(range(self.wanted)):
                raise self._refused[number]  # it is not the machine of one of them
            if failures > self._config.runtime.restarts:
                times = f"{failures} times in a row" if failures > 1 else "once"
                raise WorkerError(
                    f"{name} {why}; that was {times} without having finished a group (runtime.restarts)"
                )
            self._note(f"{name} {why}")

    async def _here(self, sampler: RaySampler, actor: Any, number: int) -> bool:
        """Whether Ray has found a place for the actor; false if it could not start it.

        Raises ConfigError if there is none for any sampler within runtime.wait_seconds.
        """
        limit: float | None = self._config.runtime.wait_seconds
        while True:
            here = asyncio.ensure_future(_answer_of(actor.here.remote()))
            await asyncio.wait([here], timeout=limit)
            if not here.done():
                needed = f"a sampler ({sampler_request(self._config)})"
                if not self._placed:
                    here.cancel()
                    raise ConfigError(
                        f"the Ray cluster had no room for {needed} within {limit:g} s "
                        f"(runtime.wait_seconds): {taken_text()}; {REMEDY}"
                    )
                self._note(f"{sampler.name} waits for a place: {needed}, and {taken_text()}")
                limit = None
                await asyncio.wait([here])
            try:
                sampler.life = here.result()
            except ActorUnavailableError:
                pass  # Ray is restarting it
            except RayActorError as error:  # Ray has given it up
                sampler.gone(error)
                self._refused[number] = WorkerError(f"{sampler.name} {sampler.lost.result()}")
                self._actors[number] = self._actor_class.remote(sampler.name)
                return False
            else:
                if sampler.life != self._killed.get(number):
                    self._placed.add(number)
                    return True
            await asyncio.sleep(PAUSE_SECONDS)

    async def _begun(self, sampler: RaySampler, actor: Any, number: int, policy: str) -> bool:
        """Whether the sampler is ready; false if it died on the way, or could not begin."""
        if not await self._here(sampler, actor, number):
            return False
        share = (number, self._config.runtime.samplers)
        description = self._config.model_dump(mode="json")
        beginning = asyncio.ensure_future(
            sampler.begin(description, str(self._run.path), __version__, policy, share)
        )
        try:
            async with asyncio.timeout(self._timeout):
                await beginning
        except SamplerLost:
            return False
        except TimeoutError:
            sampler.kill(f"it was not ready within {self._timeout:g} s (runtime.timeout_seconds)")
            return False
        except VcpoError as error:
            self._refused[number] = error
            sampler.kill(f"it could not begin: {error}")
            return False
        self._refused.pop(number, None)
        return True

    async def _live(self, sampler: RaySampler, fleet: Fleet) -> None:
        watching = asyncio.ensure_future(sampler.watch(PATIENCE * self._timeout))
        try:
            await fleet.join(sampler)
            self._joined = True
            await asyncio.shield(sampler.lost)
            await fleet.leave(sampler.name, sampler.lost.result())
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
