"""The tables of a comparison, on the terminal and as Markdown: a line a method and lag, and, if there are
several lags, an overview before it: a line a method, a column a lag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vcpo.compare.results import COMPLETED, FAILED, UNFINISHED, Mean, Summary, lags_of
from vcpo.monitor import words
from vcpo.monitor.sinks import write_atomically

TABLE_FILE = "table.md"

HEADINGS = (
    *("lag", "method", "runs", "greedy before", "greedy after", "sampled before", "sampled after"),
    *("ESS ratio", "step scale", "collapses"),
)

ACCURACIES = ("greedy_accuracy_before", "greedy_accuracy_after", "accuracy_before", "accuracy_after")
CAPTION = "Means over seeds with 95 % intervals of the mean (Student's t); accuracy is on held-out problems."
OVERVIEW_CAPTION = (
    "Greedy accuracy in % after training, by policy lag: mean ± half of its 95 % interval (completed runs); "
    "† how many of them collapsed. Best mean over lags first, methods without a figure at some lag last."
)


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


def by_method(summaries: Sequence[Summary]) -> dict[str, dict[int, Summary]]:
    """Each method's summaries by lag, in the order of the overview: by the mean over lags of greedy accuracy,
    the best first; those that have no figure at some lag come last, and controls after their method."""
    methods: dict[str, dict[int, Summary]] = {}
    for summary in summaries:
        methods.setdefault(summary.method, {})[summary.lag] = summary
    families = {m: next(iter(own.values())).results[0].cell.family for m, own in methods.items()}
    lags = len(lags_of(summaries))

    def place(method: str) -> tuple[int, float]:
        own = methods.get(method, {}).values()
        known = [mean.value for summary in own if (mean := summary.mean("greedy_accuracy_after"))]
        return lags - len(known), -fmean(known) if known else 0.0

    order = sorted(methods, key=lambda m: (*place(families[m]), families[m], m != families[m]))
    return {method: methods[method] for method in order}


def overview(summaries: Sequence[Summary]) -> list[list[str]]:
    """Headings, and then a row for every method."""
    lags = lags_of(summaries)
    rows = [
        [method, *(_at_a_lag(own.get(lag)) for lag in lags)] for method, own in by_method(summaries).items()
    ]
    return [["method", *(f"lag {lag}" for lag in lags)], *rows]


def _at_a_lag(summary: Summary | None) -> str:
    """``72 ±4 (5) †1``, ``72 (1), 4 failed``, ``5 failed``."""
    if summary is None:
        return words.NOTHING
    failed = f"{n} {FAILED}" if (n := summary.count(FAILED)) else ""
    mean = summary.mean("greedy_accuracy_after")
    if mean is None:
        return failed or words.NOTHING
    half = f" ±{100 * (mean.high - mean.low) / 2:.0f}" if len(mean.each) > 1 else ""
    collapsed = sum(r.status == COMPLETED and r.collapsed_at is not None for r in summary.results)
    fallen = f" †{collapsed}" if collapsed else ""
    return ", ".join(filter(None, [f"{100 * mean.value:.0f}{half} ({len(mean.each)}){fallen}", failed]))


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


def rich_tables(summaries: Sequence[Summary]) -> list[RenderableType]:
    """Without the accuracies before training, so that they can be read in 80 columns."""
    shown = [place for place, heading in enumerate(HEADINGS) if "before" not in heading]
    rows = [[line[place] for place in shown] for line in (HEADINGS, *lines(summaries))]
    whole = _rich(rows, f"{CAPTION} Those before training: {TABLE_FILE}.")
    if len(lags_of(summaries)) < 2:
        return [whole]
    return [_rich(overview(summaries), OVERVIEW_CAPTION), whole]


def _rich(rows: Sequence[Sequence[str]], caption: str) -> RenderableType:
    """The caption is as wide as the screen: a table's own would be as narrow as the table."""
    table = Table()
    table.box, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return Group(table, Text(f"{caption}\n"))


def markdown(summaries: Sequence[Summary]) -> str:
    whole = _markdown([HEADINGS, *lines(summaries)], CAPTION)
    if len(lags_of(summaries)) < 2:
        return whole
    return f"{_markdown(overview(summaries), OVERVIEW_CAPTION)}\n{whole}"


def _markdown(rows: Sequence[Sequence[str]], caption: str) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in ruled)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped) + f"\n{caption}\n"


def write_table(summaries: Sequence[Summary], out: Path) -> Path:
    path = out / TABLE_FILE
    write_atomically(path, markdown(summaries))
    return path
