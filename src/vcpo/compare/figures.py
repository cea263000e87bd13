"""The figures of a comparison: curves of many runs, one colour a method, one dash a control of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from vcpo.compare.results import COMPLETED, FAILED, Result, Summary, lags_of
from vcpo.monitor.figures import CLASS, PALETTE, Draw, from_zero, geometric, log_scale, ticks
from vcpo.monitor.statistics import ema, series

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))
"""Of a method itself, and of its controls."""
MOST_POINTS = 120
"""Points of a drawn line: what a figure of this size shows."""
COLLAPSE, FAILURE = "X", "v"
"""Markers."""

Point = tuple[int, float]


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: int
    """Index into PALETTE."""
    dash: int
    """Index into DASHES."""
    number: int
    """Of the method, in the order of the grid."""

    @property
    def line(self) -> Mapping[str, Any]:
        return {"color": PALETTE[self.colour], "linestyle": DASHES[self.dash]}

    @property
    def classes(self) -> str:
        """Of the page's legend."""
        return f"c{self.colour} d{self.dash} m{self.number}"

    @contextmanager
    def mark(self, axes: Axes) -> Iterator[None]:
        """What is drawn meanwhile belongs to the method: the page can show it alone."""
        before = len(axes.lines)
        yield
        for line in axes.lines[before:]:
            line.set_gid(f"{CLASS}series m{self.number}")


