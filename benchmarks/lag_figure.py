"""The figure of docs/evidence/lag.md: accuracy after training over lags, in panels by what methods do with
stale rollouts, as thirty lines in one cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

PANELS: Mapping[str, Sequence[str]] = {
    "failures tapered or spared": ("vcpo-taper", "topr", "vespo", "reinforce", "asymre"),
    "a clip of PPO's kind": ("grpo", "dr-grpo", "dapo", "gspo", "stapo", "p3o", "m2po", "decoupled-ppo"),
    "weights truncated": ("tis", "tis-token", "tis-geometric", "cispo"),
    "weights masked": ("mis", "mis-token", "mis-geometric"),
    "VCPO, its halves and stacks": ("vcpo", "vcpo-ess", "vcpo-opob", "vcpo-clip-higher", "vcpo-stapo"),
    "no correction, and critics": ("rloo", "opo", "otb", "ppo", "vtrace"),
}
GREY = "0.85"
GAP = 0.055
"""Between two labels, in accuracy."""

Points = Mapping[int, Sequence[float]]
"""Accuracies of the seeds by lag."""


def draw_lags(methods: Mapping[str, Points], lags: Sequence[int], figure: Path) -> None:
    """A panel for each of PANELS that has any of ``methods``: its own in colour, every seed a dot, the others
    in grey behind them."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = {title: [n for n in own if n in methods] for title, own in PANELS.items()}
    panels = {title: own for title, own in panels.items() if own}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    drawing = Figure(figsize=(5.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasSVG(drawing)
    grid = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    for axes, (title, own) in zip(grid.flat, panels.items(), strict=False):
        for name, points in methods.items():
            if name not in own:
                axes.plot(*_means(points, lags), color=GREY, linewidth=0.8, zorder=1)
        ends = [_draw(axes, methods[name], lags) for name in own]
        heights = spread([end for _, end, _ in ends])
        for name, height, (last, _, colour) in zip(own, heights, ends, strict=True):
            axes.text(last + 0.15, height, name, color=colour, va="center", fontsize="small")
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xticks(range(len(lags)), list(map(str, lags)))
        axes.set_xlim(-0.2, len(lags) + 0.2)
        axes.set_ylim(-0.02, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("policy lag, steps")
    for axes in grid[:, 0]:
        axes.set_ylabel("sampled accuracy")
    drawing.savefig(figure, metadata={"Date": None})


def _means(points: Points, lags: Sequence[int]) -> tuple[list[int], list[float]]:
    known = [lag for lag in lags if points.get(lag)]
    return [lags.index(lag) for lag in known], [sum(points[lag]) / len(points[lag]) for lag in known]


def _draw(axes: Any, points: Points, lags: Sequence[int]) -> tuple[int, float, str]:
    """Where the line ends, and its colour."""
    places, means = _means(points, lags)
    line = axes.plot(places, means, zorder=3)[0]
    dots = [(lags.index(lag), value) for lag in lags for value in points.get(lag, ())]
    axes.plot(*zip(*dots, strict=True), "o", markersize=2.5, color=line.get_color(), alpha=0.5, zorder=2)
    return places[-1], means[-1], line.get_color()


def spread(heights: Sequence[float]) -> list[float]:
    """The same heights, moved so that labels there are GAP apart, in their order and between 0 and 1 if there
    is room."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + GAP)
    over = max(0.0, moved[order[-1]] - 1.0) if order else 0.0
    ceiling = moved[order[-1]] - over if order else 0.0
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - GAP
    return moved
