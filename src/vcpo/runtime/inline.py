"""Everything in this process, one thing after another: ``pipeline.mode = "exact"``.

The controller, the window and the services are those of the asynchronous runtime. Only here, ordering
groups plays them to the end before it returns, under the weights published last. With a window of one,
the groups ordered after step t are trained on in step t + lag: every rollout is exactly ``lag`` versions
old (fewer in the first steps), and nothing depends on timing.

With ``pipeline.over_provision`` = M > 0 ordering returns while M groups are still being played. They rest
while the learner takes its step, and go on under its weights when the sampler is next waited for (in an
evaluation too): at lag 0 this is APRIL. Which groups finish first depends on the order of the event loop
alone, so a run can be repeated to the byte as long as its environment waits for nothing outside this process.
Groups that were being played when a run was killed are played again, all of them under the weights they are
then begun with: such a run goes on, but not to the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vcpo.config import Config
from vcpo.monitor.progress import Progress
from vcpo.pipeline.controller import Controller
from vcpo.pipeline.engines import Share
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Arrivals, Outcome, Publication, Rewards, StepResult
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.run_folder import RunFolder
from vcpo.pipeline.services import LearnerService, RolloutService
from vcpo.pipeline.session import Parts, WarmStartPhase, interrupted_summary, train_session
from vcpo.policy.loading import hide_loading_bars
from vcpo.runtime.interrupts import stop_in_order, stop_on_signals


class InlineLearner:
    """The learner in this process."""

    def __init__(self, service: LearnerService) -> None:
        self._service = service

    async def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> StepResult:
        metrics = self._service.step(records, skipped)
        return StepResult(metrics, self.publication())

    def publication(self) -> Publication:
        version, weights, checksum = self._service.weights()
        frozen = {
            name: tensor.clone() for name, tensor in weights.items()
        }  # the next step changes the learner's
        return Publication(version, checksum, frozen, self._service.probe())

    def send(self, publication: Publication) -> Awaitable[object]:
        return asyncio.sleep(0)  # samplers are given the tensors themselves

    async def choose(self, numbers: Sequence[int]) -> list[int]:
        return self._service.choose(numbers)

    async def checkpoint(self, position: dict[str, Any]) -> None:
        self._service.checkpoint(position)

    async def export(self, folder: Path) -> None:
        self._service.export(folder)


class InlineSampler:
    """The sampler in this process."""

    name = "sampler-0"

    def __init__(self, service: RolloutService, arrivals: Arrivals, over_provision: int = 0) -> None:
        self._service, self._arrivals, self._spare = service, arrivals, over_provision
        self._publication: asyncio.Future[str] | None = None
        self._unfinished: set[int] = set()
        self._playing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self.on_error: Callable[[BaseException], None] = lambda error: None
        """Hears of an error whether or not ``order`` is waited for."""

    @property
    def busy_seconds(self) -> float:
        return self._service.busy_seconds

    def publish(self, publication: Publication) -> Awaitable[str]:
        self._publication = asyncio.ensure_future(
            self._service.publish(publication.version, publication.source, publication.probe)
        )
        return self._publication

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        """Play groups until no more than M of all that were ordered are unfinished."""
        if self._publication is not None:
            await self._publication
        self._unfinished.update(order.index for order in orders)
        playing = asyncio.ensure_future(self._service.play(orders, self._on_group))
        self._playing.add(playing)
        playing.add_done_callback(self._on_end)
        while len(self._unfinished) > self._spare and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def _on_group(self, number: int, record: bytes) -> None:
        self._unfinished.discard(number)
        self._arrivals.put_nowait((self.name, number, record))
        self._changed.set()

    def _on_end(self, playing: asyncio.Task[None]) -> None:
        self._playing.discard(playing)
        if not playing.cancelled() and (error := playing.exception()) is not None:
            self._error = error
            self._changed.set()
            self.on_error(error)

    async def close(self) -> None:
        """Give up what is being played."""
        for playing in self._playing:
            playing.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> Rewards:
        return await self._service.evaluate(first, count, greedy=greedy)


def train_inline(config: Config, run: RunFolder, progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Train in this process; the summary, ``completed`` false if interrupted."""
    begun_at = time.perf_counter()
    torch.set_num_threads(config.runtime.threads)
    hide_loading_bars()
    learner_service = LearnerService(config, run.path)
    rollout_service = RolloutService(config, Share(logs=run.logs))
    progress.phase("loading", None)
    begun = learner_service.begin(resume=resume, listener=WarmStartPhase(progress, config.warm_start.steps))
    rollout_service.begin(begun.policy)

    async def session() -> dict[str, Any]:
        arrivals: Arrivals = asyncio.Queue()
        learner = InlineLearner(learner_service)
        sampler = InlineSampler(rollout_service, arrivals, config.pipeline.over_provision)
        parts = Parts(learner, Fleet([sampler]), arrivals, begun, learner.publication(), begun_at)

        def on_controller(controller: Controller) -> None:
            sampler.on_error = controller.fail
            stop_on_signals(lambda: stop_in_order(controller, training))

        training = asyncio.ensure_future(train_session(config, run, parts, progress, on_controller))
        try:
            return await training
        except asyncio.CancelledError:
            if not training.cancelled():
                raise
            return interrupted_summary(run)
        finally:
            await sampler.close()
            await rollout_service.close()

    return asyncio.run(session())
