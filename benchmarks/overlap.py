"""What overlapping sampler and learner is worth: the same recipe at lag 0 and asynchronously, in turn.

    python -m benchmarks.overlap [--quick] [--json FILE] [--repetitions N]

At lag 0 the two cores can still be used in several ways (more torch threads, more sampler processes): all
are run, and the ratio is taken against the fastest. Seconds a step are those of the run's own clock
between two steps, start-up and the first steps left out; repetitions of all variants alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vcpo.config import load_config
from vcpo.monitor.sinks import read_metrics
from vcpo.runtime import train

WARM_UP_STEPS = 8
SLOW: dict[str, object] = {"environment.kind": "benchmarks.slow_maze:SlowMaze"}


@dataclass(frozen=True)
class Variant:
    """One way to run the recipe."""

    load: str
    name: str
    settings: dict[str, object]
    steps: int

    @property
    def key(self) -> str:
        return f"{self.load}: {self.name}"

    @property
    def quick(self) -> bool:
        return self.settings.get("runtime.threads", 1) == 1 and self.settings.get("runtime.samplers", 1) == 1

    @property
    def synchronous(self) -> bool:
        return self.settings["pipeline.lag"] == 0


WAYS = [(samplers, threads) for samplers in (1, 2) for threads in (1, 2)]
"""Of using two cores at lag 0: sampler processes, torch threads of each process."""


def variants(
    load: str,
    steps: int,
    ways: list[tuple[int, int]],
    common: dict[str, object],
    asynchronous: dict[str, object],
) -> list[Variant]:
    found = []
    for samplers, threads in ways:
        settings = {"pipeline.lag": 0, "runtime.samplers": samplers, "runtime.threads": threads}
        name = f"lag 0, {samplers} sampler(s), {threads} thread(s)"
        found.append(Variant(load, name, common | settings, steps))
    name = ", ".join(f"{key.split('.')[1]} {value}" for key, value in asynchronous.items())
    return [*found, Variant(load, f"async, {name}", common | asynchronous, steps)]


# With the latency a step at lag 0 waits nearly a second for its slowest episode: threads do not matter.
ALL = [
    *variants("no latency", 60, WAYS, {}, {"pipeline.lag": 2, "pipeline.window": 16}),
    *variants("tool latency", 15, [(1, 1), (2, 1)], SLOW, {"pipeline.lag": 8, "pipeline.window": 64}),
]


def seconds_per_step(variant: Variant, folder: Path, repetition: int) -> float:
    """Run once; wall seconds a step after the warm-up."""
    settings: dict[str, object] = {
        "run.folder": folder,
        "run.name": f"{variant.name}-{variant.load}-{repetition}".replace(" ", "-"),
        "pipeline.steps": variant.steps + WARM_UP_STEPS,
        "evaluation.every": 0,
        "evaluation.final_problems": 1,
        "learner.checkpoint_every": 0,
        "warm_start.steps": 50,
        **variant.settings,
    }
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    summary = train(load_config(Path("maze"), overrides))
    rows = read_metrics(Path(summary["run_folder"]))
    return (rows[-1]["elapsed"] - rows[WARM_UP_STEPS - 1]["elapsed"]) / variant.steps


def measure(chosen: list[Variant], repetitions: int) -> dict[str, list[float]]:
    """Seconds a step of every repetition, by ``Variant.key``."""
    times: dict[str, list[float]] = {v.key: [] for v in chosen}
    rounds = [(r, v) for r in range(repetitions) for v in chosen]
    with tempfile.TemporaryDirectory() as folder:
        for repetition, variant in track(rounds, "runs in turn", console=Console(stderr=True)):
            times[variant.key].append(seconds_per_step(variant, Path(folder), repetition))
    return times


def rows_of(chosen: list[Variant], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row a variant; ``ratio``: time of the fastest lag-0 variant of the same load ÷ this one's, paired."""
    rows: list[dict[str, Any]] = []
    for variant in chosen:
        references = [times[v.key] for v in chosen if v.load == variant.load and v.synchronous]
        best = min(references, key=statistics.median)
        ratios = [b / s for b, s in zip(best, times[variant.key], strict=True)]
        rows.append(
            {
                "load": variant.load,
                "variant": variant.name,
                "milliseconds_per_step": 1000 * statistics.median(times[variant.key]),
                "ratio": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
                "repetitions": len(ratios),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("load", "variant", "ms a step", "speed ÷ best lag 0", "lowest … highest")
    for row in rows:
        low, high = row["ratio_spread"]
        table.add_row(
            row["load"],
            row["variant"],
            f"{row['milliseconds_per_step']:.0f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} … {high:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short run of the likeliest variants")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each variant, in turn")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    chosen = [replace(v, steps=v.steps // 5) for v in ALL if v.quick] if arguments.quick else ALL
    rows = rows_of(chosen, measure(chosen, 1 if arguments.quick else arguments.repetitions))
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
