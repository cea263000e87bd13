"""The report's figures, as inline SVG that follows the page's colours.

matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables: one drawing
serves a light and a dark page. Text stays text, so it is set in the reader's own font and can be selected.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vcpo.monitor.statistics import Row, ema, lag_counts, series

INK, GRID, ACCENT, SECOND, THIRD, FOURTH = (f"#0a0b{shade:02x}" for shade in range(1, 7))
PALETTE = tuple(f"#0c0d{shade:02x}" for shade in range(1, 9))
"""Placeholders of curves that are one of many; the page has ``--c0`` to ``--c7``."""
_VARIABLES = {
    **{placeholder: f"var(--c{i})" for i, placeholder in enumerate(PALETTE)},
    INK: "var(--muted)",
    GRID: "var(--grid)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
}

CLASS = "class:"
"""Begins the gid of an artist that stands for classes of its element, of which a page may have many."""

SIZE = (4.2, 2.6)
"""Inches, at 72 points: 302 wide, so that a phone of 360 pixels shows it at its own size."""
FEW_POINTS = 40
"""Up to this many points a curve also shows each of them."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}

NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}

Average = Callable[[Sequence[float], float], list[float]]

Draw = Callable[[Axes], bool]
"""Draws into the axes; false if there was nothing to draw."""


def svg(draw: Draw, name: str) -> str | None:
    """The drawing as an ``<svg>`` element labelled ``name``; None if there was nothing to draw."""
    # The salt makes element ids unique among the figures of one page, and the same in every run.
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        if not draw(figure.add_subplot()):
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = text.replace(f'id="{CLASS}', 'class="')
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def curve(axes: Axes, rows: Sequence[Row], key: str, colour: str, *, smooth: bool = True) -> bool:
    """Draw ``key`` over steps: its points if they are few; with ``smooth``, light under a smoothed line."""
    return _line(axes, *series(rows, key), colour, ema if smooth else None)


def _line(
    axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, average: Average | None
) -> bool:
    if not values:
        return False
    if average and len(values) > FEW_POINTS:
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
        axes.plot(steps, average(values, max(5.0, len(values) / 60)), color=colour)
    else:
        axes.plot(steps, values, color=colour, marker="o" if len(values) <= FEW_POINTS else "", markersize=4)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticks(whole=True))
    axes.yaxis.set_major_locator(ticks())
    return True


def geometric(values: Sequence[float], half_life: float) -> list[float]:
    """The moving average that a log axis shows straight: one spike does not lift it."""
    return [math.exp(mean) for mean in ema([math.log(value) for value in values], half_life)]


def ticks(*, whole: bool = False) -> MaxNLocator:
    """At most five round steps."""
    return MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with round, plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", size=0)


def from_zero(axes: Axes, highest: float = 0.0) -> None:
    """Let the y axis begin at 0, unless there are negative values, and end no lower than ``highest``."""
    low, high = axes.get_ylim()
    axes.set_ylim(low if axes.dataLim.y0 < 0 else 0.0, max(high, highest))


def reward(rows: Sequence[Row]) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = curve(axes, rows, "reward", ACCENT)
        from_zero(axes)
        return drawn

    return draw


def accuracy(rows: Sequence[Row]) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = [
            curve(axes, rows, "greedy_accuracy", ACCENT, smooth=False),
            curve(axes, rows, "accuracy", SECOND, smooth=False),
        ]
        from_zero(axes)
        return any(drawn)

    return draw


def ess(rows: Sequence[Row]) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = [
            curve(axes, rows, "ess_ratio", ACCENT),
            curve(axes, rows, "step_scale", SECOND),
        ]
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        return any(drawn)

    return draw


def gradient(rows: Sequence[Row]) -> Draw:
    positive = [row for row in rows if (row.get("grad_norm") or 0) > 0]

    def draw(axes: Axes) -> bool:
        drawn = _line(axes, *series(positive, "grad_norm"), ACCENT, geometric)
        if drawn:
            log_scale(axes)
        return drawn

    return draw


def divergence(rows: Sequence[Row]) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = [
            curve(axes, rows, "ratio_variance", SECOND),
            curve(axes, rows, "kl", ACCENT),
        ]
        from_zero(axes)
        return any(drawn)

    return draw


def lag(rows: Sequence[Row]) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = [
            curve(axes, rows, "lag_max", SECOND),
            curve(axes, rows, "lag_mean", ACCENT),
        ]
        from_zero(axes, 1.05 * max(1.0, axes.dataLim.y1))
        axes.yaxis.set_major_locator(ticks(whole=True))
        return any(drawn)

    return draw


def lag_histogram(rows: Sequence[Row]) -> Draw:
    counts = lag_counts(rows)
    groups = sum(counts.values())

    def draw(axes: Axes) -> bool:
        if not groups:
            return False
        axes.set_xlim(min(counts) - 1, max(counts) + 1)  # a single bar keeps whole numbers beside it
        axes.bar(list(counts), [count / groups for count in counts.values()], color=ACCENT, width=0.8)
        axes.set_xlabel("policy lag, steps")
        axes.set_xlim(min(counts) - 0.6, max(counts) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        return True

    return draw


def ess_by_length(record: Mapping[str, Any]) -> Draw:
    """Of a calibration: predicted on-policy ESS ratio over response length, and the measured ones."""
    rows = record["lengths"]
    measured = [row for row in rows if "measured" in row]

    def draw(axes: Axes) -> bool:
        lengths = [row["length"] for row in rows]
        steps = [row["in_minibatch"] for row in rows]
        low, high = ([step[bound] for step in steps] for bound in ("low", "high"))
        axes.fill_between(lengths, low, high, color=ACCENT, alpha=0.2, linewidth=0)
        axes.plot(lengths, [step["value"] for step in steps], color=ACCENT)
        for row in measured:
            expected = row["expected"]
            axes.plot([row["length"]] * 2, [expected["low"], expected["high"]], color=SECOND, alpha=0.35)
        points = [row["length"] for row in measured], [row["measured"] for row in measured]
        axes.plot(*points, color=SECOND, linestyle="", marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda length, _: f"{length:g}")
        axes.set_xlabel("sampled tokens")
        axes.set_ylim(0, 1.05)
        return bool(rows)

    return draw
