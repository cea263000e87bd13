"""What a person sees while a run goes on, and at its end.

On a terminal: one live bar and one line of figures, which drops figures rather than wrap. Elsewhere (a log
file, CI): a plain line every twentieth of a phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vcpo.monitor import words

FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward", "reward", "{:.2f}".format),
    ("greedy_accuracy", "greedy", "{:.2f}".format),
    ("accuracy", "acc", "{:.2f}".format),
    ("ess_ratio", "ESS", "{:.2f}".format),
    ("lag_mean", "lag", "{:.1f}".format),
    ("step_scale", "scale", "{:.2f}".format),
    ("tokens_per_second", "tok/s", words.amount),
)
"""Metric, its short name and form, the most telling first: a narrow terminal drops the last ones.
All of them fit in 80 columns."""

LOSS = ("loss", "loss", words.amount)
"""Shown in phases without a reward, such as the warm start."""

PLAIN_LINES = 20
"""Lines a phase prints where there is no terminal."""


class Progress(Protocol):
    """Where a run tells how far it is."""

    def phase(self, title: str, total: int | None) -> None:
        """Begin a phase of ``total`` units; None if that is not known. Ends the phase before."""
        ...

    def advance(self, figures: Mapping[str, float]) -> None:
        """One unit of the current phase is done; ``figures`` are its metrics, by their glossary names."""
        ...

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        ...

    def close(self, completed: bool = True) -> None:
        """End the current phase, which was completed or not; a second call does nothing."""
        ...


class SilentProgress:
    """Shows nothing."""

    def phase(self, title: str, total: int | None) -> None:
        pass

    def advance(self, figures: Mapping[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self, completed: bool = True) -> None:
        pass


class Phase:
    """Counts and figures of one phase."""

    def __init__(self, title: str, total: int | None, clock: Callable[[], float]) -> None:
        self.title, self.total, self.done = title, total, 0
        self.figures: dict[str, float] = {}
        self._clock, self._begun = clock, clock()

    def advance(self, figures: Mapping[str, float]) -> None:
        self.done += 1
        known = {key: words.number(figures, key) for key in figures}
        self.figures.update({key: value for key, value in known.items() if value is not None})

    @property
    def elapsed(self) -> float:
        return self._clock() - self._begun

    @property
    def remaining(self) -> float | None:
        """Seconds left at the mean pace so far; None before the first unit or without a total."""
        if not self.done or self.total is None:
            return None
        return self.elapsed / self.done * max(0, self.total - self.done)

    @property
    def count(self) -> str:
        """``12/600``, ``12``, or nothing where units are not counted."""
        if self.total is not None:
            return f"{self.done}/{self.total}"
        return str(self.done) if self.done else ""

    @property
    def times(self) -> str:
        """Elapsed and, where known, remaining time."""
        left = "" if self.total is None else f" < {words.clock(self.remaining)}"
        return f"{words.clock(self.elapsed)}{left}"

    def labelled(self) -> list[tuple[str, str]]:
        """(short name, value) of the figures to show."""
        shown = FIGURES if "reward" in self.figures else (*FIGURES, LOSS)
        return [(label, form(self.figures[key])) for key, label, form in shown if key in self.figures]


class RichProgress:
    """Live bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._phase: Phase | None = None
        self._live: Live | None = None

    def phase(self, title: str, total: int | None) -> None:
        self.close()
        self._phase = Phase(title, total, self._clock)
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)
            self._live.start()
        else:
            self._print(f"{title}: {'' if total is None else f'{total} steps, '}started")

    def advance(self, figures: Mapping[str, float]) -> None:
        phase = self._phase
        if phase is None:
            return
        phase.advance(figures)
        if self._live is None and phase.total and _reports(phase.done, phase.total):
            self._print(_plain_line(phase))

    def note(self, text: str) -> None:
        self._print(text)

    def close(self, completed: bool = True) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._phase is not None and self._phase.total is None:
            how = "done in" if completed else "stopped after"
            self._print(f"{self._phase.title}: {how} {words.duration(self._phase.elapsed)}")
        self._phase = None

    def _render(self) -> RenderableType:
        return "" if self._phase is None else render_phase(self._phase, self._console.width)

    def _print(self, text: str) -> None:
        # Brackets in a message are text, and a log line is not folded at the width of a missing terminal.
        self._console.print(text, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)


