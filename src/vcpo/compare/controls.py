"""Controls: what of a method's result is due to its step scale, and what to its baseline.

For a run whose steps are scaled by the ESS ratio, with the same seed and lag:

- ``METHOD+constant-lr``: steps unscaled, at the constant rate η · (mean step scale of that run). If it does
  as well, the scaling did no more than lower the learning rate.
- ``METHOD+permuted``: the factors of that very run, in random order. If it does as well, it does not matter
  when steps are shortened.

For a run with the optimal baseline: ``METHOD+zero-baseline``, the same with b = 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from vcpo.compare.grid import CONTROLS_FOLDER, Cell, identity, make_cell
from vcpo.compare.results import COMPLETED, Result
from vcpo.config import Config
from vcpo.monitor.sinks import write_atomically
from vcpo.monitor.statistics import series
from vcpo.pipeline.build import algorithm_of

PERMUTED, ZERO_BASELINE = "permuted", "zero-baseline"

Settings = tuple[tuple[str, object], ...]


def make_controls(results: Sequence[Result], out: Path) -> tuple[list[Cell], list[Result]]:
    """The control runs of a finished grid, and results of those that cannot be: their run failed, or its step
    scales are gone.

    A control that is a run of the grid itself is left out. Writes the permuted factors below ``out``.
    """
    known = {identity(result.cell.config) for result in results}
    cells, impossible = [], []
    for result in results:
        cell = result.cell
        for suffix, settings in _controls(result, out):
            label = f"{cell.method}+{suffix}"
            config = _without_margin(cell.config) if suffix == ZERO_BASELINE else cell.config
            control = make_cell(config, label, settings, cell.lag, cell.seed, out, cell.name)
            if result.status != COMPLETED:
                reason = f"{cell.name} was not completed: there is nothing to control"
                impossible.append(Result.without_run(control, reason))
            elif suffix == PERMUTED and not Path(control.config.algorithm.step_scales).exists():
                reason = f"the metrics of {cell.name} are gone, and its step scales with them"
                impossible.append(Result.without_run(control, reason))
            elif identity(control.config) not in known:
                cells.append(control)
    return cells, impossible


def _controls(result: Result, out: Path) -> Iterator[tuple[str, Settings]]:
    """Suffix of the label and settings of each control; without figures if the run was not completed."""
    config, done = result.cell.config, result.status == COMPLETED
    algorithm = algorithm_of(config)
    if algorithm.step_rule != "off" and not config.algorithm.step_scales:
        rate = config.learner.learning_rate * (result.figure("step_scale_mean") if done else 1.0)
        yield "constant-lr", (("algorithm.step_scale", "off"), ("learner.learning_rate", rate))
        yield PERMUTED, (("algorithm.step_scales", _permuted(result, out) if done else ""),)
    if algorithm.baseline.needs_score_norms:
        yield ZERO_BASELINE, (("algorithm.baseline", "zero"),)


def _without_margin(config: Config) -> Config:
    """The margin belongs to the baseline that is replaced."""
    return config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"margin": None})})


def _permuted(result: Result, out: Path) -> Path:
    """The file of a run's permuted factors, written anew if its metrics are there."""
    scales = series(result.rows, "step_scale")[1]
    if len(scales) == result.cell.config.pipeline.steps:
        return write_permuted(scales, result.cell, out)
    return out / CONTROLS_FOLDER / f"{result.cell.name}.json"


def write_permuted(scales: Sequence[float], cell: Cell, out: Path) -> Path:
    """The factors of a run in an order that its seed decides, as a file for ``algorithm.step_scales``."""
    path = out / CONTROLS_FOLDER / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    permuted = random.Random(cell.seed).sample(scales, len(scales))
    write_atomically(path, json.dumps(permuted) + "\n")
    return path
