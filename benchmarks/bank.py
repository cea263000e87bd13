"""Two doubts about off-policy gradients, measured on frozen rollouts.

    python -m benchmarks.bank [--quick] [--json FILE] [--figure FILE.svg] [--tasks maze,collect] [--seeds 2]
                              [--section.field value ...]
    python -m benchmarks.bank --records FILE [FILE ...] [--figure FILE.svg]

Each task's small model is warm-started and trained with fresh rollouts (the recipe's method, vcpo, at lag 0),
and weights of chosen steps are kept. A situation (t, k) has many rollouts of the same new prompts, played by
the weights of step t − k and measured under those of step t: every trajectory's whole gradient vector, with
the length normalisation of the update. Inner products of these are all that is needed
(:mod:`benchmarks.group_moments`).

Baselines: what a group of G makes of its rewards, for each baseline, weighting and G, against the gradient g
that many rollouts with a known mean reward give under the same weights. Sums over prompts are divided by sums
over prompts, so that *one* scale is left out, as a learning rate can do it:

- scale: what ĝ has of g on average. 1 is unbiased; a group's mean gives 1 − 1/G;
- bias: ‖E ĝ − g‖ / ‖g‖, all of it;
- turn: the part of the bias across g, / (scale ‖g‖): what no learning rate takes back;
- variance: trace of the covariance of ĝ / ‖g‖²; rescaled: / scale², as if ĝ were scaled to project on g as g;
- noise: rescaled variance ÷ that of leave-one-out, with an interval over prompts;
- cosine: mean of cos(ĝ, gradient of the other rollouts of the bank), 0 where ĝ is 0;
- truth: E ĝ · g₀ / sqrt(E‖ĝ‖² ‖g₀‖²), with g₀ the gradient of the expected reward, from other rollouts of the
  policy of step t on the same prompts, without length normalisation: what weights, normalisation, baseline
  and variance leave together, whatever the scale; gain in truth: interval of the difference to leave-one-out.

All of it also with plain scores, for some G. The token-level baseline (OTB) is left out: it needs the vector
of every token.

ESS: for minibatches of 16 prompts × 8, the ESS ratio at three levels, truncated and not, against the measured
variance of the minibatch's gradient, prompts drawn too. Spearman correlations over all situations, with 95 %
bootstrap intervals over them, beside that of the lag itself.

``--quick`` has one step, few prompts and rollouts: enough to see it run. ``--records`` runs nothing: it
reports on what ``--json`` wrote.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bank_report import print_report, write_figure
from benchmarks.group_moments import (
    WEIGHTINGS,
    Bank,
    coefficients,
    members_of,
    moments,
    product_of_gradients,
    products,
    reference_coefficients,
)
from benchmarks.proxies import FULL, GROUP_SIZE, collect, recipe, snapshot, train
from benchmarks.rollout_bank import Measured, measure
from vcpo import ess_ratio
from vcpo.algorithms import Evidence, parts
from vcpo.algorithms.parts import Baseline, Importance
from vcpo.config import Config
from vcpo.estimators.baselines import optimal_baseline
from vcpo.estimators.importance import truncate
from vcpo.learner.learner import Learner
from vcpo.pipeline.build import build_learner, build_policy
from vcpo.policy.loading import Policy, hide_loading_bars
from vcpo.trajectory import Group
from vcpo.weights import Weights, load_weights

TASKS = "maze,collect"
MINIBATCH_PROMPTS = 16

Record = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is trained, played and drawn."""

    times: tuple[int, ...]
    """Steps t; baselines are compared at the last one."""
    lags: tuple[int, ...]
    baseline_lags: tuple[int, ...]
    group_sizes: tuple[int, ...]
    plain_group_sizes: tuple[int, ...]
    """For scores that are not length-normalised."""
    prompts: int
    members: int
    """Rollouts of a prompt where ESS is measured."""
    baseline_prompts: int
    baseline_members: int
    draws: int
    """Pairs of groups of a prompt."""
    minibatches: int
    """For which the ESS is found."""


DEFAULT = Scale(
    times=(64, 128),
    lags=(0, 2, 8, 32, 64),
    baseline_lags=(0, 8, 64),
    group_sizes=(2, 4, 8, 16, 32, 64),
    plain_group_sizes=(8, 64),
    prompts=16,
    members=64,
    baseline_prompts=16,
    baseline_members=192,
    draws=64,
    minibatches=100,
)
SMALL = Scale(
    times=(16,),
    lags=(0, 4, 16),
    baseline_lags=(0, 16),
    group_sizes=(2, 8, 32),
    plain_group_sizes=(8,),
    prompts=8,
    members=64,
    baseline_prompts=6,
    baseline_members=96,
    draws=32,
    minibatches=50,
)


