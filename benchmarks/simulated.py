"""An engine without a model, for benchmarks of what lies around engines: it waits where one would compute."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vcpo.environments.protocol import Episode, Problem, Split
from vcpo.pipeline.services import RolloutService
from vcpo.runtime.ray.actors import SamplerActor
from vcpo.samplers.protocol import Completion
from vcpo.weights import Probe, Weights, checksum

VOCABULARY = 32


class Answers:
    """One turn; the reward is chance."""

    tokens = 64

    def __init__(self, codec: Any, config: Any) -> None:
        pass

    def problem(self, index: int, split: Split) -> Problem:
        return Problem(index, "", "")

    async def play(self, problem: Problem, episode: Episode) -> float:
        episode.observe([1, 2, 3])
        answer = await episode.act(self.tokens)
        return float(answer[-1] % 2)


class SimulatedEngine:
    """As many sequences at once as it has slots; each takes ``seconds``, times a log-normal number."""

    context_length = 1 << 20
    spread = 0.3

    def __init__(self, slots: int, seconds: float) -> None:
        self._slots, self._seconds = asyncio.Semaphore(slots), seconds
        self.version = 0
        self._active, self._busy, self._since = 0, 0.0, 0.0

    @property
    def busy_seconds(self) -> float:
        return self._busy + (time.monotonic() - self._since if self._active else 0.0)

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        stop: frozenset[int],
        seed: int,
        greedy: bool = False,
        session: int | None = None,
    ) -> Completion:
        numbers = random.Random(seed)
        async with self._slots:
            if not self._active:
                self._since = time.monotonic()
            self._active += 1
            await asyncio.sleep(self._seconds * math.exp(numbers.gauss(-(self.spread**2) / 2, self.spread)))
            self._active -= 1
            if not self._active:
                self._busy += time.monotonic() - self._since
        sampled = numbers.choices(range(VOCABULARY), k=max_tokens)
        return Completion(sampled, [-1.0] * max_tokens, [self.version] * max_tokens, "length")

    def release(self, session: int) -> None:
        pass

    async def update(self, version: int, weights: Weights, probe: Probe | None = None) -> str:
        self.version = version
        return checksum(weights)

    async def ranks(self) -> list[int]:
        return []

    async def meet(self, address: str, port: int, offset: int, world_size: int) -> None:
        raise NotImplementedError

    async def ready(self) -> None:
        pass

    async def close(self) -> None:
        pass


class SimulatedService(RolloutService):
    def begin(self, policy: str | Any) -> None:
        """``policy``: seconds of a sequence, as text."""
        from vcpo.pipeline.build import build_rollout_loop

        self._sampler = SimulatedEngine(self._config.sampler.slots, float(policy))
        speaker: Any = SimpleNamespace(codec=None, stop=frozenset(), context_length=1 << 20)
        self._loop = build_rollout_loop(self._config, speaker, self._sampler)


class SimulatedSampler(SamplerActor):
    def service(self, config: Any, share: Any) -> SimulatedService:
        return SimulatedService(config, share)
