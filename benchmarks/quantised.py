"""What fewer bits in the sampler cost: log-ratios and ESS at lag 0, with the learner's weights in float32.

    python -m benchmarks.quantised [--quick] [--json FILE] [--tasks maze,countdown]
                                  [--section.field value ...]

Each recipe's small model is warm-started and trained synchronously by the recipe's own algorithm, with the
sampler at full precision. Then samplers that make other things of these weights
(:mod:`vcpo.samplers.rounding`) play the same new problems, 8 rollouts of each, and the learner's log-probs of
their tokens are taken under the weights that were published: no lag, so all that the importance weights tell
is the sampler's rounding.

- log-ratio: root mean square over sampled tokens of log π − log μ, in nats;
- ESS ratio: of the sequence weights, over minibatches of the recipe's size, mean and lowest; ``of 256`` the
  same over 256 rollouts, the lowest of fewer;
- accuracy: of these rollouts, with its 95 % interval;
- rounding: seconds that one update takes in the sampler, median of 5, the float32 copy included.

``adapters``: the same with LoRA of rank 8 on every linear layer but the head: the base is rounded, the
adapters are not. ``--quick`` trains less, on fewer rollouts of the maze: enough to see it run.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vcpo import ess_ratio
from vcpo.config import Config, load_config
from vcpo.monitor.statistics import wilson_interval
from vcpo.pipeline.build import build_learner, build_policy, build_rollout_loop
from vcpo.pipeline.evaluation import is_success
from vcpo.pipeline.rollout import GroupOrder
from vcpo.policy.loading import Policy, hide_loading_bars
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.lora import with_adapters
from vcpo.policy.packing import pack
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Trajectory
from vcpo.weights import Weights, weight_tensors

TASKS = "maze,countdown"
FIRST_PROBLEM = 1_000_000
"""Number of the first problem to measure on, far from those that are trained on."""
GROUP_SIZE = 8
MANY = 256
SAMPLERS: dict[str, dict[str, str]] = {
    "none": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int4 + bfloat16": {"quantization": "int4", "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Scale:
    """How much is trained and collected."""

    steps: int
    problems: int


FULL = Scale(steps=60, problems=128)
QUICK = Scale(steps=3, problems=32)


@dataclass(frozen=True)
class Row:
    """One sampler on one policy."""

    task: str
    trained: str
    sampler: str
    log_ratio_rms: float
    """Nats, over tokens."""
    ess_ratio: float
    """Mean over minibatches."""
    ess_ratio_lowest: float
    ess_ratio_of_many: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    tokens: float
    """Sampled tokens of a rollout."""
    rounding_seconds: float


def recipe(task: str, scale: Scale, rank: int, overrides: Sequence[str]) -> Config:
    settings: dict[str, Any] = {"runtime.threads": 1, "pipeline.lag": 0, "pipeline.steps": scale.steps}
    settings |= {"pipeline.group_size": GROUP_SIZE, "lora.rank": rank, "lora.alpha": 2 * rank or 1}
    if scale is QUICK:
        settings["warm_start.steps"] = 100
    return load_config(task, [*(f"--{k}={v}" for k, v in settings.items()), *overrides])


async def train(config: Config, policy: Policy) -> None:
    """Synchronous steps with fresh rollouts of a full-precision sampler."""
    learner = build_learner(config, policy)
    replica = copy.deepcopy(policy)
    sampler = LocalSampler(replica.model, replica.context_length, config.sampler)
    loop = build_rollout_loop(config, replica, sampler)
    prompts = config.pipeline.prompts
    for version in range(config.pipeline.steps):
        orders = [GroupOrder(prompts * version + i, version) for i in range(prompts)]
        learner.step(await loop.play_groups(orders))
        await sampler.update(learner.version, weight_tensors(policy.model))
    await sampler.close()


async def play(
    config: Config, replica: Policy, weights: Weights, problems: int
) -> tuple[list[Trajectory], float]:
    """Rollouts under ``weights`` as this sampler serves them; seconds that an update takes."""
    sampler = LocalSampler(replica.model, replica.context_length, config.sampler)
    loop = build_rollout_loop(config, replica, sampler)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        await sampler.update(0, weights)
        seconds.append(time.perf_counter() - begun)
    played = await loop.play_groups([GroupOrder(FIRST_PROBLEM + i, 0) for i in range(problems)])
    await sampler.close()
    return [t for group in played for t in group.trajectories], statistics.median(seconds)


@torch.no_grad()
def log_ratios(policy: Policy, trajectories: Sequence[Trajectory], temperature: float) -> list[Tensor]:
    """log π − log μ of the sampled tokens of each trajectory, float64."""
    found: list[Tensor] = []
    for begin in range(0, len(trajectories), MANY):
        part = trajectories[begin : begin + MANY]
        rows = pack(part)
        by_token = sampled_log_probs(policy.model, rows, temperature).double()
        recorded = np.concatenate([t.log_probs[t.action_mask] for t in part])
        counts = [int(t.action_mask.sum()) for t in part]
        found += (by_token - torch.from_numpy(recorded).double()).split(counts)
    return found


def ess_ratios(log_weights: Tensor, size: int) -> list[float]:
    """Of whole minibatches, in the order they were played."""
    return [float(ess_ratio(part)) for part in log_weights.split(size) if len(part) == size]


async def measure(config: Config, trained: str, name: str, policy: Policy, problems: int) -> Row:
    sampler = config.sampler.model_copy(update=SAMPLERS[name])
    replica = copy.deepcopy(policy)
    weights = weight_tensors(policy.model)
    changed = config.model_copy(update={"sampler": sampler})
    trajectories, seconds = await play(changed, replica, weights, problems)
    ratios = log_ratios(policy, trajectories, sampler.temperature)
    log_weights = torch.stack([r.sum() for r in ratios])
    batches = ess_ratios(log_weights, config.pipeline.prompts * GROUP_SIZE)
    wins = sum(is_success(t.reward) for t in trajectories)
    return Row(
        task=config.environment.kind,
        trained=trained,
        sampler=name,
        log_ratio_rms=float(torch.cat(ratios).square().mean().sqrt()),
        ess_ratio=statistics.mean(batches),
        ess_ratio_lowest=min(batches),
        ess_ratio_of_many=min(ess_ratios(log_weights, MANY)),
        accuracy=wins / len(trajectories),
        accuracy_interval=wilson_interval(wins, len(trajectories)),
        tokens=sum(map(len, ratios)) / len(ratios),
        rounding_seconds=seconds,
    )


def rows_of(task: str, rank: int, scale: Scale, overrides: Sequence[str]) -> list[Row]:
    config = recipe(task, scale, rank, overrides)
    policy = with_adapters(build_policy(config), config.lora, config.run.seed)
    begun = time.perf_counter()
    asyncio.run(train(config, policy))
    trained = "adapters" if rank else "all"
    print(f"{task}, {trained}: trained in {time.perf_counter() - begun:.0f} s", flush=True)
    return [asyncio.run(measure(config, trained, name, policy, scale.problems)) for name in SAMPLERS]


def show(rows: Sequence[Row]) -> None:
    table = Table("task", "trained", "sampler", "log-ratio", "ESS ratio (lowest)", "of 256", "accuracy",
                  "tokens", "rounding")  # fmt: skip
    for row in rows:
        low, high = row.accuracy_interval
        table.add_row(
            row.task,
            row.trained,
            row.sampler,
            f"{row.log_ratio_rms:.2g}",
            f"{row.ess_ratio:.4f} ({row.ess_ratio_lowest:.4f})",
            f"{row.ess_ratio_of_many:.4f}",
            f"{row.accuracy:.3f} ({low:.3f} to {high:.3f})",
            f"{row.tokens:.1f}",
            f"{1000 * row.rounding_seconds:.2g} ms",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--tasks", help=f"recipes, default {TASKS}, quick: maze")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    scale = QUICK if arguments.quick else FULL
    rows: list[Row] = []
    for task in (arguments.tasks or ("maze" if arguments.quick else TASKS)).split(","):
        for rank in (0, 8):
            rows += rows_of(task, rank, scale, overrides)
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
