"""Does it matter to training that score norms are sketched?

    python -m benchmarks.sketch [--quick] [--json FILE] [--tasks maze,sort] [--lags 0,16] [--seeds 3]
                                [--folder FOLDER]

Trains VCPO in exact mode, once with exact norms and once with every matrix sketched (r = 16) however short
its trajectories are, which the default would not do: the worst case of the sketch. Prints held-out accuracy
of both, seed by seed. A run that is in FOLDER already is not repeated. ``--quick`` takes 20 steps of one
seed: enough to see it run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vcpo.config import load_config
from vcpo.runtime import train
from vcpo.scores.choice import METHODS, Choice

ALWAYS = Choice(columns=16, formed_from=math.inf, sketched_below=math.inf)


def run(task: str, lag: int, seed: int, method: str, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One row: what was run and what came out."""
    name = f"{task}-lag{lag}-seed{seed}-{method}{'-quick' if extra else ''}"
    finished = folder / name / "summary.json"
    if finished.exists():
        summary = json.loads(finished.read_text())
    else:
        shutil.rmtree(folder / name, ignore_errors=True)  # what an interrupted run left
        settings = {
            "pipeline.mode": "exact",
            "pipeline.lag": lag,
            "algorithm.name": "vcpo",
            "learner.score_norms": method,
            "run.seed": seed,
            "run.folder": folder,
            "run.name": name,
            "evaluation.every": 100,
        }
        overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        with patch.dict(METHODS, sketched=ALWAYS):
            summary = train(load_config(Path(task), [*overrides, *extra]))
    kept = ("accuracy_before", "accuracy_after", "greedy_accuracy_before", "greedy_accuracy_after")
    return {"task": task, "lag": lag, "seed": seed, "method": method} | {key: summary[key] for key in kept}


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each task, lag and method."""
    table = Table(
        "task", "lag", "norms", "sampled before", "sampled after", "each seed", "greedy after", "each seed"
    )
    for (task, lag, method), group in itertools.groupby(rows, lambda r: (r["task"], r["lag"], r["method"])):
        members = list(group)
        cells = []
        for kind in ("accuracy", "greedy_accuracy"):
            after = [m[f"{kind}_after"] for m in members]
            cells += [f"{statistics.mean(after):.3f}", " ".join(f"{value:.3f}" for value in after)]
        before = statistics.mean(m["accuracy_before"] for m in members)
        table.add_row(task, str(lag), method, f"{before:.3f}", *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed, lag 0")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--tasks", default="maze,sort", help="recipes, by comma")
    parser.add_argument("--lags", default="0,16", help="whole numbers, by comma")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else arguments.seeds)
    lags = [0] if arguments.quick else [int(lag) for lag in arguments.lags.split(",")]
    extra = ["--pipeline.steps", "20", "--evaluation.final_problems", "64"] if arguments.quick else []
    grid = itertools.product(arguments.tasks.split(","), lags, METHODS, seeds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        cells = track(list(grid), "runs", console=Console(stderr=True))
        rows = [run(task, lag, seed, method, folder, extra) for task, lag, method, seed in cells]
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
