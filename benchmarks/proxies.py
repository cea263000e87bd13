"""Do cheaper figures stand in for the score norm? Proxies against exact norms on real rollouts.

    python -m benchmarks.proxies [--quick] [--json FILE] [--tasks maze,sort,countdown]
                                [--columns R] [--section.field value ...]

Each recipe's small model is warm-started and trained synchronously by the recipe's own algorithm. Then 64
rollouts of each of 32 new problems are collected in four situations: by the warm-started policy and by the
trained one, measured under the policy that played them; and by the policies of 16 and 64 steps before the
end, measured under the trained one. Norms are of n_i ∇log π with the algorithm's own normalisers.

For each stand-in q of the exact squared norm x, with 95 % bootstrap intervals over problems:

- rank: Spearman's correlation of q and x, over all rollouts;
- in prompt: the same within the different rollouts of one prompt, mean over prompts that have at least 8
  (none if fewer than 5 prompts do); a stand-in that is the same for all of them counts 0;
- log-log R²: squared correlation of log q and log x, over all rollouts;
- baseline off by: rms difference of the optimal baselines made with q and with x, truncated importance
  weights included, over the 8 groups of 8 of each prompt, divided by the sampling deviation of the exact
  one: its standard deviation over groups of one prompt.

``sketched`` projects every layer, where the method of that name finds norms of the shortest rollouts exactly,
with R signs a side, redrawn for each prompt. ``weights only`` puts 1 for the norm; ``group mean`` drops the
importance weights too. ``--quick`` trains less, on fewer rollouts: enough to see it run. Settings override
the recipes': ``--model.hidden_size 256``.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vcpo import ess_ratio, group_mean, log_importance_weights, optimal_baseline
from vcpo.algorithms import Algorithm, Evidence
from vcpo.config import Config, load_config
from vcpo.learner.learner import Learner
from vcpo.pipeline.build import build_learner, build_policy, build_rollout_loop
from vcpo.pipeline.rollout import GroupOrder
from vcpo.policy.loading import Policy, hide_loading_bars
from vcpo.policy.packing import PackedRows, pack
from vcpo.samplers.local import LocalSampler
from vcpo.scores import ScoreTape
from vcpo.scores.choice import METHODS
from vcpo.scores.proxies import logit_energies, token_counts
from vcpo.trajectory import Trajectory
from vcpo.weights import Weights, load_weights, weight_tensors

TASKS = "maze,sort,countdown"
GROUP_SIZE = 8
FIRST_PROBLEM = 1_000_000
"""Number of the first problem to measure on, far from those that are trained on."""
FEWEST = 8
"""Different rollouts that a prompt must have for a rank correlation within it."""
FEWEST_PROMPTS = 5
"""Such prompts that a mean must be of."""
EXACT, WEIGHTS_ONLY, GROUP_MEAN = "exact", "weights only", "group mean"
WITHOUT_NORM = (WEIGHTS_ONLY, GROUP_MEAN)


@dataclass(frozen=True)
class Scale:
    """How much is trained and collected."""

    steps: int
    lags: tuple[int, ...]
    prompts: int
    groups: int
    """Groups of each prompt."""
    resamplings: int


FULL = Scale(steps=300, lags=(16, 64), prompts=32, groups=8, resamplings=400)
QUICK = Scale(steps=10, lags=(4, 8), prompts=8, groups=4, resamplings=50)


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of one situation; [P, M] has M rollouts of each of P prompts, whole groups side by side."""

    rewards: Tensor
    """[P, M]."""
    lengths: Tensor
    """[P, M] sampled tokens."""
    log_weights: Tensor
    """[P, M], not truncated."""
    used_log_weights: Tensor
    """[P, M], truncated as the algorithm does."""
    different: np.ndarray
    """[P, M] bool: true at the first of several equal rollouts of a prompt."""
    norms: dict[str, Tensor]
    """[P, M] squared norms: the exact ones, and each stand-in's."""


