"""What the records of ``benchmarks.bank`` say: sums over prompts, rank correlations, tables, the figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.proxies import Figure, bootstrap, spearman

Record = dict[str, Any]
Prompts = Sequence[Record]

SHOWN_SIZE = 8
RESAMPLINGS = 200
LEAVE_ONE_OUT = "leave-one-out"
TRUNCATED = "truncated, leave-one-out"
STRATA = {"below .2": (0.0, 0.2), ".2 to .8": (0.2, 0.8), "above .8": (0.8, 1.01)}
"""Of the prompts, by their mean reward."""


# Baselines


def table_of(prompts: Prompts, size: int, weights: str, baseline: str) -> np.ndarray:
    """[P, 8] second, mean, drift, along, cosine, truth, ‖g‖², ‖g₀‖² of each prompt."""
    rows = []
    for prompt in prompts:
        (m,) = [
            m
            for m in prompt["moments"]
            if (m["size"], m["weights"], m["baseline"]) == (size, weights, baseline)
        ]
        moments = [m[key] for key in ("second", "mean", "drift", "along", "cosine", "truth")]
        rows.append([*moments, prompt["norms"][weights], prompt["truth_norm"]])
    return np.array(rows)


def rescaled_variance(table: np.ndarray) -> float:
    """Trace of the covariance ÷ ‖g‖², of ĝ scaled to project on g as g does."""
    second, mean, _, along, _, _, norm, _ = table.sum(0)
    scale = 1 + along / norm
    return (second - mean) / norm / scale**2


def alignment(table: np.ndarray) -> float:
    """E ĝ · g₀ / sqrt(E‖ĝ‖² ‖g₀‖²)."""
    second, _, _, _, _, truth, _, truth_norm = table.sum(0)
    return truth / math.sqrt(second * truth_norm)


def figures_of(table: np.ndarray) -> dict[str, float]:
    """The columns of the report, but the noise."""
    second, mean, drift, along, _, _, norm, _ = table.sum(0)
    scale, bias = 1 + along / norm, drift / norm
    return {
        "scale": scale,
        "bias": math.sqrt(max(0.0, bias)),
        "turn": math.sqrt(max(0.0, bias - (along / norm) ** 2)) / abs(scale),
        "variance": (second - mean) / norm,
        "rescaled": rescaled_variance(table),
        "cosine": float(np.nanmean(table[:, 4])),
        "truth": alignment(table),
    }


def noise(prompts: Prompts, size: int, weights: str, baseline: str, resamplings: int = RESAMPLINGS) -> Figure:
    """Rescaled variance ÷ that of leave-one-out, with its interval over prompts."""
    own, other = (table_of(prompts, size, weights, name) for name in (baseline, LEAVE_ONE_OUT))

    def ratio(rows: np.ndarray) -> float:
        return rescaled_variance(own[rows]) / rescaled_variance(other[rows])

    if not resamplings:
        return Figure(ratio(np.arange(len(own))), math.nan, math.nan)
    return bootstrap(ratio, len(own), resamplings)


def gain(prompts: Prompts, size: int, weights: str, baseline: str) -> Figure:
    """Truth minus that of leave-one-out, with its interval over prompts."""
    own, other = (table_of(prompts, size, weights, name) for name in (baseline, LEAVE_ONE_OUT))
    return bootstrap(lambda rows: alignment(own[rows]) - alignment(other[rows]), len(own), RESAMPLINGS)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each once, in the order in which they appear."""
    return list(dict.fromkeys(values))


def keys(prompts: Prompts, key: str, weights: str | None = None) -> list[Any]:
    return distinct(m[key] for m in prompts[0]["moments"] if weights in (None, m["weights"]))


def geometric_mean(prompts: Prompts, key: str) -> float:
    values = [prompt[key] for prompt in prompts if prompt.get(key, 0) > 0]
    return float(np.exp(np.mean(np.log(values)))) if values else math.nan


COLUMNS = ("scale", "bias", "turn", "variance", "rescaled", "cosine", "truth")


def print_baselines(console: Console, title: str, runs: Sequence[Prompts]) -> None:
    """One situation; ``runs`` has the prompts of each seed."""
    prompts = [prompt for run in runs for prompt in run]
    for weights in keys(prompts, "weights"):
        console.print(table_of_columns(f"{title}, {weights}", runs, weights))
        console.print(table_of_sizes(f"{title}, {weights}", prompts, weights))
        console.print(table_of_strata(f"{title}, {weights}", prompts, weights))
    console.print(f"{title}: {explained(prompts)}\n")


