"""What the optimal baseline costs: whole optimizer steps with it, against plain packed GRPO.

    python -m benchmarks.step [--quick] [--json FILE] [--device cpu|cuda] [--settings NAME ...] [--profile]

Every variant takes the same step: same model, optimizer, minibatch and weights min(w, 8), one group a
micro-batch unless noted. The learning rate is 0, so that every repetition finds the same model.

- ``plain``: baseline the group's mean, which needs no norms; forward, backward;
- ``exact``, ``sketched``: forward, ``ScoreTape.measure``, optimal baseline, ``Record.backward``;
- ``two_pass``: forward, sketched norms alone, optimal baseline, forward again, backward;
- ``two_sums``: micro-batches of equal reward, sketched norms on the way of ordinary backward passes, whose
  gradients go to two sums; the choice for groups that do not fit one micro-batch;
- ``per_trajectory``: the official way, micro-batch 1, norms from ``.grad``, two more gradient buffers.

The variants take turns, each turn in another order. Counted is processor time on a CPU, which on a busy
machine is still theirs alone, and wall time on a GPU. ``time_ratio`` is the median over turns of variant ÷
plain of the same turn. ``memory_ratio`` is the peak of all tensors alive, weights and optimizer included,
÷ plain's; on a CPU it is that of a step of two groups, as it does not grow with more.

Of two groups are ``gradient_difference`` and ``norm_error`` (a root mean square), relative to per_trajectory,
and ``same_baseline_difference``: of the gradients where all use the group's mean, so of rounding alone. On
weights as random as these, sketches err two to three times as much as on trained ones.

Not in these figures: the rest of a training step (rollouts, publication), which is the same for all.
``--profile`` prints, instead, where the time of plain and sketched goes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from benchmarks.step_profile import FEW, peak_memory, print_profile
from benchmarks.step_variants import VARIANTS, Variant, mean
from benchmarks.step_workbench import LONG, QUICK, SETTINGS, Bench, Setting

REPETITIONS, QUICK_REPETITIONS = 7, 3
REFERENCE = VARIANTS["per_trajectory"]
PROGRESS = Console(stderr=True)

BY_NAME = {s.name: s for s in (*QUICK, *SETTINGS["cpu"], *SETTINGS["cuda"], *LONG)}


@dataclass(frozen=True)
class Agreement:
    """How far a variant's gradient and norms are from the reference's."""

    gradient_difference: float | None
    """None for plain, whose baseline is meant to be another one."""
    same_baseline_difference: float
    norm_error: float | None
    """None without norms."""


@dataclass(frozen=True)
class Row:
    """What one variant costs in one setting."""

    setting: str
    variant: str
    time_ratio: float
    time_ratio_quartiles: tuple[float, float]
    memory_ratio: float
    memory_mb: float
    milliseconds: float
    gradient_difference: float | None
    same_baseline_difference: float
    norm_error: float | None


def measure(setting: Setting, device: str, repetitions: int) -> list[Row]:
    """A row a variant. One that runs out of GPU memory is named on stderr and left out."""
    bench = Bench(setting, device)
    agreements = compare(bench)
    peaks = {name: peak_memory(bench, VARIANTS[name]) for name in agreements}
    times = take_turns(bench, list(agreements), repetitions)
    return [
        Row(
            setting=setting.name,
            variant=name,
            time_ratio=float(np.median(times[name] / times["plain"])),
            time_ratio_quartiles=quartiles(times[name] / times["plain"]),
            memory_ratio=peaks[name] / peaks["plain"],
            memory_mb=peaks[name] / 1e6,
            milliseconds=1e3 * float(np.median(times[name])),
            **asdict(agreement),
        )
        for name, agreement in agreements.items()
    ]


def quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


# Do all compute the same?


def compare(bench: Bench) -> dict[str, Agreement]:
    """Each variant that fits into memory against the reference; one step of each is also its warm-up."""
    own = bench.gradient(REFERENCE, groups=FEW)
    shared, _ = bench.gradient(REFERENCE, baseline=mean, groups=FEW)
    agreements = {}
    for name in track(VARIANTS, f"{bench.setting.name}: one step of each", console=PROGRESS):
        try:
            agreements[name] = agreement(bench, VARIANTS[name], own, shared)
            bench.run(VARIANTS[name])
        except torch.OutOfMemoryError:
            agreements.pop(name, None)
            PROGRESS.print(f"{bench.setting.name}: {name} runs out of memory and is left out")
    return agreements


def agreement(
    bench: Bench, variant: Variant, own: tuple[list[Tensor], Tensor], shared: list[Tensor]
) -> Agreement:
    """``own``: gradient and norms of the reference; ``shared``: its gradient with the group's mean."""
    gradient, norms = bench.gradient(variant, groups=FEW)
    same, _ = bench.gradient(variant, baseline=mean, groups=FEW)
    has_norms = len(norms) > 0
    return Agreement(
        gradient_difference=distance(gradient, own[0]) if has_norms else None,
        same_baseline_difference=distance(same, shared),
        norm_error=float((norms / own[1] - 1).square().mean().sqrt()) if has_norms else None,
    )


