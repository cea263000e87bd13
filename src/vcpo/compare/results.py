"""What became of each run of a comparison: one row a run, and their means over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vcpo.compare.grid import OF_THE_GRID, Cell, differences, fingerprint
from vcpo.config import Config
from vcpo.errors import CheckpointError, ConfigError
from vcpo.monitor.collapse import find_collapse
from vcpo.monitor.report import Run, load_run, read_summary
from vcpo.monitor.sinks import write_atomically
from vcpo.monitor.statistics import Row, student_interval

RESULTS_FILE = "results.jsonl"
COMPLETED, FAILED, UNFINISHED = "completed", "failed", "unfinished"
MOST_EPISODES = 0.5
"""A run has failed if more than this part of its episodes did: its figures would be the environment's."""

_FIGURES = {
    "accuracy_before": "accuracy_before",
    "accuracy_after": "accuracy_after",
    "greedy_accuracy_before": "greedy_accuracy_before",
    "greedy_accuracy_after": "greedy_accuracy_after",
    "held_out_problems": "held_out_problems",
    "reward_before": "accuracy_before_reward",
    "reward_after": "accuracy_after_reward",
    "ess_ratio_mean": "ess_ratio_mean",
    "step_scale_mean": "step_scale_mean",
    "steps": "steps",
    "tokens": "tokens",
    "accuracy_after_failed": "accuracy_after_failed",
    "episodes": "episodes",
    "failed_episodes": "failed_episodes",
    "wall_seconds": "wall_seconds",
}
"""Key of a row, and of summary.json. Rewards are those of the sampled evaluations."""


@dataclass(frozen=True)
class Result:
    """One run of the grid, and what came of it."""

    cell: Cell
    status: str
    """completed, failed, or unfinished (not begun, or stopped before its end)."""
    error: str | None
    summary: Mapping[str, Any]
    """As in summary.json; of a run that did not end, what is known."""
    rows: Sequence[Row]
    """metrics.jsonl."""
    collapsed_at: int | None
    """Step of the collapse."""

    @staticmethod
    def without_run(cell: Cell, error: str) -> Result:
        """Of a run that could not be made."""
        return Result(cell, FAILED, error, {}, (), None)

    def figure(self, key: str) -> Any:
        """A value of the row; None if it is not known."""
        return self.summary.get(_FIGURES[key])

    def row(self, recipe: Config) -> dict[str, Any]:
        """The line of results.jsonl."""
        return {
            "run": self.cell.name,
            "method": self.cell.method,
            "lag": self.cell.lag,
            "seed": self.cell.seed,
            "control_of": self.cell.control_of or None,
            "overrides": _overrides(recipe, self.cell.config),
            "settings": fingerprint(self.cell.config),
            "status": self.status,
            "error": self.error,
            **{key: self.figure(key) for key in _FIGURES},
            "collapsed": self.collapsed_at is not None,
            "collapsed_at": self.collapsed_at,
        }


def result_of(cell: Cell, error: str | None = None) -> Result:
    """Read a run's folder, whatever is in it; ``error`` is why the run failed.

    A finished run whose metrics are gone, or not whole, is completed, as its summary has its figures.
    """
    try:
        run = load_run(cell.folder)
    except CheckpointError:  # it has no metrics yet, or none that can be read
        summary = read_summary(cell.folder)
        run = Run(cell.folder, (), summary or {}, finished=summary is not None, config="")
    if run.finished and len(run.rows) != cell.config.pipeline.steps:
        run = replace(run, rows=())
    error = error or _failed_episodes(run)
    status = FAILED if error is not None else COMPLETED if run.finished else UNFINISHED
    summary = run.summary
    step = find_collapse(
        run.rows,
        before=summary.get("accuracy_before"),
        after=summary.get("accuracy_after"),
        problems=summary.get("held_out_problems", 0),
    )
    return Result(cell, status, error, summary, run.rows, step)


def _failed_episodes(run: Run) -> str | None:
    """Why a finished run says nothing about its method; None if it does."""
    hint = f"its log says why; remove {run.folder} to have it run again"
    for what, (failed, episodes) in failures(run.summary).items():
        if run.finished and failed > MOST_EPISODES * episodes:
            return f"{failed} of its {episodes} {what} failed, {hint}"
    return None