@dataclass(frozen=True)
class Figure:
    """A statistic with its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.2f} to {self.high:.2f})"


# Rollouts


def recipe(task: str, scale: Scale, overrides: list[str]) -> Config:
    """The task's recipe in one thread; a quick run also shortens the warm start."""
    settings: dict[str, Any] = {"runtime.threads": 1, "pipeline.lag": 0, "pipeline.steps": scale.steps}
    if scale is QUICK:
        settings["warm_start.steps"] = 100
    given = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return load_config(task, [*given, *overrides])


async def train(config: Config, learner: Learner, replica: Policy, kept: Iterable[int]) -> dict[int, Weights]:
    """Train with fresh rollouts only; the weights of the versions to keep."""
    sampler = LocalSampler(replica.model, replica.context_length, config.sampler)
    loop = build_rollout_loop(config, replica, sampler)
    prompts, snapshots = config.pipeline.prompts, {0: snapshot(learner.policy)}
    for version in range(config.pipeline.steps):
        orders = [GroupOrder(prompts * version + i, version) for i in range(prompts)]
        learner.step(await loop.play_groups(orders))
        await sampler.update(learner.version, weight_tensors(learner.policy.model))
        if learner.version in kept:
            snapshots[learner.version] = snapshot(learner.policy)
    await sampler.close()
    return snapshots


def snapshot(policy: Policy) -> Weights:
    return {name: tensor.clone() for name, tensor in weight_tensors(policy.model).items()}


async def collect(
    config: Config, replica: Policy, weights: Weights, scale: Scale
) -> list[tuple[Trajectory, ...]]:
    """All rollouts of each problem under ``weights``; every situation plays the same problems."""
    members = GROUP_SIZE * scale.groups
    whole = config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"group_size": members})})
    sampler = LocalSampler(replica.model, replica.context_length, whole.sampler)
    loop = build_rollout_loop(whole, replica, sampler)
    await sampler.update(0, weights)
    orders = [GroupOrder(FIRST_PROBLEM + i, 0) for i in range(scale.prompts)]
    played = await loop.play_groups(orders)
    await sampler.close()
    return [group.trajectories for group in played]


# Norms


