"""What choosing the data is worth: dynamic sampling, goldilocks selection, over-provision, masking.

    python -m benchmarks.data_side [--quick] [--json FILE] [--folder FOLDER] [--seeds N] [--repetitions N]

**Accuracy at equal rollout tokens**: ``recipes/maze.toml`` with grpo in exact mode at lag 0, once a way and
seed. Tokens are those of all groups that were played, skipped ones too; accuracies are read at quarters
of the smallest total, each from the last evaluation that had cost no more. A teacher's work is no rollout.

**Rollout throughput with long-tailed lengths** (``benchmarks/long_tail.py``) at lag 0 in one process: tokens
trained on a second of waiting for rollouts, and a second of the whole loop; plain and over-provisioned runs
in turn, ratios of neighbours.

A run that is in FOLDER already is not repeated. ``--quick`` is enough to see it run, not to see a difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vcpo.config import load_config
from vcpo.monitor.sinks import read_metrics
from vcpo.monitor.statistics import student_interval, total
from vcpo.runtime import train

Settings = dict[str, object]

WAYS: dict[str, Settings] = {
    "plain": {},
    "dynamic sampling": {"pipeline.dynamic_sampling": True},
    "goldilocks": {"pipeline.selection": "goldilocks"},
    "goldilocks, dynamic sampling": {"pipeline.selection": "goldilocks", "pipeline.dynamic_sampling": True},
    "over-provision": {"pipeline.over_provision": 16},
    "over-provision, prefixes masked": {
        "pipeline.over_provision": 16,
        "learner.mask_off_policy_prefix": True,
    },
}
QUARTERS = (0.25, 0.5, 0.75, 1.0)

LONG_TAIL: Settings = {
    "environment.kind": "benchmarks.long_tail:LongTail",
    "warm_start.steps": 0,
    "model.context_length": 160,
    "algorithm.name": "grpo",
    "pipeline.prompts": 8,
    "pipeline.group_size": 4,
    "pipeline.window": 64,
    "evaluation.final_problems": 1,
}
SPARE = (0, 4, 8, 16)
"""Groups begun beyond those needed."""
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    steps: int
    every: int
    """Steps between evaluations."""
    problems: int
    warm_start: int
    seeds: int
    long_tail_steps: int
    repetitions: int
    ways: tuple[str, ...] = tuple(WAYS)
    spare: tuple[int, ...] = SPARE


FULL = Scale(600, 25, 512, 350, 5, 60, 5)
QUICK = Scale(15, 5, 64, 50, 1, 10, 1, tuple(WAYS)[:3], (0, 8))


def steps_of(way: str, scale: Scale) -> int:
    """Steps with dynamic sampling cost more tokens: two thirds of them are more than the budget."""
    return scale.steps * 2 // 3 if "pipeline.dynamic_sampling" in WAYS[way] else scale.steps


def finished_run(recipe: Path | None, name: str, folder: Path, settings: Settings) -> Path:
    """The folder of a run with these settings in exact mode at lag 0, which is not repeated."""
    if not (folder / name / "summary.json").exists():
        shutil.rmtree(folder / name, ignore_errors=True)  # what an interrupted run left
        common: Settings = {"run.folder": folder, "run.name": name, "learner.checkpoint_every": 0}
        common |= {"pipeline.mode": "exact", "pipeline.lag": 0}
        pairs = (common | settings).items()
        train(load_config(recipe, [part for key, value in pairs for part in (f"--{key}", str(value))]))
    return folder / name


# Accuracy at equal tokens


def curve(way: str, seed: int, scale: Scale, folder: Path) -> list[tuple[float, float]]:
    """(rollout tokens so far, accuracy on held-out problems) of each evaluation of a run."""
    steps = steps_of(way, scale)
    settings: Settings = {
        "algorithm.name": "grpo",
        "run.seed": seed,
        "pipeline.steps": steps,
        "warm_start.steps": scale.warm_start,
        "evaluation.every": scale.every,
        "evaluation.problems": scale.problems,
        "evaluation.final_problems": scale.problems,
    }
    name = f"{way.replace(', ', '-').replace(' ', '-')}-steps{steps}-seed{seed}"
    run = finished_run(Path("maze"), name, folder, settings | WAYS[way])
    summary, rows = json.loads((run / "summary.json").read_text()), read_metrics(run)
    spent = list(itertools.accumulate(row["tokens"] + row.get("skipped_tokens", 0) for row in rows))
    points = [(t, row["accuracy"]) for t, row in zip(spent, rows, strict=True) if "accuracy" in row]
    return [(0.0, summary["accuracy_before"]), *points, (spent[-1], summary["accuracy_after"])]


def accuracies(scale: Scale, folder: Path, console: Console) -> list[dict[str, Any]]:
    """A row for each way: accuracies at quarters of the budget, means over the seeds."""
    cells = list(itertools.product(scale.ways, range(scale.seeds)))
    curves = {cell: curve(*cell, scale, folder) for cell in track(cells, "learning", console=console)}
    budget = min(points[-1][0] for points in curves.values())
    read = {
        way: {
            share: [_read(curves[way, seed], share * budget) for seed in range(scale.seeds)]
            for share in QUARTERS
        }
        for way in scale.ways
    }
    return [
        {
            "way": way,
            "budget_tokens": budget,
            "accuracy": {share: statistics.mean(values) for share, values in read[way].items()},
            "minus_plain": {share: _difference(read[way][share], read["plain"][share]) for share in QUARTERS},
            "each_seed": read[way][1.0],
            "tokens_of_all_steps": statistics.mean(curves[way, seed][-1][0] for seed in range(scale.seeds)),
        }
        for way in scale.ways
    ]


def _difference(own: list[float], plain: list[float]) -> tuple[float, float]:
    """Mean over the seeds, and half of its 95 % interval."""
    differences = [a - b for a, b in zip(own, plain, strict=True)]
    low, high = student_interval(differences)
    return statistics.mean(differences), (high - low) / 2


def _read(points: list[tuple[float, float]], tokens: float) -> float:
    """The accuracy of the last evaluation that ``tokens`` pay for."""
    return [accuracy for spent, accuracy in points if spent <= tokens][-1]


# Throughput


def throughput(spare: int, repetition: int, scale: Scale, folder: Path) -> tuple[float, float]:
    """Tokens trained on a second of waiting for rollouts, and a second of the loop, after a warm-up."""
    steps = scale.long_tail_steps + WARM_UP_STEPS
    settings: Settings = {"pipeline.steps": steps, "evaluation.every": 0, "pipeline.over_provision": spare}
    name = f"long-tail-spare{spare}-steps{steps}-repetition{repetition}"
    rows = read_metrics(finished_run(None, name, folder, LONG_TAIL | settings))[WARM_UP_STEPS:]
    waiting = total(rows, "seconds_waiting")
    loop = waiting + total(rows, "seconds_training") + total(rows, "seconds_publishing")
    return total(rows, "tokens") / waiting, total(rows, "tokens") / loop


def throughputs(scale: Scale, folder: Path, console: Console) -> list[dict[str, Any]]:
    """A row for each over-provision; ratios are to the plain run of the same repetition."""
    cells = list(itertools.product(range(scale.repetitions), scale.spare))
    found = {
        (spare, repetition): throughput(spare, repetition, scale, folder)
        for repetition, spare in track(cells, "rollouts in turn", console=console)
    }
    rows = []
    for spare in scale.spare:
        pairs = [(found[spare, r], found[0, r]) for r in range(scale.repetitions)]
        rollouts = [own[0] / plain[0] for own, plain in pairs]
        loops = [own[1] / plain[1] for own, plain in pairs]
        rows.append(
            {
                "over_provision": spare,
                "rollout_tokens_per_second": statistics.median(own[0] for own, _ in pairs),
                "rollout_ratio": statistics.median(rollouts),
                "rollout_ratio_spread": [min(rollouts), max(rollouts)],
                "loop_ratio": statistics.median(loops),
                "repetitions": scale.repetitions,
            }
        )
    return rows


def print_tables(learned: list[dict[str, Any]], played: list[dict[str, Any]]) -> None:
    budget = learned[0]["budget_tokens"]
    marks = [f"at {share:.0%}" for share in QUARTERS]
    minus = [f"− plain at {share:.0%}" for share in QUARTERS[1::2]]
    title = f"sampled accuracy within {budget:,.0f} tokens"
    accuracy = Table("way", *marks, *minus, "each seed", "tokens", title=title)
    for row in learned:
        accuracy.add_row(
            row["way"],
            *(f"{value:.3f}" for value in row["accuracy"].values()),
            *("{:+.3f} ± {:.3f}".format(*row["minus_plain"][share]) for share in QUARTERS[1::2]),
            " ".join(f"{value:.3f}" for value in row["each_seed"]),
            f"{row['tokens_of_all_steps']:,.0f}",
        )
    speed = Table("over-provision", "rollout tokens/s", "÷ plain", "lowest … highest", "whole loop ÷ plain")
    for row in played:
        low, high = row["rollout_ratio_spread"]
        speed.add_row(
            str(row["over_provision"]),
            f"{row['rollout_tokens_per_second']:,.0f}",
            f"{row['rollout_ratio']:.2f}",
            f"{low:.2f} … {high:.2f}",
            f"{row['loop_ratio']:.2f}",
        )
    Console().print(accuracy, speed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, one repetition")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--seeds", type=int, help="of the accuracies, from 0")
    parser.add_argument("--repetitions", type=int, help="of the throughputs")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    changes = {name: value for name in ("seeds", "repetitions") if (value := getattr(arguments, name))}
    scale = Scale(**(vars(scale) | changes))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        learned = accuracies(scale, folder, console)
        played = throughputs(scale, folder, console)
    print_tables(learned, played)
    if arguments.json:
        arguments.json.write_text(json.dumps({"accuracy": learned, "throughput": played}, indent=2) + "\n")


if __name__ == "__main__":
    main()