def failures(summary: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """How many failed, of how many: episodes of training, and of the evaluation after it."""
    return {
        "episodes": (summary.get("failed_episodes") or 0, summary.get("episodes") or 0),
        "held-out episodes": (
            summary.get("accuracy_after_failed") or 0,
            summary.get("held_out_problems") or 0,
        ),
    }


def known_results(cells: Iterable[Cell], recipe: Config, out: Path) -> dict[str, Result]:
    """By name, the completed runs of ``cells`` that results.jsonl has: what is left of runs whose folders
    were removed or damaged, or are on another machine. They have figures and no metrics.

    Raises ConfigError for a row with other settings: it would be lost.
    """
    rows = _completed(_read_rows(out))
    known = {}
    for cell in cells:
        row = rows.get(cell.name)
        if row is None:
            continue
        if not _has_the_settings(row, cell, recipe):
            raise ConfigError(
                f"{out / RESULTS_FILE} has a row of {cell.name} with other settings: choose another --out, "
                "or remove that line if it is not needed any more"
            )
        known[cell.name] = _result_of_row(cell, row)
    return known


def impossible_results(results: Iterable[Result], recipe: Config, out: Path) -> dict[str, Result]:
    """By name, of controls that cannot be run now: those that were completed before, as results.jsonl has
    them, if that is of the same settings; else nothing, as that row stays; else the failure."""
    rows, found = _completed(_read_rows(out)), {}
    for result in results:
        name, row = result.cell.name, rows.get(result.cell.name)
        if row is None:
            found[name] = result
        elif _has_the_settings(row, result.cell, recipe):
            found[name] = _result_of_row(result.cell, row)
    return found


def _completed(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of completed runs by name."""
    return {row["run"]: row for row in rows if row["status"] == COMPLETED}


def _result_of_row(cell: Cell, row: Mapping[str, Any]) -> Result:
    summary = {summary_key: row.get(key) for key, summary_key in _FIGURES.items()}
    return Result(cell, COMPLETED, None, summary, (), row["collapsed_at"])


def _has_the_settings(row: Mapping[str, Any], cell: Cell, recipe: Config) -> bool:
    """Overrides alone do not tell: the recipe itself may have changed, or be another. Rows of earlier
    versions have nothing else."""
    if "settings" in row:
        return row["settings"] == fingerprint(cell.config)
    return row["overrides"] == _plain(_overrides(recipe, cell.config))


def write_results(results: Sequence[Result], recipe: Config, out: Path) -> Path:
    """Write results.jsonl: a row a run, and after them the rows that earlier commands have left of others.

    A completed row is not replaced by one of a run that is not.
    """
    path, names, there = out / RESULTS_FILE, {result.cell.name for result in results}, _read_rows(out)
    before = _completed(there)
    rows = [
        result.row(recipe) if result.status == COMPLETED else before.get(result.cell.name, result.row(recipe))
        for result in results
    ]
    rows += [row for row in there if row["run"] not in names]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read_rows(out: Path) -> list[dict[str, Any]]:
    """Raises ConfigError for a file that cannot be read, and for a line that is no row."""
    path = out / RESULTS_FILE
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; move it away to begin anew") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_row(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}, line {number} is not the row of a run: remove that line, or restore the file"
            ) from error
        rows.append(row)
    return rows


def _check_row(row: dict[str, Any]) -> None:
    """Raises TypeError or KeyError for what is none; rows of earlier versions have figures less."""
    figures = [row.get(key) for key in _FIGURES]
    if not isinstance(row["run"], str) or not isinstance(row["overrides"], dict):
        raise TypeError
    if not all(isinstance(value, int | float | None) for value in (*figures, row["collapsed_at"])):
        raise TypeError
    if row["status"] == COMPLETED and None in (row.get("accuracy_after"), row.get("steps")):
        raise KeyError


def _overrides(recipe: Config, config: Config) -> dict[str, Any]:
    """The settings in which a run differs from the recipe, those left out that every cell has."""
    changed = differences(recipe, config)
    return {k: v for k, v in changed.items() if k == "algorithm.name" or k not in OF_THE_GRID}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return json.loads(json.dumps(values))


@dataclass(frozen=True)
class Mean:
    """Over seeds."""

    value: float
    low: float
    high: float
    """95 % interval by Student's t; the value itself of one seed."""
    each: Sequence[float]


@dataclass(frozen=True)
class Summary:
    """The runs of one method at one lag."""

    method: str
    lag: int
    results: Sequence[Result]

    def count(self, status: str) -> int:
        return sum(result.status == status for result in self.results)

    @property
    def collapses(self) -> int:
        return sum(result.collapsed_at is not None for result in self.results)

    def mean(self, key: str) -> Mean | None:
        """Of the completed runs; None if there is none."""
        found = (result.figure(key) for result in self.results if result.status == COMPLETED)
        values = [value for value in found if value is not None]
        if not values:
            return None
        low, high = student_interval(values)
        return Mean(fmean(values), low, high, values)


def lags_of(summaries: Iterable[Summary]) -> list[int]:
    return sorted({summary.lag for summary in summaries})


def summarise(results: Iterable[Result]) -> list[Summary]:
    """Results by lag and method: lags rise, methods stay in the grid's order, each before its controls."""
    results = list(results)
    families = list(dict.fromkeys(result.cell.family for result in results))
    groups: dict[tuple[int, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.cell.lag, families.index(r.cell.family))):
        groups.setdefault((result.cell.lag, result.cell.method), []).append(result)
    return [Summary(method, lag, members) for (lag, method), members in groups.items()]
