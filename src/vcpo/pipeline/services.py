"""The two workers of a run, without a word about where they live: a runtime puts each in a process.

Groups travel as bytes (:meth:`vcpo.trajectory.Group.to_bytes`), so that the controller between the two
never unpacks a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vcpo.config import Config, ModelConfig
from vcpo.learner.checkpoint import latest_checkpoint, load_checkpoint, read_part, save_checkpoint
from vcpo.learner.learner import Learner
from vcpo.learner.ranks import ALONE, Ranks
from vcpo.learner.sharding import whole, whole_tensors
from vcpo.pipeline.build import (
    WarmStartListener,
    algorithm_of,
    build_learner,
    build_policy,
    build_rollout_loop,
)
from vcpo.pipeline.dynamic_sampling import dynamic_sampling
from vcpo.pipeline.engines import ENGINES, Share
from vcpo.pipeline.ports import Begun, Outcome, Rewards
from vcpo.pipeline.rollout import GroupOrder, RolloutLoop
from vcpo.pipeline.selection import Selector
from vcpo.policy.loading import Policy, load_policy
from vcpo.policy.lora import merged, with_adapters
from vcpo.policy.probe import make_probe
from vcpo.samplers.protocol import Sampler
from vcpo.samplers.rounding import Rounding
from vcpo.samplers.tasks import gather_all
from vcpo.trajectory import Group
from vcpo.weights import Probe, Weights, checksum, load_weights, weight_tensors, write_adapter

TEACHER = "teacher"
"""Its part of a checkpoint."""


class LearnerService:
    """Owns the policy being trained."""

    def __init__(self, config: Config, run_folder: Path) -> None:
        self._config, self._run_folder = config, run_folder
        self._made: Policy | None = None
        """The initial model, if it was made here."""
        self._ranks = ALONE
        self._policy: Policy
        self._learner: Learner
        self._selector: Selector | None = None
        """Chooses problems where the config asks for it."""
        self._rounding: Rounding | None = None
        """What the local sampler makes of the weights."""

    def prepare(self, *, resume: bool, listener: WarmStartListener = lambda loss: None) -> None:
        """Make the model of a recipe that names none, and write it down: the first rank does so alone, before
        the others are asked to begin."""
        algorithm_of(self._config)  # a wrong name is told before the warm start, not after
        if self._config.model.name or (resume and self._initial.exists()):
            return
        self._made = build_policy(self._config, listener)
        self._save_whole(self._made, self._initial)

    def begin(
        self, *, resume: bool, listener: WarmStartListener = lambda loss: None, ranks: Ranks = ALONE
    ) -> Begun:
        """Be ready for steps. Ranks that share the learner all do everything that is asked of it from here
        on, with the same arguments; the first one writes files."""
        if not ranks.several:
            self.prepare(resume=resume, listener=listener)
        self._ranks = ranks
        policy = load_policy(self._source, self._settings(ranks)) if self._made is None else self._made
        self._policy = with_adapters(policy, self._config.lora, self._config.run.seed)
        if self._config.sampler.kind == "local":
            self._rounding = Rounding(self._policy.model, self._config.sampler)
        self._learner = build_learner(self._config, self._policy, self._run_folder, ranks)
        if self._config.pipeline.selection != "all":
            self._selector = Selector(self._config, self._policy)
        checkpoint = latest_checkpoint(self._run_folder) if resume else None
        state = load_checkpoint(checkpoint, self._learner) if checkpoint else {}
        if checkpoint and self._selector is not None:
            self._selector.teacher.load_state(read_part(checkpoint, TEACHER))
        parameters = sum(p.numel() for p in self._policy.model.parameters())
        position, sifts = state.get("position", {}), dynamic_sampling(self._config)
        return Begun(self._learner.version, self._source, position, parameters, sifts)

    def _settings(self, ranks: Ranks) -> ModelConfig:
        """Ranks shard the model on its way from the CPU to their devices: it need not fit one of them."""
        model = self._config.model
        return model.model_copy(update={"device": "cpu"}) if ranks.several else model

    @property
    def _initial(self) -> Path:
        return self._run_folder / "initial_model"

    @property
    def _source(self) -> str:
        return self._config.model.name or str(self._initial)

    def _save_whole(self, policy: Policy, folder: Path) -> None:
        """Save so that a run killed meanwhile leaves the whole folder or none of it."""
        partial = folder.with_name(f".partial-{folder.name}")
        policy.save(partial)
        partial.rename(folder)

    def step(self, records: Sequence[bytes], skipped: Sequence[Outcome] = ()) -> dict[str, Any]:
        """Train on groups; a teacher hears of those that were ``skipped`` too."""
        groups = [Group.from_bytes(record) for record in records]
        metrics = self._learner.step(groups)
        if self._selector is None:
            return metrics
        trained = [(group.problem, sum(group.rewards) / len(group.rewards)) for group in groups]
        return metrics | self._selector.learn([*trained, *skipped])

    def choose(self, numbers: Sequence[int]) -> list[int]:
        """Which problem of the training stream each of the groups plays."""
        return list(numbers) if self._selector is None else self._selector.choose(numbers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights by name, in order, whole: live, not copied, or gathered one at a time."""
        for name, tensor in sorted(weight_tensors(self._policy.model).items()):
            yield name, whole(tensor)

    def weights(self) -> tuple[int, dict[str, Tensor], str]:
        """Version, tensors (live, not copied, or gathered on the first rank) and the checksum that samplers
        must answer with: of what they serve, which is rounded where their settings say so; vLLM's answer
        with that of what they took."""
        tensors = whole_tensors(weight_tensors(self._policy.model), self._ranks)
        if not self._ranks.first:
            return self._learner.version, {}, ""
        served = self._rounding.of_published(tensors) if self._rounding is not None else tensors
        return self._learner.version, tensors, checksum(served)

    def probe(self) -> Probe | None:
        """What samplers that serve these weights must say; None if they prove it by a checksum."""
        return None if self._config.sampler.kind == "local" else make_probe(self._policy)

    def checkpoint(self, position: dict[str, Any]) -> None:
        parts = {} if self._selector is None else {TEACHER: self._selector.teacher.state()}
        save_checkpoint(self._run_folder, self._learner, {"position": position}, parts)

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format, adapters merged, and ``adapter`` beside it as PEFT does."""
        tensors = whole_tensors(weight_tensors(self._policy.model), self._ranks)
        if not self._ranks.first:
            return
        merged(self._whole_policy(tensors)).save(folder)
        if self._config.lora.rank:
            write_adapter(folder.with_name("adapter"), self._config.lora, tensors, self._source)

    def _whole_policy(self, tensors: Mapping[str, Tensor]) -> Policy:
        """The policy; of a sharded one a copy with these tensors, on the CPU."""
        if not self._ranks.several:
            return self._policy
        policy = load_policy(self._source, self._settings(self._ranks))
        policy = with_adapters(policy, self._config.lora, self._config.run.seed)
        load_weights(policy.model, tensors)
        return policy


class RolloutService:
    """Owns a sampler with a replica of the policy, and the environment that plays with it."""

    def __init__(self, config: Config, share: Share | None = None) -> None:
        self._config, self._share = config, share or Share()
        self._loop: RolloutLoop
        self._sampler: Sampler

    def begin(self, policy: str | Policy) -> None:
        """Load the policy from where the learner says, or take a copy of one in this process."""
        engine = ENGINES[self._config.sampler.kind]
        speaker, self._sampler = engine(self._config, policy, self._share)
        self._loop = build_rollout_loop(self._config, speaker, self._sampler)

    async def ready(self) -> None:
        """Return when the engine can generate."""
        await self._sampler.ready()

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

    async def ranks(self) -> int:
        """How many ranks of a broadcast the engine's workers take."""
        return sum(await self._sampler.ranks())

    async def meet(self, address: str, port: int, offset: int, world_size: int) -> None:
        """Join the learner's broadcast."""
        await self._sampler.meet(address, port, offset, world_size)

    async def publish(self, version: int, weights: Weights, probe: Probe | None = None) -> str:
        return await self._sampler.update(version, weights, probe)

    async def evaluate(self, first: int, count: int, *, greedy: bool) -> Rewards:
        """Rewards on held-out problems ``first`` … ``first + count - 1``."""
        played = await self._loop.evaluate(first, count, greedy=greedy)
        return [None if t.outcome == "failed" else t.reward for t in played]

    async def close(self) -> None:
        await self._sampler.close()
