"""The driver's side of a sampler on Ray, without Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from vcpo.runtime.ray.samplers import RaySampler


def test_a_watch_that_is_cancelled_while_its_answer_comes_ends() -> None:
    """Whoever lets go of a sampler waits for its watch to end."""

    async def run() -> None:
        answers: list[asyncio.Future[Any]] = []

        def busy() -> asyncio.Future[Any]:
            answers.append(asyncio.get_running_loop().create_future())
            return answers[-1]

        actor: Any = SimpleNamespace(busy=SimpleNamespace(remote=busy))
        unused: Any = None
        sampler = RaySampler("sampler-0", actor, unused, unused, "log", lambda error: None)
        watching = asyncio.ensure_future(sampler.watch(10))
        while not answers:
            await asyncio.sleep(0)
        answers[0].set_result({"busy": 0.0})
        watching.cancel()
        await asyncio.wait([watching], timeout=5)
        assert watching.cancelled()

    asyncio.run(run())