class Meter:
    """Measures rollouts under a model: exact norms, stand-ins, importance weights."""

    def __init__(self, policy: Policy, algorithm: Algorithm, columns: int) -> None:
        self._policy, self._algorithm = policy, algorithm
        everywhere = replace(METHODS["sketched"], columns=columns, ghost_up_to=0, sketched_below=math.inf)
        self._tapes = {
            EXACT: ScoreTape(policy.model, method="exact"),
            "last layer": ScoreTape(policy.model, method="exact", only=["lm_head"]),
            "sketched": ScoreTape(policy.model, method=everywhere),
        }

    def measure(self, played: list[tuple[Trajectory, ...]]) -> Rollouts:
        """Each prompt's rollouts in a forward pass of their own."""
        rewards = torch.tensor([[t.reward for t in group] for group in played])
        lengths = torch.tensor([[t.action_count for t in group] for group in played])
        normalisers = self._algorithm.normalisers(lengths.flatten()).view_as(rewards)
        norms, weights = [], []
        for seed, (group, factors) in enumerate(zip(played, normalisers, strict=True)):
            rows = pack(group)
            norms.append(self._norms(rows, factors, seed))
            weights.append(self._log_weights(group, rows, rewards[seed]))
        raw, used = (torch.stack(part) for part in zip(*weights, strict=True))
        joined = {name: torch.stack([part[name] for part in norms]) for name in norms[0]}
        return Rollouts(rewards, lengths, raw, used, first_of_equals(played), joined)

    def _norms(self, rows: PackedRows, normalisers: Tensor, seed: int) -> dict[str, Tensor]:
        norms = {}
        for name, tape in self._tapes.items():
            tape.seed = seed
            with tape:
                logits, chosen = sampled_logits(self._policy, rows)
            objective = (normalisers[rows.action_owners] * log_probs_of(logits, chosen)).sum()
            norms[name] = tape.squared_norms(objective, rows.segments, rows.count)
        with torch.no_grad():
            logits, chosen = sampled_logits(self._policy, rows)
        norms["logit energy"] = logit_energies(logits, chosen, rows.action_owners, rows.count, normalisers)
        norms["length"] = token_counts(rows.action_owners, rows.count, normalisers)
        return norms | {name: torch.ones(rows.count) for name in WITHOUT_NORM}

    @torch.no_grad()
    def _log_weights(
        self, group: tuple[Trajectory, ...], rows: PackedRows, rewards: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log importance weights of the rollouts: as they are, and as the algorithm truncates them."""
        recorded = torch.from_numpy(np.concatenate([t.log_probs[t.action_mask] for t in group]))
        evidence = Evidence(
            log_probs=rows.spread(log_probs_of(*sampled_logits(self._policy, rows))),
            behaviour_log_probs=rows.spread(recorded),
            mask=rows.spread(torch.ones_like(recorded)) > 0,
            rewards=rewards,
            groups=torch.zeros(rows.count, dtype=torch.long),
        )
        used, _ = self._algorithm.importance(evidence)
        return log_importance_weights(evidence.log_probs, evidence.behaviour_log_probs, evidence.mask), used


def sampled_logits(policy: Policy, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """[N, V] logits of the sampled tokens, and [N] the tokens."""
    out = policy.model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False)
    before = out.logits[rows.action_rows, rows.action_columns - 1]
    return before, rows.input_ids[rows.action_rows, rows.action_columns]


def log_probs_of(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


def first_of_equals(played: list[tuple[Trajectory, ...]]) -> np.ndarray:
    """[P, M] bool: which rollouts equal no earlier one of their prompt."""
    rows = []
    for group in played:
        tokens = [t.tokens.tobytes() for t in group]
        rows.append([text not in tokens[:i] for i, text in enumerate(tokens)])
    return np.array(rows)


# Statistics


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[place]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 if either is the same everywhere: it then says nothing about the other."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return correlation(ranks(a), ranks(b))


def bootstrap(statistic: Callable[[np.ndarray], float], prompts: int, resamplings: int) -> Figure:
    """The statistic of all prompts, and its interval over prompts drawn with replacement."""
    random = np.random.default_rng(0)
    drawn = [statistic(random.integers(prompts, size=prompts)) for _ in range(resamplings)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Figure(statistic(np.arange(prompts)), float(low), float(high))


def baselines(rollouts: Rollouts, name: str) -> np.ndarray:
    """[P, K] the baseline of each group, made with the norms of ``name``."""
    groups = torch.arange(rollouts.rewards.numel()) // GROUP_SIZE
    rewards = rollouts.rewards.flatten()
    if name == GROUP_MEAN:
        values = group_mean(rewards, groups)
    else:
        norms = rollouts.norms[name].flatten()
        values = optimal_baseline(rewards, rollouts.used_log_weights.flatten(), norms, groups)
    return values[::GROUP_SIZE].view(len(rollouts.rewards), -1).double().numpy()


def comparison(rollouts: Rollouts, name: str, resamplings: int) -> dict[str, Figure]:
    """The stand-in ``name`` against the exact norm: the columns of the table that it has."""
    exact, norms = (rollouts.norms[n].double().numpy() for n in (EXACT, name))
    optimum = baselines(rollouts, EXACT)
    errors = ((baselines(rollouts, name) - optimum) ** 2).mean(1)
    variances = optimum.var(1, ddof=1)
    figure = partial(bootstrap, prompts=len(exact), resamplings=resamplings)
    figures = {"baseline": figure(lambda rows: float(np.sqrt(errors[rows].sum() / variances[rows].sum())))}
    if name in WITHOUT_NORM:
        return figures
    figures["rank"] = figure(lambda rows: spearman(exact[rows].ravel(), norms[rows].ravel()))
    figures["r_squared"] = figure(lambda rows: log_r_squared(exact[rows].ravel(), norms[rows].ravel()))
    within = [
        spearman(x[d], q[d])
        for x, q, d in zip(exact, norms, rollouts.different, strict=True)
        if d.sum() >= FEWEST
    ]
    if len(within) >= FEWEST_PROMPTS:
        correlations = np.array(within)
        figures["in_prompt"] = bootstrap(lambda rows: correlations[rows].mean(), len(within), resamplings)
    return figures


def log_r_squared(a: np.ndarray, b: np.ndarray) -> float:
    """Rollouts without a gradient have no logarithm and are left out."""
    kept = (a > 0) & (b > 0)
    return correlation(np.log(a[kept]), np.log(b[kept])) ** 2


# Report


async def situations(config: Config, scale: Scale, columns: int) -> list[dict[str, Any]]:
    """One record a situation of the task."""
    task = config.environment.kind
    begun = time.perf_counter()
    policy = build_policy(config)
    replica = copy.deepcopy(policy)
    learner = build_learner(config, policy)
    last = config.pipeline.steps
    versions = await train(config, learner, replica, {last, *(last - lag for lag in scale.lags)})
    print(f"{task}: trained in {time.perf_counter() - begun:.0f} s", flush=True)
    meter = Meter(policy, learner.algorithm, columns)
    records = []
    for name, played_by, measured_under in (
        ("fresh, warm start", 0, 0),
        ("fresh, trained", last, last),
        *((f"{lag} steps old", last - lag, last) for lag in scale.lags),
    ):
        played = await collect(config, replica, versions[played_by], scale)
        load_weights(policy.model, versions[measured_under])
        records.append({"task": task, "situation": name, **described(meter.measure(played), scale)})
        print_record(records[-1])
    return records


def described(rollouts: Rollouts, scale: Scale) -> dict[str, Any]:
    """What the rollouts are like, and how each stand-in does on them."""
    optimum = baselines(rollouts, EXACT)
    return {
        "reward": float(rollouts.rewards.mean()),
        "length": float(rollouts.lengths.float().mean()),
        "ess_ratio": float(ess_ratio(rollouts.log_weights.flatten())),
        "prompts": len(rollouts.rewards),
        "prompts_with_enough_different": int((rollouts.different.sum(1) >= FEWEST).sum()),
        "baseline": float(optimum.mean()),
        "baseline_deviation": float(np.sqrt(optimum.var(1, ddof=1).mean())),
        "proxies": {
            name: {key: asdict(figure) for key, figure in figures.items()}
            for name in rollouts.norms
            if name != EXACT and (figures := comparison(rollouts, name, scale.resamplings))
        },
    }


def print_record(record: dict[str, Any]) -> None:
    title = (
        f"{record['task']}, {record['situation']}: reward {record['reward']:.2f}, "
        f"{record['length']:.1f} tokens, ESS ratio {record['ess_ratio']:.2f},\n"
        f"optimal baseline {record['baseline']:.3f} ± {record['baseline_deviation']:.3f} within a prompt, "
        f"{record['prompts_with_enough_different']} of {record['prompts']} prompts with {FEWEST} different"
    )
    headings = ("stand-in", "rank", "in prompt", "log-log R²", "baseline off by")
    table = Table(*headings, title=title, title_justify="left")
    for name, figures in record["proxies"].items():
        cells = [
            str(Figure(**figures[key])) if key in figures else "–"
            for key in ("rank", "in_prompt", "r_squared")
        ]
        table.add_row(name, *cells, str(Figure(**figures["baseline"])))
    Console(width=118).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little training, few rollouts")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--tasks", default=TASKS, help="recipes, by comma")
    columns = METHODS["sketched"].columns
    parser.add_argument("--columns", type=int, default=columns, help="of the sketch's random projections")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    scale = QUICK if arguments.quick else FULL
    configs = [recipe(task, scale, overrides) for task in arguments.tasks.split(",")]
    records = [
        record for config in configs for record in asyncio.run(situations(config, scale, arguments.columns))
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
