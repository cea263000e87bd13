"""Does the default task learn, and what does policy lag do to it?

    python -m benchmarks.learning [--quick] [--json FILE]
                                  [--algorithms vcpo,grpo] [--lags 0] [--seeds 3] [--folder FOLDER]

Runs ``recipes/maze.toml`` in exact mode once for each algorithm, lag and seed, and prints held-out accuracy
before and after. A run that is in FOLDER already is not repeated. ``--quick`` takes 30 steps of one seed:
enough to see it run, not to see it learn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vcpo.config import load_config
from vcpo.runtime import train

KEPT = (
    "greedy_accuracy_before",
    "greedy_accuracy_after",
    "accuracy_before",
    "accuracy_after",
    "ess_ratio_mean",
    "step_scale_mean",
    "wall_seconds",
)


def run(algorithm: str, lag: int, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One row: what was run and what came out."""
    name = f"{algorithm}-lag{lag}-seed{seed}{'-quick' if extra else ''}"
    finished = folder / name / "summary.json"
    if finished.exists():
        summary = json.loads(finished.read_text())
    else:
        shutil.rmtree(folder / name, ignore_errors=True)  # what an interrupted run left
        settings = {
            "pipeline.mode": "exact",
            "pipeline.lag": lag,
            "algorithm.name": algorithm,
            "run.seed": seed,
            "run.folder": folder,
            "run.name": name,
            "evaluation.every": 100,
        }
        overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        summary = train(load_config(Path("maze"), [*overrides, *extra]))
    return {"algorithm": algorithm, "lag": lag, "seed": seed} | {key: summary[key] for key in KEPT}


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line an algorithm and lag: means over seeds, with each seed's value."""
    table = Table("algorithm", "lag", "greedy before", "greedy after", "gain", "each seed after", "ESS ratio")
    for key, group in itertools.groupby(rows, lambda r: (r["algorithm"], r["lag"])):
        members = list(group)
        before, after = ([m[f"greedy_accuracy_{end}"] for m in members] for end in ("before", "after"))
        table.add_row(
            key[0],
            str(key[1]),
            f"{statistics.mean(before):.3f}",
            f"{statistics.mean(after):.3f}",
            f"{statistics.mean(after) - statistics.mean(before):+.3f}",
            " ".join(f"{value:.3f}" for value in after),
            f"{statistics.mean(m['ess_ratio_mean'] for m in members):.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="30 steps, one seed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--algorithms", default="vcpo,grpo", help="names, by comma")
    parser.add_argument("--lags", default="0", help="whole numbers, by comma")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else arguments.seeds)
    names, lags = arguments.algorithms.split(","), [int(lag) for lag in arguments.lags.split(",")]
    grid = [(name, lag, seed) for name in names for lag in lags for seed in seeds]
    extra = ["--pipeline.steps", "30", "--evaluation.final_problems", "64"] if arguments.quick else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        cells = track(grid, "runs", console=Console(stderr=True))
        rows = [run(algorithm, lag, seed, folder, extra) for algorithm, lag, seed in cells]
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
