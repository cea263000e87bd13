"""What a person sees while a comparison goes on: a bar with the time left, and a line a run that ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vcpo.compare.grid import Cell
from vcpo.monitor import words


class GridProgress:
    """Counts runs and steps; a live bar on a terminal, lines alone elsewhere."""

    def __init__(
        self, title: str, runs: int, steps: int, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``steps``: those left to take, of all ``runs`` together."""
        self._title, self._runs, self._steps, self._console, self._clock = title, runs, steps, console, clock
        self._ended = self._taken = 0
        self._begun = clock()
        self._now: Sequence[Cell] = ()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> GridProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def steps(self, count: int) -> None:
        self._taken += count

    def running(self, cells: Sequence[Cell]) -> None:
        self._now = cells

    def ended(self, cell: Cell, error: str | None, told: str, missing: int) -> None:
        """A line about a run: ``told`` is what came out, ``missing`` the steps that a failed one leaves."""
        self._ended += 1
        self._steps -= missing
        how = told if error is None else f"failed: {error}"
        left = f"; about {words.clock(self.remaining)} left" if self._ended < self._runs else ""
        text = Text(f"{self._ended}/{self._runs} {cell}: {how}{left}")
        self._console.print(text, highlight=False, soft_wrap=True)

    @property
    def remaining(self) -> float | None:
        """Seconds at the mean pace so far; None before the first step."""
        if self._taken <= 0:
            return None
        return (self._clock() - self._begun) / self._taken * max(0, self._steps - self._taken)

    def _render(self) -> RenderableType:
        elapsed = self._clock() - self._begun
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(self._title, style="bold"),
            ProgressBar(
                total=max(1, self._steps), completed=max(0, self._taken), width=24, complete_style="blue"
            ),
            Text(f"{self._ended}/{self._runs} runs"),
            Text(f"{words.clock(elapsed)} < {words.clock(self.remaining)}"),
            Text("; ".join(map(str, self._now)), style="dim", no_wrap=True, overflow="ellipsis"),
        )
        return line
