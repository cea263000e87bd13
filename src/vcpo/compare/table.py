"""The table of a comparison: a line a method and lag, on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from vcpo.compare.results import COMPLETED, FAILED, UNFINISHED, Mean, Summary
from vcpo.monitor import words
from vcpo.monitor.sinks import write_atomically

TABLE_FILE = "table.md"

HEADINGS = (
    *("lag", "method", "runs", "greedy before", "greedy after", "sampled before", "sampled after"),
    *("ESS ratio", "step scale", "collapses"),
)

ACCURACIES = ("greedy_accuracy_before", "greedy_accuracy_after", "accuracy_before", "accuracy_after")
CAPTION = "Means over seeds with 95 % intervals of the mean (Student's t); accuracy is on held-out problems."


def lines(summaries: Sequence[Summary]) -> list[list[str]]:
    """The cells of the table, below HEADINGS."""
    return [
        [
            str(summary.lag),
            summary.method,
            _runs(summary),
            *(_accuracy(summary.mean(key)) for key in ACCURACIES),
            *(_plain(summary.mean(key)) for key in ("ess_ratio_mean", "step_scale_mean")),
            f"{summary.collapses} of {len(summary.results)}",
        ]
        for summary in summaries
    ]


def _runs(summary: Summary) -> str:
    """``4``, or ``2, 1 failed, 1 unfinished``."""
    told = [f"{count} {status}" for status in (FAILED, UNFINISHED) if (count := summary.count(status))]
    return ", ".join([str(summary.count(COMPLETED)), *told])


def _accuracy(mean: Mean | None) -> str:
    """``72.4 % [68, 76]``."""
    if mean is None:
        return words.NOTHING
    bounds = f" [{100 * mean.low:.0f}, {100 * mean.high:.0f}]" if len(mean.each) > 1 else ""
    return f"{100 * mean.value:.1f} %{bounds}"


def _plain(mean: Mean | None) -> str:
    return words.NOTHING if mean is None else f"{mean.value:.3f}"


def rich_table(summaries: Sequence[Summary]) -> Table:
    """Without the accuracies before training, so that it can be read in 80 columns."""
    shown = [place for place, heading in enumerate(HEADINGS) if "before" not in heading]
    table = Table(caption=f"{CAPTION} Those before training: {TABLE_FILE}.", caption_justify="left")
    table.box, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
    for place in shown:
        table.add_column(HEADINGS[place], overflow="fold")
    for line in lines(summaries):
        table.add_row(*(Text(line[place]) for place in shown))
    return table


def markdown(summaries: Sequence[Summary]) -> str:
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *lines(summaries)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped) + f"\n{CAPTION}\n"


def write_table(summaries: Sequence[Summary], out: Path) -> Path:
    path = out / TABLE_FILE
    write_atomically(path, markdown(summaries))
    return path
