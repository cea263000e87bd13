"""What the controller says to a learner and to samplers, and what they answer, wherever they live."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vcpo.pipeline.rollout import GroupOrder


@dataclass(frozen=True)
class Publication:
    """Weights on their way to the samplers."""

    version: int
    checksum: str
    """Of the learner's tensors; a sampler that serves them answers the same."""
    source: Any
    """Where the weights are, in the runtime's terms."""
    probe: Any = None
    """What engines that are not ours must say of these weights, in the runtime's terms."""


@dataclass(frozen=True)
class Begun:
    """What a learner says when it is ready."""

    version: int
    policy: str
    """Folder or hub id from which samplers load the model; weights are published on top."""
    position: dict[str, Any]
    """The pipeline's place at the checkpoint that was resumed; empty for a new run."""
    parameters: int
    dynamic_sampling: bool = False
    """Whether groups without a signal are skipped: the method may say so, and the learner knows it."""


@dataclass(frozen=True)
class StepResult:
    metrics: dict[str, Any]
    publication: Publication


Outcome = tuple[int, float]
"""(a problem, the mean reward of its group)."""


class LearnerPort(Protocol):
    """The learner, wherever it lives."""

    async def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> StepResult:
        """Train on groups. ``skipped``: what became of those skipped since the step before, where problems
        are selected."""
        ...

    def send(self, publication: Publication) -> Awaitable[object]:
        """Do the learner's part of a publication, if samplers wait for one."""
        ...

    async def choose(self, numbers: Sequence[int]) -> list[int]:
        """Which problem of the training stream each group plays; asked only where problems are selected."""
        ...

    async def checkpoint(self, position: dict[str, Any]) -> None: ...

    async def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        ...


Rewards = Sequence[float | None]
"""Of an evaluation; None: the episode failed."""


class SamplerPort(Protocol):
    """One sampler with its environments, wherever it lives. Asked for something when it is gone, it raises
    SamplerLost if the run can do without it."""

    @property
    def name(self) -> str: ...

    @property
    def busy_seconds(self) -> float:
        """Time its engine has spent computing."""
        ...

    def publish(self, publication: Publication) -> Awaitable[str]:
        """Send weights now; the answer is the checksum of what the sampler serves."""
        ...

    async def order(self, orders: Sequence[GroupOrder]) -> None:
        """Ask for groups; each arrives in the queue the port was made with."""
        ...

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> Rewards: ...


Arrivals = asyncio.Queue[tuple[str, int, bytes]]
"""(name of the sampler, number of the group, its record)."""