class Workbench:
    """One trained run: its kept weights, and what is measured between them."""

    def __init__(self, task: str, seed: int, scale: Scale, overrides: Sequence[str]) -> None:
        self.task, self.seed, self.scale = task, seed, scale
        training = replace(FULL, steps=max(scale.times))
        self.config: Config = recipe(task, training, ["--run.seed", str(seed), *overrides])
        self.policy: Policy = build_policy(self.config)
        self.replica = copy.deepcopy(self.policy)
        self.learner: Learner = build_learner(self.config, self.policy)
        self.versions: dict[int, Weights] = {}

    async def train(self) -> None:
        kept = {t - k for t in self.scale.times for k in self.scale.lags}
        self.versions = await train(self.config, self.learner, self.replica, kept)

    async def measured(
        self, step: int, lag: int, prompts: int, members: int, skipped: int = 0
    ) -> list[Measured]:
        """Banks of ``prompts`` problems, always the same ones, without each one's first rollouts."""
        scale = replace(FULL, prompts=prompts, groups=members // GROUP_SIZE)
        played = await collect(self.config, self.replica, self.versions[step - lag], scale)
        load_weights(self.policy.model, self.versions[step])
        return [measure(self.policy, group[skipped:]) for group in played]

    async def ess_share(self) -> float:
        """Time of the ESS of 128 trajectories, from log-probabilities on, as a share of a learner's step."""
        policy = copy.deepcopy(self.policy)
        learner = build_learner(self.config, policy)
        scale = replace(FULL, prompts=MINIBATCH_PROMPTS, groups=1)
        played = await collect(self.config, self.replica, snapshot(policy), scale)
        groups = [Group(i, i, trajectories) for i, trajectories in enumerate(played)]
        steps = sorted(learner.step(groups)["seconds_training"] for _ in range(10))
        table = torch.zeros(GROUP_SIZE * MINIBATCH_PROMPTS, self.config.environment.max_turns)
        mask = torch.ones_like(table) > 0
        evidence = Evidence(table, table, mask, table[:, 0], torch.zeros(len(table), dtype=torch.long))
        begun = time.perf_counter()
        for _ in range(200):
            ess_ratio(parts.SEQUENCE.log_weights(evidence))
        return (time.perf_counter() - begun) / 200 / steps[len(steps) // 2]


# Baselines


def baseline_record(banks: Sequence[Measured], fresh: Sequence[Measured], scale: Scale) -> Record:
    """Every prompt's moments of every estimator; ``fresh``: other, on-policy rollouts of the same prompts."""
    return {"prompts": [prompt_record(*pair, scale) for pair in zip(banks, fresh, strict=True)]}


def prompt_record(measured: Measured, fresh: Measured, scale: Scale) -> Record:
    random = torch.Generator().manual_seed(0)
    bank, lengths = measured.bank, fresh.bank.lengths
    truth = measured.projected(fresh.gradient(all_coefficients(fresh.bank, lengths)))  # of plain scores
    record: Record = {
        **explanations(bank, truth, scale.draws, random),
        "distinct": len(measured.vectors),
        "truth_norm": product_of_gradients(fresh.bank, lengths, scale.draws, random),
        "norms": {},
        "moments": [],
    }
    for suffix, scored, along, sizes in (
        ("", bank, truth, scale.group_sizes),
        (", plain scores", bank.plain(), truth * bank.lengths, scale.plain_group_sizes),
    ):
        for weighting in WEIGHTINGS:
            norm = product_of_gradients(scored, weighting.known(bank), scale.draws, random)
            record["norms"][weighting.name + suffix] = norm
        record["moments"] += [
            {"size": size, "weights": weights + suffix, "baseline": baseline, **vars(found)}
            for size in sizes
            for (weights, baseline), found in moments(scored, size, scale.draws, random, along).items()
        ]
    return record


def all_coefficients(bank: Bank, weights: Tensor) -> Tensor:
    """[M] of the leave-one-out gradient of all rollouts."""
    inside = torch.ones(1, len(bank.kernel), dtype=torch.bool)
    return reference_coefficients(inside, weights, bank.rewards)[0]


def explanations(bank: Bank, truth: Tensor, draws: int, random: torch.Generator) -> Record:
    """How failures (rewards below the prompt's mean) differ from the others; sums, to be divided later.

    With truncated weights and the leave-one-out baseline of all rollouts, a failure's part of the variance is
    its ω² ‖u‖² (R − mean R)², and of the signal its ω (R − mean R) u · g.
    """
    evidence, rewards = bank.evidence, bank.rewards
    assert evidence.squared_score_norms is not None
    of_update = evidence.squared_score_norms.double()
    weights = WEIGHTINGS[0].known(bank)
    failed = rewards < rewards.mean()
    terms = (weights * (rewards - rewards.mean())).square() * of_update
    found: Record = {"reward": float(rewards.mean()), "failures": float(failed.double().mean())}
    found |= {"terms": float(terms.sum()), "failed_terms": float(terms[failed].sum())}
    found["failed_signal"] = product_of_gradients(bank, weights, draws, random, failed.double())
    along = all_coefficients(bank, weights) * truth
    found |= {"truth_signal": float(along.sum()), "failed_truth_signal": float(along[failed].sum())}
    found["optima"] = {
        weighting.name: float(
            optimal_baseline(rewards, weighting.known(bank).log(), of_update, evidence.groups)[0]
        )
        for weighting in WEIGHTINGS
    }
    if failed.any() and not failed.all():
        for name, values in (
            ("score", of_update * bank.lengths.square()),
            ("normalised_score", of_update),
            ("squared_weight", weights.square()),
        ):
            found[f"{name}_ratio"] = float(values[failed].mean() / values[~failed].mean())
    return found


# ESS


ESTIMATORS = {
    "untruncated, leave-one-out": (Importance(parts.SEQUENCE), parts.LEAVE_ONE_OUT),
    "truncated, leave-one-out": (WEIGHTINGS[0].importance, parts.LEAVE_ONE_OUT),
    "truncated, optimal": (WEIGHTINGS[0].importance, parts.OPTIMAL),
}


def ess_record(banks: Sequence[Measured], fresh: Sequence[Measured], scale: Scale) -> Record:
    """ESS ratios of minibatches, and the variance of the minibatch's gradient by each of ESTIMATORS."""
    random = torch.Generator().manual_seed(0)
    halves = [halves_of(m, *ESTIMATORS["truncated, leave-one-out"], scale.draws, random) for m in fresh]
    first, second = (torch.stack(part).mean(0) for part in zip(*halves, strict=True))
    return {
        "reward": float(torch.stack([m.bank.rewards for m in banks]).mean()),
        "true_norm": float(first @ second),
        "ess": ess_ratios([m.bank for m in banks], scale.minibatches, random),
        "estimators": {
            name: estimator_record(
                banks, None if banks is fresh else (first + second) / 2, *choice, scale.draws
            )
            for name, choice in ESTIMATORS.items()
        },
    }


def estimator_record(
    banks: Sequence[Measured], truth: Tensor | None, importance: Importance, baseline: Baseline, draws: int
) -> Record:
    """Of minibatches of P' independent groups g = Σ ĝ / P', each of a random prompt: trace of the covariance

        (mean over prompts of E‖ĝ‖² − ‖mean E ĝ‖²) / P'

    with the squared mean from two halves of the banks, and the mean's product with the true gradient
    (None: its own). Groups are of eight."""
    random = torch.Generator().manual_seed(1)
    seconds, halves = [], []
    for measured in banks:
        bank = measured.bank
        members = draw(len(bank.kernel), draws, random)
        drawn = members_of(bank.evidence, members)
        c = coefficients(drawn, members, len(bank.kernel), importance, baseline)
        seconds.append(float(products(c, bank.kernel, c).mean()))
        halves.append(halves_of(measured, importance, baseline, draws, random))
    first, second = (torch.stack(part).mean(0) for part in zip(*halves, strict=True))
    squared_mean = float(first @ second)
    return {
        "variance": (sum(seconds) / len(seconds) - squared_mean) / MINIBATCH_PROMPTS,
        "squared_mean": squared_mean,
        "along_truth": squared_mean if truth is None else float((first + second) @ truth) / 2,
    }


def draw(size: int, draws: int, random: torch.Generator) -> Tensor:
    """[draws, 8] groups, each of different rollouts."""
    return torch.stack([torch.randperm(size, generator=random)[:GROUP_SIZE] for _ in range(draws)])


def halves_of(
    measured: Measured, importance: Importance, baseline: Baseline, draws: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[P] the mean of ĝ over groups from each half of the bank: two independent estimates of E ĝ."""
    size = len(measured.bank.kernel)
    found = []
    for begin in (0, size // 2):
        members = begin + draw(size // 2, draws, random)
        drawn = members_of(measured.bank.evidence, members)
        found.append(measured.gradient(coefficients(drawn, members, size, importance, baseline).mean(0)))
    return found[0], found[1]


CEILINGS = {
    "token": (parts.TOKEN, 2.0),
    "sequence": (parts.SEQUENCE, 8.0),
    "geometric": (parts.GEOMETRIC, 2.0),
}
"""Levels, and the ceilings that tis-token, tis and tis-geometric put on their weights."""


def ess_ratios(banks: Sequence[Bank], minibatches: int, random: torch.Generator) -> dict[str, float]:
    """Mean ESS ratio of minibatches of 16 random prompts × 8, at each level, truncated and not."""
    sums = {f"{level}{kind}": 0.0 for level in CEILINGS for kind in ("", ", truncated")}
    for _ in range(minibatches):
        chosen = torch.randint(len(banks), (MINIBATCH_PROMPTS,), generator=random).tolist()
        drawn = [members_of(banks[p].evidence, draw(len(banks[p].kernel), 1, random)) for p in chosen]
        for name, (level, ceiling) in CEILINGS.items():
            values = torch.cat(
                [(level.log_weights(e)[e.mask] if level.per_token else level.log_weights(e)) for e in drawn]
            )
            sums[name] += float(ess_ratio(values)) / minibatches
            sums[f"{name}, truncated"] += float(ess_ratio(truncate(values, ceiling))) / minibatches
    return sums


# The command


async def records_of(bench: Workbench) -> list[Record]:
    """All situations of one run."""
    scale, begun = bench.scale, time.perf_counter()
    await bench.train()
    print(f"{bench.task}, seed {bench.seed}: trained after {time.perf_counter() - begun:.0f} s", flush=True)
    records: list[Record] = [{"kind": "time", "ess_share_of_step": await bench.ess_share()}]
    for step in scale.times:
        fresh: list[Measured] = []
        for lag in scale.lags:  # 0 comes first
            banks = await bench.measured(step, lag, scale.prompts, scale.members)
            fresh = banks if lag == 0 else fresh
            records.append({"kind": "ess", "step": step, "lag": lag, **ess_record(banks, fresh, scale)})
    step, members = scale.times[-1], scale.baseline_members
    fresh = []
    for lag in scale.baseline_lags:
        banks = await bench.measured(step, lag, scale.baseline_prompts, members)
        if lag == 0:  # the second half of the rollouts tells the true gradient
            fresh = await bench.measured(step, lag, scale.baseline_prompts, 2 * members, members)
        record = baseline_record(banks, fresh, scale)
        records.append({"kind": "baselines", "step": step, "lag": lag, **record})
    print(f"{bench.task}, seed {bench.seed}: measured after {time.perf_counter() - begun:.0f} s", flush=True)
    return [{"task": bench.task, "seed": bench.seed, **record} for record in records]


def run_all(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[Record]:
    """Every task and seed; the file of records is written after each."""
    scale = SMALL if arguments.quick else DEFAULT
    records: list[Record] = []
    for task in arguments.tasks.split(","):
        for seed in range(arguments.seeds or (1 if arguments.quick else 2)):
            records += asyncio.run(records_of(Workbench(task, seed, scale, overrides)))
            if arguments.json:
                arguments.json.write_text(json.dumps(records) + "\n")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one step, few prompts and rollouts")
    parser.add_argument("--json", type=Path, help="write the records to this file, after every run")
    parser.add_argument(
        "--records", type=Path, nargs="+", help="run nothing: report on these files of --json"
    )
    parser.add_argument("--figure", type=Path, help="write the figure to this file")
    parser.add_argument("--tasks", default=TASKS, help="recipes, by comma")
    parser.add_argument("--seeds", type=int, help="runs of each task (default 2; quick: 1)")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    warnings.filterwarnings("ignore", "There is a performance drop")  # vmap over attention: known and fine
    if arguments.records:
        records = [record for file in arguments.records for record in json.loads(file.read_text())]
    else:
        records = run_all(arguments, overrides)
    print_report(records)
    if arguments.figure:
        write_figure(records, arguments.figure)


if __name__ == "__main__":
    main()
