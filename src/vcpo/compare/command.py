"""The whole of a comparison: check the grid, run what is not there yet, write down what there is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vcpo.compare.children import Metrics, damage, is_finished, run_cells
from vcpo.compare.controls import make_controls
from vcpo.compare.grid import (
    Cell,
    check_files,
    differences,
    make_grid,
    parse_lags,
    parse_methods,
    parse_seeds,
    refuse_settings_of_the_grid,
)
from vcpo.compare.page import PAGE_FILE, write_page
from vcpo.compare.progress import GridProgress
from vcpo.compare.remarks import remarks
from vcpo.compare.results import (
    COMPLETED,
    FAILED,
    RESULTS_FILE,
    Result,
    impossible_results,
    known_results,
    result_of,
    summarise,
    write_results,
)
from vcpo.compare.table import TABLE_FILE, rich_tables, write_table
from vcpo.config import Config, apply_overrides, load_config
from vcpo.errors import ConfigError, VcpoError
from vcpo.monitor import words
from vcpo.monitor.sinks import METRICS_FILE

LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Grid:
    """What is asked for, as it is written on the command line."""

    recipe: str
    overrides: Sequence[str]
    methods: str
    lags: str
    seeds: str
    out: Path
    jobs: int | None = None
    """None: as many as there are cores."""
    controls: bool = False
    """Whether the controls of :mod:`vcpo.compare.controls` follow."""


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended."""

    results: Sequence[Result]
    out: Path
    interrupted: bool

    def count(self, status: str) -> int:
        return sum(result.status == status for result in self.results)

    @property
    def failed(self) -> int:
        return self.count(FAILED)

    @property
    def text(self) -> str:
        """How many, and where things are."""
        collapsed = sum(result.collapsed_at is not None for result in self.results)
        left = len(self.results) - self.count(COMPLETED) - self.failed
        counts = f"{self.count(COMPLETED)} completed, {self.failed} failed, {collapsed} collapsed"
        told = "".join(f"\n{remark}" for remark in remarks(self.results))
        unfinished = f", {left} unfinished" if left else ""
        places = f"{self.out}: {RESULTS_FILE}, {TABLE_FILE}, {PAGE_FILE}"
        return f"{len(self.results)} runs: {counts}{unfinished}{told}\nwritten to {places}"


def compare(grid: Grid, console: Console) -> Outcome:
    """Run the grid, or what is left of it, and write results, table and page.

    Raises ConfigError before anything is run: for a setting or a method that is none, for parts that do not
    go together, for an environment that cannot be made, for a folder that has other runs under these names.
    """
    recipe = load_config(grid.recipe)
    base = apply_overrides(recipe, ["--runtime.threads", "1", *grid.overrides])
    refuse_settings_of_the_grid(option[2:].partition("=")[0] for option in grid.overrides)
    methods, lags, seeds = parse_methods(grid.methods), parse_lags(grid.lags), parse_seeds(grid.seeds)
    cells = make_grid(base, methods, lags, seeds, grid.out)
    with _locked(grid.out) as lock, _sigterm_is_an_interrupt(), _file_errors_are_told(grid.out):
        comparison = _Comparison(recipe, differences(recipe, base), grid, console, lock)
        completed = comparison.run("comparison", cells)
        if completed and grid.controls:
            try:
                completed = comparison.run_controls()
            except ConfigError:
                comparison.finish(interrupted=False)
                raise
        return comparison.finish(interrupted=not completed)