def distance(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """‖gradient − reference‖ / ‖reference‖."""
    pairs = [(g.float(), r.float()) for g, r in zip(gradient, reference, strict=True)]
    squares = sum(float((g - r).square().sum()) for g, r in pairs)
    return (squares / sum(float(r.square().sum()) for _, r in pairs)) ** 0.5


# What do they cost?


def take_turns(bench: Bench, names: list[str], repetitions: int) -> dict[str, np.ndarray]:
    """Seconds a step; one of each variant a turn, and the order is rotated."""
    times: dict[str, list[float]] = {name: [] for name in names}
    turns = [(turn, names[(turn + i) % len(names)]) for turn in range(repetitions) for i in range(len(names))]
    for turn, name in track(turns, f"{bench.setting.name}: in turn", console=PROGRESS):
        times[name].append(seconds(bench, VARIANTS[name], seed=turn + 1))
    return {name: np.array(values) for name, values in times.items()}


def seconds(bench: Bench, variant: Variant, seed: int) -> float:
    with bench.work(variant, seed=seed) as work:
        gc.collect()  # nobody pays for another one's garbage
        start = clock(bench.device)
        bench.step(variant, work)
        return clock(bench.device) - start


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# What is printed


def print_rows(rows: list[Row]) -> None:
    """A table a setting."""
    for setting, members in itertools.groupby(rows, lambda row: row.setting):
        # A column keeps its cells, so every table has its own.
        variant, time_ratio = (Column(header, no_wrap=True) for header in ("variant", "time ÷ plain"))
        headers = (variant, time_ratio, "ms", "memory ÷ plain", "MB", "gradient", "same baseline", "norms")
        title = f"{setting}: micro-batches of {BY_NAME[setting].group}, per_trajectory's of 1"
        table = Table(*headers, title=title, box=SIMPLE, padding=0)
        for row in members:
            differences = (row.gradient_difference, row.same_baseline_difference, row.norm_error)
            table.add_row(
                row.variant,
                "{:.3f} ({:.2f}–{:.2f})".format(row.time_ratio, *row.time_ratio_quartiles),
                f"{row.milliseconds:.0f}",
                f"{row.memory_ratio:.2f}",
                f"{row.memory_mb:.0f}",
                *("" if value is None else f"{value:.0e}" for value in differences),
            )
        Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"small models, {QUICK_REPETITIONS} repetitions")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after every setting")
    parser.add_argument("--device", choices=list(SETTINGS), help="default: cuda if there is one")
    parser.add_argument(
        "--settings", nargs="+", choices=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME)
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes, time nothing else")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = QUICK if given.quick else SETTINGS[device]
    rows: list[Row] = []
    for setting in [BY_NAME[name] for name in given.settings or ()] or usual:
        if given.profile:
            print_profile(setting, device)
            continue
        rows += measure(setting, device, QUICK_REPETITIONS if given.quick else REPETITIONS)
        if given.json:
            given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if rows:
        print_rows(rows)


if __name__ == "__main__":
    main()