def table_of_columns(title: str, runs: Sequence[Prompts], weights: str) -> Table:
    prompts = [prompt for run in runs for prompt in run]
    table = Table(
        "baseline", *COLUMNS, "gain in truth", "noise", "each seed", title=f"{title}, G = {SHOWN_SIZE}"
    )
    for baseline in keys(prompts, "baseline"):
        figures = figures_of(table_of(prompts, SHOWN_SIZE, weights, baseline))
        seeds = [noise(run, SHOWN_SIZE, weights, baseline, 0).value for run in runs]
        cells = [f"{figures[column]:.3g}" for column in COLUMNS]
        whole = noise(prompts, SHOWN_SIZE, weights, baseline)
        better = gain(prompts, SHOWN_SIZE, weights, baseline)
        cells.append(f"{better.low:+.3f} to {better.high:+.3f}")
        table.add_row(baseline, *cells, str(whole), " ".join(f"{value:.2f}" for value in seeds))
    return table


def table_of_sizes(title: str, prompts: Prompts, weights: str) -> Table:
    sizes = keys(prompts, "size", weights)
    table = Table("baseline", *(f"G = {size}" for size in sizes), title=f"{title}: noise, turn, truth")
    for baseline in keys(prompts, "baseline"):
        cells = []
        for size in sizes:
            figures = figures_of(table_of(prompts, size, weights, baseline))
            value = noise(prompts, size, weights, baseline, 0).value
            cells.append(f"{value:.2f}, {figures['turn']:.2f}, {figures['truth']:.2f}")
        table.add_row(baseline, *cells)
    return table


def table_of_strata(title: str, prompts: Prompts, weights: str) -> Table:
    parts = {
        name: part
        for name, (low, high) in STRATA.items()
        if len(part := [prompt for prompt in prompts if low <= prompt["reward"] < high]) > 1
    }
    headings = [f"{name}: {len(part)} prompts" for name, part in parts.items()]
    table = Table("baseline", *headings, title=f"{title}, G = {SHOWN_SIZE}: noise, truth by mean reward")
    for baseline in keys(prompts, "baseline"):
        cells = []
        for part in parts.values():
            truth = figures_of(table_of(part, SHOWN_SIZE, weights, baseline))["truth"]
            cells.append(f"{noise(part, SHOWN_SIZE, weights, baseline)}, {truth:.2f}")
        table.add_row(baseline, *cells)
    return table


def explained(prompts: Prompts) -> str:
    """How failures differ from successes, in a sentence."""

    def share(part: str, whole: str) -> float:
        return sum(p[part] for p in prompts) / sum(p[whole] for p in prompts)

    def mean(key: str) -> float:
        return float(np.mean([p[key] for p in prompts]))

    signal = sum(p["failed_signal"] for p in prompts) / sum(p["norms"]["truncated"] for p in prompts)
    optima = {name: float(np.mean([p["optima"][name] for p in prompts])) for name in prompts[0]["optima"]}
    parts = [
        f"mean reward {mean('reward'):.2f}",
        *(f"optimal baseline of {name} weights {value:.2f}" for name, value in optima.items()),
        f"failures are {mean('failures'):.2f} of the rollouts",
        f"{share('failed_terms', 'terms'):.2f} of the variance",
        f"{signal:.2f} of the signal along g",
    ]
    parts.append(f"{share('failed_truth_signal', 'truth_signal'):.2f} of that along the true gradient")
    ratios = {"‖s‖²": "score_ratio", "‖s/L‖²": "normalised_score_ratio", "w²": "squared_weight_ratio"}
    parts += [f"{name} ×{geometric_mean(prompts, key):.2f} of successes'" for name, key in ratios.items()]
    return ", ".join(parts) + f"; {mean('distinct'):.0f} different rollouts a prompt"


# ESS


def targets_of(record: Record) -> dict[str, float]:
    """What the ESS might tell: variance ÷ ‖true gradient‖²; of the truncated estimator also ÷ its own squared
    mean, and 1 − squared cosine of the minibatch's gradient with the true one. Infinite or 1 where the mean
    cannot be told from 0."""
    estimators, true = record["estimators"], record["true_norm"]
    found = {f"{name}: variance": e["variance"] / true for name, e in estimators.items()}
    e = estimators[TRUNCATED]
    second, along = e["variance"] + max(e["squared_mean"], 0.0), max(e["along_truth"], 0.0)
    found["÷ own mean²"] = e["variance"] / e["squared_mean"] if e["squared_mean"] > 0 else math.inf
    found["off course"] = 1 - min(1.0, along**2 / (second * true))
    return found


def correlations(records: Sequence[Record]) -> dict[str, dict[str, Figure]]:
    """Spearman of 1 − ESS ratio, and of the lag, with each target; bootstrap over situations."""
    predictors = {"lag": np.array([float(r["lag"]) for r in records])}
    predictors |= {name: np.array([1 - r["ess"][name] for r in records]) for name in records[0]["ess"]}
    rows = [targets_of(r) for r in records]
    targets = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        name: {target: correlation_of(x, y) for target, y in targets.items()}
        for name, x in predictors.items()
    }