class _Comparison:
    def __init__(
        self, recipe: Config, settings: Mapping[str, Any], grid: Grid, console: Console, lock: int
    ) -> None:
        self._recipe, self._grid, self._console, self._lock = recipe, grid, console, lock
        self._settings, self._out = settings, grid.out
        self._jobs = grid.jobs or len(os.sched_getaffinity(0))
        self._results: dict[str, Result] = {}

    def run(self, title: str, cells: Sequence[Cell]) -> bool:
        """Run those of ``cells`` that are not finished; false if interrupted."""
        damaged = {cell.name: what for cell in cells if (what := damage(cell))}
        finished = {cell.name for cell in cells if cell.name not in damaged and is_finished(cell)}
        results = {cell.name: result_of(cell) for cell in cells if cell.name not in damaged}
        lost = [c for c in cells if c.name not in finished or not results[c.name].rows]
        known = known_results(lost, self._recipe, self._out)
        for cell in cells:
            if cell.name in damaged and cell.name not in known:
                raise ConfigError(
                    f"{damaged[cell.name]}: restore it, or remove {cell.folder} to have it run again"
                )
        finished |= known.keys()
        self._results |= results | known
        waiting = [cell for cell in cells if cell.name not in finished]
        if finished:
            self._console.print(f"{len(finished)} of {len(cells)} runs are there already", highlight=False)
        if not waiting:
            return True
        check_files(waiting)
        steps = sum(cell.config.pipeline.steps - _rows(cell) for cell in waiting)
        with GridProgress(title, len(waiting), steps, self._console) as progress:
            try:
                run_cells(waiting, self._out, self._jobs, _Watch(self, progress), self._lock)
            except KeyboardInterrupt:
                self._results |= {c.name: result_of(c) for c in waiting if not self.has_ended(c)}
                return False
        return True

    def run_controls(self) -> bool:
        """Run the controls of all that is there; false if interrupted."""
        controls, impossible = make_controls(list(self._results.values()), self._out)
        self._results |= impossible_results(impossible, self._recipe, self._out)
        return self.run("controls", controls)

    def has_ended(self, cell: Cell) -> bool:
        return self._results[cell.name].status in (COMPLETED, FAILED)

    def ended(self, cell: Cell, error: str | None) -> Result:
        """Keep the result of a run, and write down all of them."""
        result = self._results[cell.name] = result_of(cell, error)
        self._write()
        return result

    def _write(self) -> None:
        results = list(self._results.values())
        write_results(results, self._recipe, self._out)
        write_table(summarise(results), self._out)

    def finish(self, *, interrupted: bool) -> Outcome:
        self._write()
        results = list(self._results.values())
        summaries = summarise(results)
        write_page(results, summaries, self._settings, self._grid.recipe, self._out)
        for table in rich_tables(summaries):
            self._console.print(table)
        return Outcome(results, self._out, interrupted)


class _Watch:
    """Passes on what the runs do to the results and to the screen."""

    def __init__(self, comparison: _Comparison, progress: GridProgress) -> None:
        self._comparison, self._progress = comparison, progress
        self.steps, self.running = progress.steps, progress.running

    def ended(self, cell: Cell, error: str | None) -> None:
        result = self._comparison.ended(cell, error)
        self._progress.ended(cell, result.error, _told(result), cell.config.pipeline.steps - len(result.rows))


def _told(result: Result) -> str:
    before, after = (words.percent(result.figure(f"greedy_accuracy_{end}")) for end in ("before", "after"))
    collapsed = f", collapsed at step {result.collapsed_at}" if result.collapsed_at is not None else ""
    return f"greedy {before} → {after}{collapsed}, {words.duration(result.figure('wall_seconds'))}"


def _rows(cell: Cell) -> int:
    metrics = Metrics(cell.folder / METRICS_FILE)
    metrics.update()
    return metrics.rows


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Hold ``out`` against another comparison. Children inherit the lock, so that it outlives a killed parent
    until they have stopped. Raises ConfigError if it is held, or if the folder cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise ConfigError(f"another comparison is running in {out}: wait for its end, or stop it") from None
    finally:
        os.close(lock)


@contextlib.contextmanager
def _file_errors_are_told(out: Path) -> Iterator[None]:
    """A full disk, a folder where a file should be, a name that is not text."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise VcpoError(
            f"the comparison in {out} could not go on: {error}; runs that were completed are kept: when this "
            "is mended, the same command goes on"
        ) from error


@contextlib.contextmanager
def _sigterm_is_an_interrupt() -> Iterator[None]:
    """SIGTERM stops the children in order, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
