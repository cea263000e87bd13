"""How much sooner asynchronous VCPO reaches an accuracy than the synchronous loop, in turn on one machine.

    python -m benchmarks.speed_to_target [--quick] [--json FILE] [--target 0.65] [--seeds 3]
                                         [--algorithm vcpo]

The maze, plain and with a slow tool (benchmarks.slow_maze). Sampled accuracy is measured on 256 held-out
mazes every 10 steps; the time is that of the learner's loop (training, waiting, publishing) up to the first
evaluation at the target, evaluations left out. At lag 0 the way of using two cores is the one that
benchmarks.overlap found fastest. A run that does not reach the target within its steps has no time, and the
row says so; asynchronous runs may take twice as many steps, which are shorter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.overlap import SLOW
from vcpo.config import load_config
from vcpo.monitor.sinks import read_metrics
from vcpo.monitor.statistics import Row, time_spent
from vcpo.runtime import train


@dataclass(frozen=True)
class Way:
    """One way to run the recipe."""

    load: str
    name: str
    settings: dict[str, object]

    @property
    def synchronous(self) -> bool:
        return self.settings["pipeline.lag"] == 0


WAYS = [
    Way("plain", "lag 0", {"pipeline.lag": 0, "runtime.samplers": 2}),
    Way("plain", "async, lag 2", {"pipeline.lag": 2}),
    Way("tool latency", "lag 0", {"pipeline.lag": 0, "runtime.samplers": 2, **SLOW}),
    Way("tool latency", "async, lag 4", {"pipeline.lag": 4, "pipeline.window": 48, **SLOW}),
    Way("tool latency", "async, lag 8", {"pipeline.lag": 8, "pipeline.window": 64, **SLOW}),
]


def seconds_to(target: float, rows: Sequence[Row]) -> tuple[float, int] | None:
    """Seconds of the learner's loop and steps up to the first evaluation at ``target``; None without it."""
    for place, row in enumerate(rows):
        if (row.get("accuracy") or 0.0) >= target:
            return time_spent(rows[: place + 1]).learning, row["step"]
    return None


def run(way: Way, algorithm: str, seed: int, steps: int, folder: Path) -> Sequence[Row]:
    settings: dict[str, object] = {
        "algorithm.name": algorithm,
        "run.seed": seed,
        "run.folder": folder,
        "run.name": f"{way.load}-{way.name}-{seed}".replace(" ", "-").replace(",", ""),
        "pipeline.steps": steps if way.synchronous else 2 * steps,
        "evaluation.every": 10,
        "evaluation.final_problems": 1,
        "learner.checkpoint_every": 0,
        **way.settings,
    }
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return read_metrics(Path(train(load_config(Path("maze"), overrides))["run_folder"]))


def measure(algorithm: str, target: float, seeds: int, steps: int) -> list[dict[str, Any]]:
    """A row a way: seconds and steps to the target of every seed; ratio to lag 0 of the same seed."""
    rounds = [(seed, way) for seed in range(seeds) for way in WAYS]
    found: dict[tuple[str, str], list[tuple[float, int] | None]] = {(w.load, w.name): [] for w in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed, way in track(rounds, "runs in turn", console=Console(stderr=True)):
            reached = seconds_to(target, run(way, algorithm, seed, steps, Path(folder)))
            found[way.load, way.name].append(reached)
    return [_row(way, found) for way in WAYS]


def _row(way: Way, found: dict[tuple[str, str], list[tuple[float, int] | None]]) -> dict[str, Any]:
    reference = next(w for w in WAYS if w.load == way.load and w.synchronous)
    own, other = found[way.load, way.name], found[reference.load, reference.name]
    ratios = [b[0] / a[0] for a, b in zip(own, other, strict=True) if a is not None and b is not None]
    return {
        "load": way.load,
        "way": way.name,
        "seconds": [None if a is None else a[0] for a in own],
        "steps": [None if a is None else a[1] for a in own],
        "ratio": statistics.median(ratios) if ratios else None,
        "ratio_spread": [min(ratios), max(ratios)] if ratios else None,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("load", "way", "seconds to target", "steps", "lag 0 ÷ this", "lowest … highest")
    for row in rows:
        spread = row["ratio_spread"]
        table.add_row(
            row["load"],
            row["way"],
            " ".join("never" if s is None else f"{s:.0f}" for s in row["seconds"]),
            " ".join("–" if s is None else str(s) for s in row["steps"]),
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "–" if spread is None else f"{spread[0]:.2f} … {spread[1]:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, an easy target")
    parser.add_argument("--target", type=float, help="sampled accuracy to reach (default 0.65; quick 0.5)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--algorithm", default="vcpo", help="the method of all runs")
    parser.add_argument("--steps", type=int, default=400, help="the most steps of a run at lag 0")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    target = arguments.target or (0.5 if arguments.quick else 0.65)
    seeds, steps = (1, 60) if arguments.quick else (arguments.seeds, arguments.steps)
    rows = measure(arguments.algorithm, target, seeds, steps)
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"algorithm": arguments.algorithm, "target": target, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
