"""A training run on a Ray cluster.

When the learner is lost, or one of its ranks, all ranks begin anew from the last checkpoint, as ``--resume``
does, and the groups that the journal holds are not played again. The samplers stay.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from vcpo.config import Config
from vcpo.errors import LearnerLost
from vcpo.monitor.progress import Progress
from vcpo.pipeline.controller import Controller
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.ports import Arrivals
from vcpo.pipeline.processes import elsewhere
from vcpo.pipeline.run_folder import RunFolder
from vcpo.pipeline.session import Parts, WarmStartPhase, interrupted_summary, train_session
from vcpo.runtime.interrupts import stop_in_order, stop_on_signals
from vcpo.runtime.ray.cluster import check_room
from vcpo.runtime.ray.learner import Places, RayLearner
from vcpo.runtime.ray.samplers import Samplers
from vcpo.runtime.ray.scale import heard
from vcpo.runtime.tasks import unless

SCALE_SECONDS = 1.0
"""Between two looks at how many samplers are wanted."""


class _Run:
    """One training run: its actors, and the task that a signal cancels."""

    def __init__(self, config: Config, run: RunFolder, progress: Progress, *, resume: bool) -> None:
        self._config, self._run, self._progress, self._resume = config, run, progress, resume
        self._controller: Controller | None = None
        self._training: asyncio.Task[dict[str, Any]] | None = None

    async def __call__(self) -> dict[str, Any]:
        training = asyncio.ensure_future(self._lives())
        stop_on_signals(lambda: stop_in_order(self._controller, training))
        try:
            return await training
        except asyncio.CancelledError:
            if not training.cancelled():
                raise
            return interrupted_summary(self._run)

    async def _lives(self) -> dict[str, Any]:
        """One life of the learner after another."""
        samplers, places = Samplers(self._config, self._run, self._progress.note), Places(self._config)
        failures, resume, reached = 0, self._resume, -1
        try:
            while True:
                try:
                    return await self._life(samplers, places, resume)
                except LearnerLost as lost:
                    version = self._controller.version if self._controller else -1
                    failures = failures + 1 if version <= reached else 0
                    reached, resume = max(reached, version), True
                    if failures > self._config.runtime.restarts:
                        raise
                    self._progress.note(f"{lost}; it begins anew from the last checkpoint")
        finally:
            await samplers.close()
            places.close()

    async def _life(self, samplers: Samplers, places: Places, resume: bool) -> dict[str, Any]:
        config, progress = self._config, self._progress
        self._controller = None
        begun_at = time.perf_counter()
        progress.phase("loading", None)
        await places.ready()
        warming = WarmStartPhase(progress, config.warm_start.steps)
        learner = RayLearner(config, self._run, places, warming, progress.note)
        try:
            begun, initial = await learner.begin(resume)
            arrivals: Arrivals = asyncio.Queue()
            fleet = Fleet(timeout_seconds=config.runtime.timeout_seconds)
            parts = Parts(learner, fleet, arrivals, begun, initial, begun_at)

            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

            def on_error(error: Exception) -> None:
                if not failed.done():
                    failed.set_exception(error)

            def on_controller(controller: Controller) -> None:
                self._controller = controller
                samplers.serve(fleet, arrivals, begun.policy, learner.delivery, on_error)

            session = train_session(config, self._run, parts, progress, on_controller)
            scaling = asyncio.ensure_future(self._scale(samplers))
            return await unless([failed, scaling], asyncio.ensure_future(session))
        finally:
            await samplers.pause()
            learner.kill()

    async def _scale(self, samplers: Samplers) -> None:
        """Follow what ``vcpo scale`` asks for."""
        while True:
            if (wanted := heard(self._run)) is not None:
                await samplers.scale(wanted)
            await asyncio.sleep(SCALE_SECONDS)


def train_connected(config: Config, run: RunFolder, progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Train on the cluster that this process is connected to."""
    run_here, config = RunFolder(run.path.resolve()), elsewhere(config)  # actors have other working folders
    check_room(config)
    return asyncio.run(_Run(config, run_here, progress, resume=resume)())
