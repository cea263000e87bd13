"""How early the ESS ratio tells of a collapse, and how often it cries wolf.

    python -m benchmarks.lead_time [--study FOLDER]

It reads the runs of the study ``collapse`` of :mod:`benchmarks.evidence`, which evaluates every ten steps
and runs methods of which some fall and some do not. A run **falls** at the first evaluation from which on its
sampled accuracy on held-out problems stays below half of the best it ever had (smoothed over FALL_SMOOTHING
evaluations, which one unlucky evaluation does not pass). A **signal** alarms at the first step at which its
moving average, half-life SIGNAL_HALF_LIFE steps, passes a level. For every signal and level:

- told: alarms before the fall, of all falls;
- lead: steps from the alarm to the fall, median and range over the falls that were told;
- false: runs that did not fall, and alarmed all the same.

The best level would be picked on the runs that it is told of, so read columns, not one cell. Only folders of
runs have what this needs: run the study first. The result is printed, and written to FOLDER/lead_time.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vcpo.monitor.report import load_run
from vcpo.monitor.statistics import Row, ema, series

STUDY = Path("docs/evidence/data/collapse")
SIGNAL_HALF_LIFE = 5.0
FALL_SMOOTHING = 3
FALLEN = 0.5
"""Of the best accuracy."""
EARLY_STEPS = 10
"""Before these every average is of too few steps."""


@dataclass(frozen=True)
class Signal:
    name: str
    values: Callable[[Sequence[Row]], tuple[list[int], list[float]]]
    levels: Sequence[float]
    below: bool = True
    """Whether it alarms below a level, or above."""

    def alarm(self, rows: Sequence[Row], level: float) -> int | None:
        """The step of the alarm."""
        steps, values = self.values(rows)
        for step, value in zip(steps, ema(values, SIGNAL_HALF_LIFE), strict=True):
            if step > EARLY_STEPS and (value < level if self.below else value > level):
                return step
        return None


def _of(key: str) -> Callable[[Sequence[Row]], tuple[list[int], list[float]]]:
    return lambda rows: series(rows, key)


def _token_ess(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """1 / (1 + variance of the token ratios), whose mean is near 1."""
    steps, variances = series(rows, "ratio_variance")
    return steps, [1 / (1 + variance) for variance in variances]


SIGNALS = (
    Signal("sequence ESS ratio", _of("ess_ratio"), (0.5, 0.3, 0.2, 0.1, 0.05)),
    Signal("token ESS ratio", _token_ess, (0.99, 0.95, 0.9, 0.8, 0.5)),
    Signal("largest weight's share", _of("top_weight_share"), (0.1, 0.2, 0.4, 0.6), below=False),
    Signal("KL to the behaviour policy, per token", _of("kl"), (0.02, 0.05, 0.1, 0.2, 0.5), below=False),
    Signal("gradient norm, of the usual", lambda rows: _relative(rows, "grad_norm"), (1.5, 2, 3, 5),
           below=False),
    Signal("training reward, of its best", lambda rows: _of_best(rows, "reward"), (0.9, 0.8, 0.7, 0.5)),
)  # fmt: skip


def _relative(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Each value over the median of the first 50."""
    steps, values = series(rows, key)
    usual = statistics.median(values[:50])
    return steps, [value / usual for value in values]


def _of_best(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Each value over the best moving average so far."""
    steps, values = series(rows, key)
    best, parts = 0.0, []
    for value, smooth in zip(values, ema(values, SIGNAL_HALF_LIFE), strict=True):
        best = max(best, smooth)
        parts.append(value / best if best else 1.0)
    return steps, parts


def fall(rows: Sequence[Row]) -> int | None:
    """The step from which on the evaluated accuracy stays below half of its best; None if it does not."""
    steps, values = series(rows, "accuracy")
    if len(values) < FALL_SMOOTHING:
        return None
    smooth = [statistics.fmean(values[max(0, i - FALL_SMOOTHING + 1) : i + 1]) for i in range(len(values))]
    bound = FALLEN * max(smooth)
    if smooth[-1] >= bound:
        return None
    last = max(i for i, value in enumerate(smooth) if value >= bound)
    return steps[last + 1]


@dataclass(frozen=True)
class Found:
    """What one signal at one level was worth."""

    signal: str
    level: str
    leads: Sequence[int]
    falls: int
    false_alarms: int
    others: int

    @property
    def line(self) -> list[str]:
        leads = sorted(self.leads)
        told = f"{statistics.median(leads):.0f} ({leads[0]} to {leads[-1]})" if leads else "–"
        return [
            self.signal,
            self.level,
            f"{len(leads)} of {self.falls}",
            told,
            f"{self.false_alarms} of {self.others}",
        ]


def judge(runs: Sequence[Sequence[Row]]) -> Iterator[Found]:
    falls = [fall(rows) for rows in runs]
    count = sum(step is not None for step in falls)
    for signal in SIGNALS:
        for level in signal.levels:
            alarms = [signal.alarm(rows, level) for rows in runs]
            pairs = list(zip(alarms, falls, strict=True))
            leads = [end - alarm for alarm, end in pairs if alarm and end and alarm < end]
            false = sum(alarm is not None and end is None for alarm, end in pairs)
            bound = f"{'below' if signal.below else 'above'} {level:g}"
            yield Found(signal.name, bound, leads, count, false, len(runs) - count)


HEADINGS = ["signal", "alarm", "told", "lead, steps", "false"]


def report(study: Path) -> str:
    folders = sorted((study / "runs").iterdir())
    runs = [load_run(folder).rows for folder in folders]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(found.line for found in judge(runs))]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    fallen = [
        f"{folder.name} at step {step}"
        for folder, rows in zip(folders, runs, strict=True)
        if (step := fall(rows)) is not None
    ]
    return f"{len(fallen)} of {len(runs)} runs fell: {', '.join(fallen) or 'none'}.\n\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of the study's runs")
    study = parser.parse_args().study
    if not (study / "runs").is_dir():
        parser.error(f"{study} has no runs: first run python -m benchmarks.evidence --only collapse")
    text = report(study)
    (study / "lead_time.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