def styles_of(results: Sequence[Result]) -> dict[str, Style]:
    """A colour for every method, and another dash for each control of it."""
    colours: dict[str, int] = {}
    used: dict[str, int] = {}
    styles: dict[str, Style] = {}
    for result in results:
        label = result.cell.method
        family = result.cell.family
        if label not in styles:
            colour = colours.setdefault(family, len(colours))
            dash = used[family] = used.get(family, -1) + 1
            dash = (dash + colour // len(PALETTE)) % len(DASHES)
            styles[label] = Style(colour % len(PALETTE), dash, len(styles))
    return styles


Chart = tuple[str, str, Draw]
"""Title, subtitle and drawing."""


def sections(
    results: Sequence[Result], summaries: Sequence[Summary], styles: Mapping[str, Style]
) -> Iterator[tuple[str, list[Chart]]]:
    """Headings and charts: accuracy at the end over lags, then everything over steps, lag by lag."""
    how = "held-out, after training; interval over seeds"
    yield (
        "Final accuracy against policy lag",
        [
            ("Greedy accuracy", how, accuracy_over_lags(summaries, "greedy_accuracy_after", styles)),
            ("Sampled accuracy", how, accuracy_over_lags(summaries, "accuracy_after", styles)),
        ],
    )
    for lag in lags_of(summaries):
        own = [result for result in results if result.cell.lag == lag]
        yield f"Lag {lag}, over steps", _charts_over_steps(own, styles)


def _charts_over_steps(results: Sequence[Result], styles: Mapping[str, Style]) -> list[Chart]:
    def ratio(key: str) -> Draw:
        return over_steps(results, key, styles, highest=1.02)

    return [
        ("Greedy accuracy", "held-out problems", accuracy_over_steps(results, "greedy_accuracy", styles)),
        ("Sampled accuracy", "held-out problems", accuracy_over_steps(results, "accuracy", styles)),
        ("Reward", "of the minibatches, smoothed", over_steps(results, "reward", styles)),
        ("ESS ratio", "1 is on-policy", ratio("ess_ratio")),
        ("Gradient norm", "before clipping, log scale", positive_over_steps(results, "grad_norm", styles)),
        ("Step scale", "factor on the learning rate", ratio("step_scale")),
    ]


def accuracy_over_lags(summaries: Sequence[Summary], key: str, styles: Mapping[str, Style]) -> Draw:
    """Mean after training at each lag with its 95 % interval, and every seed as a dot."""
    lags = lags_of(summaries)
    width = 0.5 / max(1, len(styles) - 1)

    def draw(axes: Axes) -> bool:
        for number, (method, style) in enumerate(styles.items()):
            shift = (number - (len(styles) - 1) / 2) * width if len(styles) > 1 else 0.0
            own = [summary for summary in summaries if summary.method == method]
            with style.mark(axes):
                _one_over_lags(axes, own, key, style, {lag: i + shift for i, lag in enumerate(lags)})
        axes.set_xticks(range(len(lags)), list(map(str, lags)))
        axes.set_xlim(-0.5, len(lags) - 0.5)
        axes.set_xlabel("policy lag, steps")
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        return bool(summaries)

    return draw


def _one_over_lags(
    axes: Axes, summaries: Sequence[Summary], key: str, style: Style, places: Mapping[int, float]
) -> None:
    known = [(places[s.lag], mean) for s in summaries if (mean := s.mean(key)) is not None]
    axes.plot(
        [x for x, _ in known], [mean.value for _, mean in known], marker="o", markersize=4, **style.line
    )
    for x, mean in known:
        axes.plot([x, x], [max(mean.low, 0), min(mean.high, 1)], color=PALETTE[style.colour], linewidth=1)
    for summary in summaries:
        for result in summary.results:
            _seed(axes, places[summary.lag], result, key, PALETTE[style.colour])


def _seed(axes: Axes, x: float, result: Result, key: str, colour: str) -> None:
    value = result.figure(key)
    if result.status == FAILED:
        _mark(axes, (x, 0.0), FAILURE, colour)
    elif value is not None and result.collapsed_at is not None:
        _mark(axes, (x, value), COLLAPSE, colour)
    elif value is not None:
        axes.plot([x], [value], marker="o", markersize=2.5, linestyle="", color=colour, alpha=0.45)


def _mark(axes: Axes, place: tuple[float, float], marker: str, colour: str) -> None:
    axes.plot(
        [place[0]],
        [place[1]],
        marker=marker,
        markersize=7,
        linestyle="",
        color=colour,
        markeredgewidth=0,
        zorder=5,
    )


def accuracy_over_steps(results: Sequence[Result], key: str, styles: Mapping[str, Style]) -> Draw:
    """``accuracy`` or ``greedy_accuracy`` of every evaluation, those before and after training included."""

    def evaluations(result: Result) -> list[Point]:
        points = dict(zip(*series(result.rows, key), strict=True))
        before, after = result.figure(f"{key}_before"), result.figure(f"{key}_after")
        ends = {0: before} | ({result.cell.config.pipeline.steps: after} if after is not None else {})
        return sorted((step, value) for step, value in (points | ends).items() if value is not None)

    return _over_steps(results, evaluations, styles, average=None, axes_of=from_zero)


def over_steps(
    results: Sequence[Result], key: str, styles: Mapping[str, Style], *, highest: float = 0.0
) -> Draw:
    """A metric, smoothed."""
    return _over_steps(
        results, lambda result: _points(result, key), styles, ema, lambda axes: from_zero(axes, highest)
    )


def positive_over_steps(results: Sequence[Result], key: str, styles: Mapping[str, Style]) -> Draw:
    """A metric on a logarithmic axis, its geometric means."""

    def positive(result: Result) -> list[Point]:
        return [(step, value) for step, value in _points(result, key) if value > 0]

    return _over_steps(results, positive, styles, geometric, log_scale)


def _points(result: Result, key: str) -> list[Point]:
    return list(zip(*series(result.rows, key), strict=True))


def _over_steps(
    results: Sequence[Result],
    points_of: Callable[[Result], list[Point]],
    styles: Mapping[str, Style],
    average: Callable[[Sequence[float], float], list[float]] | None,
    axes_of: Callable[[Axes], None],
) -> Draw:
    """A thin line a run, and a thick one of each method's mean over its completed runs."""

    def draw(axes: Axes) -> bool:
        drawn = False
        for method, style in styles.items():
            own = [(r, _smooth(points_of(r), average)) for r in results if r.cell.method == method]
            with style.mark(axes):
                drawn = _one_over_steps(axes, own, style) or drawn
        if drawn:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(ticks(whole=True))
            axes_of(axes)
        return drawn

    return draw


def _one_over_steps(axes: Axes, lines: Sequence[tuple[Result, list[Point]]], style: Style) -> bool:
    lines = [(result, line) for result, line in lines if line]
    for result, line in lines:
        _thin_line(axes, result, line, style)
    done = [line for result, line in lines if result.status == COMPLETED]
    if done and (mean := _mean_line(done)):  # runs may have no step in common
        _plot(axes, mean, **style.line)
    return bool(lines)


def _smooth(
    points: list[Point], average: Callable[[Sequence[float], float], list[float]] | None
) -> list[Point]:
    if average is None or not points:
        return points
    steps, values = zip(*points, strict=True)
    return list(zip(steps, average(values, max(5.0, len(values) / 60)), strict=True))


def _thin_line(axes: Axes, result: Result, line: list[Point], style: Style) -> None:
    colour = PALETTE[style.colour]
    _plot(axes, line, color=colour, linewidth=0.8, alpha=0.35)
    if (step := result.collapsed_at) is not None:
        _mark(axes, min(line, key=lambda point: abs(point[0] - step)), COLLAPSE, colour)
    if result.status == FAILED:
        _mark(axes, line[-1], FAILURE, colour)


def _plot(axes: Axes, line: list[Point], **style: Any) -> None:
    every = -(-len(line) // MOST_POINTS)
    kept = [*line[:-1:every], line[-1]]
    axes.plot([step for step, _ in kept], [value for _, value in kept], **style)


def _mean_line(lines: Sequence[list[Point]]) -> list[Point]:
    """At every step that all of the lines have."""
    tables = [dict(line) for line in lines]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, fmean(table[step] for table in tables)) for step in common]