def render_phase(phase: Phase, width: int) -> RenderableType:
    """Title, bar, count and time on one line, figures on the next; nothing wraps at any width."""
    ends = Text(f" {phase.count}  {phase.times}")
    title = Text(f"{phase.title} ", style="bold")
    title.truncate(max(1, width - ends.cell_len - 6), overflow="ellipsis")
    room = max(1, width - title.cell_len - ends.cell_len)
    line = Table.grid(padding=0)
    for column in (title.cell_len, room, ends.cell_len):
        line.add_column(width=column, no_wrap=True)
    bar = ProgressBar(
        total=phase.total,
        completed=phase.done,
        width=room,
        pulse=phase.total is None,
        complete_style="blue",
        finished_style="blue",
        pulse_style="blue",
    )
    line.add_row(title, bar, ends)
    return Group(line, _figures_line(phase.labelled(), width))


def _figures_line(figures: Iterable[tuple[str, str]], width: int) -> Text:
    """As many figures as fit."""
    line = Text(no_wrap=True, overflow="crop")
    for label, value in figures:
        separator = "  " if line else ""
        if line.cell_len + len(separator) + len(label) + 1 + len(value) > width:
            break
        line.append(f"{separator}{label} ", style="dim").append(value)
    return line


def _reports(done: int, total: int) -> bool:
    """Whether unit ``done`` is the first one in its twentieth of the phase."""
    return done * PLAIN_LINES // total > (done - 1) * PLAIN_LINES // total


def _plain_line(phase: Phase) -> str:
    figures = "".join(f", {label} {value}" for label, value in phase.labelled())
    left = f", about {words.clock(phase.remaining)} left" if phase.done < (phase.total or 0) else ""
    return f"{phase.title} {phase.count}{figures}, {words.clock(phase.elapsed)} gone{left}"


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the end of a run: accuracy before and after, where the time went, where the results are.

    Keys are those of summary.json; what is absent is left out.
    """
    rows = [*_accuracies(summary), *_times(summary), *_variance(summary), *_places(summary)]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def _accuracies(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, name in (("greedy_accuracy", "greedy accuracy"), ("accuracy", "sampled accuracy")):
        ends = [_with_interval(summary, f"{key}_{end}") for end in ("before", "after")]
        if known := [end for end in ends if end]:
            rows.append((name, " → ".join(known)))
    return [("held-out", "before → after [95 % interval]"), *rows] if rows else []


def _with_interval(summary: Mapping[str, Any], key: str) -> str:
    """``72.4 % [68, 76]``: a proportion with its interval."""
    value, bounds = words.number(summary, key), words.interval(summary, key)
    if value is None:
        return ""
    between = f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]" if bounds else ""
    return f"{100 * value:.1f} %{between}"


def _times(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    wall = words.number(summary, "wall_seconds")
    rows = [] if wall is None else [("wall time", words.duration(wall))]
    for part in ("sampling", "training", "waiting"):
        seconds = words.number(summary, f"seconds_{part}")
        if seconds is not None:
            share = f", {words.percent(seconds / wall)} of it" if wall else ""
            rows.append((part, f"{words.duration(seconds)}{share}"))
    return rows


def _variance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    speed, ess = words.number(summary, "tokens_per_second"), words.number(summary, "ess_ratio_mean")
    lags = [words.number(summary, key) for key in ("lag_mean", "lag_max")]
    rows = []
    if speed is not None:
        rows.append(("tokens per second", words.amount(speed)))
    if None not in lags:
        rows.append(("policy lag", f"mean {words.amount(lags[0])}, max {words.amount(lags[1])}"))
    if ess is not None:
        rows.append(("mean ESS ratio", words.amount(ess)))
    if failed := words.number(summary, "failed_episodes"):
        rows.append(("failed episodes", f"{words.amount(failed)}; the samplers' logs say why"))
    if failed := words.number(summary, "accuracy_after_failed"):
        told = f"{words.amount(failed)}, counted as wrong answers; the samplers' logs say why"
        rows.append(("failed held-out episodes", told))
    return rows


def _places(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = (("run_folder", "run folder"), ("report", "report"), ("model_folder", "model"))
    return [(name, str(summary[key])) for key, name in names if summary.get(key)]