def correlation_of(x: np.ndarray, y: np.ndarray) -> Figure:
    return bootstrap(lambda rows: spearman(x[rows], y[rows]), len(x), RESAMPLINGS)


def print_situations(console: Console, title: str, records: Sequence[Record]) -> None:
    names = list(records[0]["ess"])
    columns = ("seed", "t", "k", "reward", *names, *targets_of(records[0]))
    table = Table(*columns, title=f"{title}: ESS ratios, and what is measured")
    for record in records:
        table.add_row(
            *(str(record[key]) for key in ("seed", "step", "lag")),
            f"{record['reward']:.2f}",
            *(f"{record['ess'][name]:.3f}" for name in names),
            *(f"{value:.3g}" for value in targets_of(record).values()),
        )
    console.print(table)


def print_correlations(console: Console, title: str, records: Sequence[Record]) -> None:
    for subset, part in (("all lags", records), ("lags above 0", [r for r in records if r["lag"]])):
        found = correlations(part)
        table = Table("1 − ESS ratio", *next(iter(found.values())), title=f"{title}, {subset}: Spearman")
        for name, figures in found.items():
            table.add_row(name, *(f"{f.value:.2f} ({f.low:.2f} to {f.high:.2f})" for f in figures.values()))
        console.print(table)


# Report


def print_report(records: Sequence[Record]) -> None:
    console = Console(width=180)
    for task in distinct(r["task"] for r in records):
        of_task = [r for r in records if r["task"] == task]
        print_situations(console, task, [r for r in of_task if r["kind"] == "ess"])
        for lag in distinct(r["lag"] for r in of_task if r["kind"] == "baselines"):
            runs = [r["prompts"] for r in of_task if r["kind"] == "baselines" and r["lag"] == lag]
            print_baselines(console, f"{task}, lag {lag}", runs)
    ess = [r for r in records if r["kind"] == "ess"]
    tasks = distinct(r["task"] for r in ess)
    for task in tasks:
        print_correlations(console, task, [r for r in ess if r["task"] == task])
    if len(tasks) > 1:
        print_correlations(console, "all tasks", ess)
    shares = [r["ess_share_of_step"] for r in records if r["kind"] == "time"]
    console.print(f"ESS: {min(shares):.2%} to {max(shares):.2%} of a step's time")


COLOURS = {
    "zero": "#c9731a",
    "leave-one-out": "#52606d",
    "below-mean 0.1": "#8f6bb3",
    "bounded-optimal 0": "#3c9160",
    "optimal": "#3f78bd",
    "split-half-optimal": "#b33c5a",
}
ESTIMATORS = {"untruncated, leave-one-out": "#c9731a", TRUNCATED: "#52606d", "truncated, optimal": "#3f78bd"}


def write_figure(records: Sequence[Record], path: Path) -> None:
    """Left: truth over G at the largest lag of the first task. Right: ESS and variance of all situations."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    from vcpo.monitor.figures import NO_METADATA, STYLE

    plain = {key: value for key, value in STYLE.items() if "color" not in key}
    with rc_context({**plain, "svg.hashsalt": "bank"}):
        drawing = Drawing(figsize=(9, 3.6), layout="constrained")
        FigureCanvasAgg(drawing)
        left, right = drawing.subplots(1, 2)
        _draw_truth(left, records)
        _draw_ess(right, [r for r in records if r["kind"] == "ess"])
        drawing.savefig(path, format="svg", metadata=NO_METADATA)


def _draw_truth(axes: Any, records: Sequence[Record]) -> None:
    found = [r for r in records if r["kind"] == "baselines" and r["task"] == records[0]["task"]]
    lag = max(r["lag"] for r in found)
    prompts = [prompt for r in found if r["lag"] == lag for prompt in r["prompts"]]
    sizes = keys(prompts, "size", "truncated")
    for baseline, colour in COLOURS.items():
        values = [figures_of(table_of(prompts, size, "truncated", baseline))["truth"] for size in sizes]
        axes.plot(sizes, values, color=colour, marker="o", markersize=3, label=baseline)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("group size G")
    axes.set_title(f"{records[0]['task']}, lag {lag}, truncated weights: truth", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _draw_ess(axes: Any, records: Sequence[Record]) -> None:
    for name, colour in ESTIMATORS.items():
        x = [r["ess"]["sequence"] for r in records]
        y = [r["estimators"][name]["variance"] / r["true_norm"] for r in records]
        axes.plot(x, y, color=colour, linestyle="", marker="o", markersize=4, alpha=0.8, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("ESS ratio of sequence weights, untruncated")
    axes.set_title("variance of the minibatch gradient ÷ ‖on-policy gradient‖²", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
