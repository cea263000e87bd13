"""``vcpo calibrate``: sampler and learner with the same weights, and what differs in what they say."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcpo import __version__
from vcpo.config import Config
from vcpo.errors import EnvironmentFailure
from vcpo.estimators.ess import ess_ratio
from vcpo.estimators.mismatch import (
    Estimate,
    Mismatch,
    ess_ratio_interval,
    expected_ess_ratio,
    measure_mismatch,
)
from vcpo.monitor.progress import Progress
from vcpo.pipeline.build import build_policy
from vcpo.pipeline.calibration import FORMAT, Calibration, calibrated_settings
from vcpo.pipeline.engines import check_engine
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.services import RolloutService
from vcpo.pipeline.session import WarmStartPhase
from vcpo.policy.loading import Policy, hide_loading_bars
from vcpo.policy.lora import with_adapters
from vcpo.policy.probe import make_probe
from vcpo.policy.scoring import Scorer
from vcpo.trajectory import Group
from vcpo.weights import weight_tensors

SHORTEST, LONGEST = 16, 16384
"""Response lengths that a calibration tells the ESS ratio of: each is twice the one before. They begin lower
where all sequences are shorter, and end with the context."""
FEWEST = 8
"""Sequences that an ESS ratio must be measured on to be told."""


def calibrate_inline(config: Config, groups: int, tokens: int | None, progress: Progress) -> Calibration:
    """Play ``groups`` training problems with the weights that a run begins with, and compare log-probs.

    Stops early when ``tokens`` were sampled. Everything is in this process (and in vLLM servers), and the
    sampler is given the learner's weights as at the beginning of a run.
    """
    config = _synchronous(config)
    check_engine(config)
    torch.set_num_threads(config.runtime.threads)
    hide_loading_bars()
    progress.phase("loading", None)
    policy = build_policy(config, WarmStartPhase(progress, config.warm_start.steps))
    with tempfile.TemporaryDirectory(prefix="vcpo-calibrate-") as folder:
        source = config.model.name or str(_saved(policy, Path(folder) / "model"))
        policy = with_adapters(policy, config.lora, config.run.seed)
        service = RolloutService(config)  # logs must outlive this folder: errors name them
        service.begin(source)
        played = asyncio.run(_play(config, service, policy, groups, tokens, progress))
    return calibration_of(config, policy, played, progress)


def _synchronous(config: Config) -> Config:
    """Weights pass as files, whatever a run will use: there is one sampler, in this process."""
    return config.model_copy(
        update={
            "pipeline": config.pipeline.model_copy(update={"mode": "exact"}),
            "sampler": config.sampler.model_copy(update={"transfer": "files"}),
        }
    )


def _saved(policy: Policy, folder: Path) -> Path:
    policy.save(folder)
    return folder


async def _play(
    config: Config,
    service: RolloutService,
    policy: Policy,
    groups: int,
    tokens: int | None,
    progress: Progress,
) -> list[Group]:
    """As many groups at once as a synchronous run plays, until there are enough."""
    played: list[Group] = []
    try:
        await service.ready()
        probe = None if config.sampler.kind == "local" else make_probe(policy)
        await service.publish(0, weight_tensors(policy.model), probe)
        progress.phase("sampling", groups)

        def on_group(number: int, record: bytes) -> None:
            played.append(Group.from_bytes(record))
            progress.advance({"reward": sum(played[-1].rewards) / len(played[-1].rewards)})

        while len(played) < groups and not (tokens and _sampled(played) >= tokens):
            last = min(groups, len(played) + config.pipeline.prompts)
            await service.play([GroupOrder(i, 0) for i in range(len(played), last)], on_group)
    finally:
        await service.close()
    return sorted(played, key=lambda group: group.index)


def _sampled(groups: Sequence[Group]) -> int:
    return sum(t.action_count for group in groups for t in group.trajectories)


def calibration_of(
    config: Config, policy: Policy, played: Sequence[Group], progress: Progress
) -> Calibration:
    """Score the rollouts of ``played`` by the policy that sampled them, and sum up."""
    members = [(group.index, t) for group in played for t in group.trajectories if t.action_count]
    if not members:
        notes = [t.note for group in played for t in group.trajectories]
        raise EnvironmentFailure(f"no token was sampled in {len(notes)} episodes; the first: {notes[0]}")
    budgets, temperature = config.learner, config.sampler.temperature
    scorer = Scorer(policy, budgets.token_budget, temperature=temperature, logit_budget=budgets.logit_budget)
    progress.phase("scoring", len(members))
    ratios, mask = scorer.log_ratios([t for _, t in members], lambda: progress.advance({}))
    mismatch = measure_mismatch(ratios, mask, torch.tensor([prompt for prompt, _ in members]))
    sampled = Sampled(
        ratios, mask, mismatch.sequence_rate, config.pipeline.prompts * config.pipeline.group_size
    )
    return Calibration(
        {
            "vcpo_calibration": FORMAT,
            "made": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "vcpo": __version__,
            "rate": mismatch.sequence_rate._asdict(),
            "per_token": _per_token(mismatch),
            "minibatch": sampled.minibatch,
            "whole": sampled.whole(),
            "lengths": [
                sampled.at_length(length) for length in _lengths(mismatch.longest, policy.context_length)
            ],
            "settings": calibrated_settings(config),
        }
    )


def _per_token(mismatch: Mismatch) -> dict[str, Any]:
    """The measurement, with named bounds."""
    fields = {name: getattr(mismatch, name) for name in vars(mismatch)}
    return {name: v._asdict() if isinstance(v, Estimate) else v for name, v in fields.items()}


def _lengths(longest: int, context_length: int) -> list[int]:
    powers = [2**n for n in range(LONGEST.bit_length())]
    begin = min(SHORTEST, max(power for power in powers if power <= longest))
    return [power for power in powers if begin <= power <= max(begin, context_length)]


@dataclass(frozen=True)
class Sampled:
    """What was sampled, and what the rate says of it: [B, T] log-ratios, sampled tokens first."""

    ratios: Tensor
    mask: Tensor
    rate: Estimate
    minibatch: int
    """Trajectories of one step of the recipe."""

    def whole(self) -> dict[str, Any]:
        """The ESS ratio of all sequences, measured and by the rate."""
        return self._measured(self.ratios.sum(-1), self.mask.sum(-1))

    def at_length(self, length: int) -> dict[str, Any]:
        """ESS ratios at one response length: by the rate in a minibatch of the recipe and in an endless one;
        measured on the first ``length`` tokens of the sequences that have as many, if there are some."""
        of_minibatch = {
            name: expected_ess_ratio(torch.full((self.minibatch,), rate * length))
            for name, rate in (("value", self.rate.value), ("low", self.rate.high), ("high", self.rate.low))
        }
        figures = {
            "length": length,
            "endless": math.exp(-self.rate.value * length),
            "in_minibatch": of_minibatch,
        }
        long = self.mask.sum(-1) >= length
        if long.sum() < FEWEST:
            return figures
        prefixes = self.ratios[long, :length].sum(-1)
        return figures | self._measured(prefixes, torch.full_like(prefixes, length))

    def _measured(self, log_weights: Tensor, lengths: Tensor) -> dict[str, Any]:
        variances = self.rate.value * lengths.double()
        low, high = ess_ratio_interval(variances)
        return {
            "sequences": len(log_weights),
            "measured": float(ess_ratio(log_weights)),
            "expected": {"value": expected_ess_ratio(variances), "low": low, "high": high},
        }
