"""The two workers of a run, without a word about where they live: a runtime puts each in a process.

Groups travel as bytes (:meth:`vcpo.trajectory.Group.to_bytes`), so that the controller between the two
never unpacks a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vcpo.config import Config
from vcpo.learner.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vcpo.learner.learner import Learner
from vcpo.pipeline.build import (
    WarmStartListener,
    algorithm_of,
    build_learner,
    build_policy,
    build_rollout_loop,
)
from vcpo.pipeline.controller import Begun
from vcpo.pipeline.rollout import GroupOrder, RolloutLoop, gather_all
from vcpo.policy.loading import Policy, load_policy
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Group
from vcpo.weights import checksum, weight_tensors


class LearnerService:
    """Owns the policy being trained."""

    def __init__(self, config: Config, run_folder: Path) -> None:
        self._config, self._run_folder = config, run_folder
        self._policy: Policy
        self._learner: Learner

    def begin(self, *, resume: bool, listener: WarmStartListener = lambda loss: None) -> Begun:
        initial = self._run_folder / "initial_model"
        algorithm_of(self._config)  # a wrong name is told before the warm start, not after
        source = self._config.model.name or str(initial)
        if resume and not self._config.model.name and initial.exists():
            self._policy = load_policy(source, self._config.model)
        else:
            self._policy = build_policy(self._config, listener)
            if not self._config.model.name:
                self._save_whole(initial)
        self._learner = build_learner(self._config, self._policy)
        checkpoint = latest_checkpoint(self._run_folder) if resume else None
        state = load_checkpoint(checkpoint, self._learner) if checkpoint else {}
        parameters = sum(p.numel() for p in self._policy.model.parameters())
        return Begun(self._learner.version, source, state.get("position", {}), parameters)

    def _save_whole(self, folder: Path) -> None:
        """Save so that a run killed meanwhile leaves the whole folder or none of it."""
        partial = folder.with_name(f".partial-{folder.name}")
        self._policy.save(partial)
        partial.rename(folder)

    def step(self, records: Sequence[bytes]) -> dict[str, Any]:
        return self._learner.step([Group.from_bytes(record) for record in records])

    def weights(self) -> tuple[int, dict[str, Tensor], str]:
        """Version, tensors (live, not copied) and checksum of the current weights."""
        tensors = weight_tensors(self._policy.model)
        return self._learner.version, tensors, checksum(tensors)

    def checkpoint(self, position: dict[str, Any]) -> None:
        save_checkpoint(self._run_folder, self._learner, {"position": position})

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self._policy.save(folder)


class RolloutService:
    """Owns a sampler with a replica of the policy, and the environment that plays with it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop: RolloutLoop
        self._sampler: LocalSampler

    def begin(self, policy: str | Policy) -> None:
        """Load the policy from where the learner says, or take a copy of one in this process."""
        if isinstance(policy, Policy):
            replica = Policy(
                copy.deepcopy(policy.model), policy.tokenizer, policy.context_length, policy.name
            )
        else:
            replica = load_policy(policy, self._config.model)
        self._loop, self._sampler = build_rollout_loop(self._config, replica)

    @property
    def busy_seconds(self) -> float:
        """Time spent in the engine since the beginning."""
        return self._sampler.busy_seconds

    async def play(self, orders: Sequence[GroupOrder], on_group: Callable[[int, bytes], None]) -> None:
        """Play groups; ``on_group`` hears each as soon as it is complete."""

        async def play_one(order: GroupOrder) -> None:
            group = await self._loop.play_group(order)
            on_group(group.index, group.to_bytes())

        await gather_all(play_one(order) for order in orders)

    async def publish(self, version: int, weights: dict[str, Tensor]) -> str:
        return await self._sampler.update(version, weights)

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> list[float]:
        """Rewards on held-out problems ``first`` … ``first + count - 1``."""
        return [t.reward for t in await self._loop.evaluate(first, count, greedy=greedy)]

    async def close(self) -> None:
        await self._sampler.close()
