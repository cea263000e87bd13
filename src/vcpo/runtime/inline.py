"""Everything in this process, one thing after another: ``pipeline.mode = "exact"``.

The controller, the window and the services are those of the asynchronous runtime. Only here, ordering
groups plays them to the end before it returns, under the weights published last. With a window of one,
the groups ordered after step t are trained on in step t + lag: every rollout is exactly ``lag`` versions
old (fewer in the first steps), and nothing depends on timing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import torch

from vcpo.config import Config
from vcpo.monitor.progress import Progress
from vcpo.pipeline.controller import Arrivals, Controller, Publication, StepResult
from vcpo.pipeline.engines import Share
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

    async def step(self, records: Sequence[bytes]) -> StepResult:
        metrics = self._service.step(records)
        return StepResult(metrics, self.publication())

    def publication(self) -> Publication:
        version, weights, checksum = self._service.weights()
        frozen = {
            name: tensor.clone() for name, tensor in weights.items()
        }  # the next step changes the learner's
        return Publication(version, checksum, frozen, self._service.probe())

    def send(self, publication: Publication) -> Awaitable[object]:
        return asyncio.sleep(0)  # samplers are given the tensors themselves

    async def checkpoint(self, position: dict[str, Any]) -> None:
        self._service.checkpoint(position)

    async def export(self, folder: Path) -> None:
        self._service.export(folder)


class InlineSampler:
    """The sampler in this process."""

    name = "sampler-0"

    def __init__(self, service: RolloutService, arrivals: Arrivals) -> None:
        self._service, self._arrivals = service, arrivals
        self._publication: asyncio.Future[str] | None = None

    @property
    def busy_seconds(self) -> float:
        return self._service.busy_seconds

    def publish(self, publication: Publication) -> Awaitable[str]:
        self._publication = asyncio.ensure_future(
            self._service.publish(publication.version, publication.source, publication.probe)
        )
        return self._publication

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        if self._publication is not None:
            await self._publication
        await self._service.play(
            orders, lambda number, record: self._arrivals.put_nowait((self.name, number, record))
        )

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> list[float]:
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
        samplers = [InlineSampler(rollout_service, arrivals)]
        parts = Parts(learner, samplers, arrivals, begun, learner.publication(), begun_at)

        def on_controller(controller: Controller) -> None:
            stop_on_signals(lambda: stop_in_order(controller, training))

        training = asyncio.ensure_future(train_session(config, run, parts, progress, on_controller))
        try:
            return await training
        except asyncio.CancelledError:
            if not training.cancelled():
                raise
            return interrupted_summary(run)
        finally:
            await rollout_service.close()

    return asyncio.run(session())
