"""A calibration for people: two tables, what they say in words, and a chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vcpo.monitor import words

Record = Mapping[str, Any]

NEGLIGIBLE = 1e-3
"""Loss of ESS ratio, or nats of a whole sequence, that no step can notice."""
_ROWS = (
    ("rms", "RMS", "nats"),
    ("variance", "variance", "nats²"),
    ("rate", "v: −log of the tokens' ESS ratio", "nats²"),
    ("mean", "mean: minus the KL divergence", "nats"),
    ("drift", "log of the mean ratio, ideally 0", "nats"),
    ("correlation", "of sums, over uncorrelated ones'", ""),
)


def print_calibration(record: Record, console: Console) -> None:
    """What was measured, the ESS ratios that follow, and whether the assumptions hold."""
    console.print(_token_table(record))
    console.print(_length_table(record))
    for line in conclusions(record):
        console.print(line, markup=False, highlight=False)


def _token_table(record: Record) -> Table:
    found = record["per_token"]
    title = (
        f"{found['tokens']:,} tokens in {found['sequences']:,} sequences of {found['clusters']:,} prompts, "
        f"the longest of {found['longest']:,}"
    )
    table = _table(title, "log π − log μ of a token", "", "95 % interval", "")
    for key, name, unit in _ROWS:
        figure = found[key]
        bounds = f"{_figure(figure['low'])} to {_figure(figure['high'])}"
        table.add_row(name, _figure(figure["value"]), bounds, unit)
    table.add_row("the largest, either way", _figure(found["largest"]), "", "nats")
    return table


def _length_table(record: Record) -> Table:
    """``many``: in a minibatch of very many sequences of this length; then in a step of the recipe; then of
    those that were sampled and have as many tokens, as predicted and as measured."""
    headings = ("tokens", "many", f"a step of {record['minibatch']}", "sampled", "95 % of such", "measured")
    table = _table("On-policy ESS ratio by response length: predicted, and measured", *headings)
    for row in record["lengths"]:
        step = row["in_minibatch"]
        of_step = f"{_ratio(step['value'])} ({_ratio(step['low'])}–{_ratio(step['high'])})"
        table.add_row(f"{row['length']:,}", _ratio(row["endless"]), of_step, *_measured(row))
    table.add_row("as sampled", "", "", *_measured(record["whole"]))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(*headings, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
    return table


def _measured(row: Mapping[str, Any]) -> list[str]:
    if "measured" not in row:
        return [words.NOTHING] * 3
    low, high = (_ratio(row["expected"][bound]) for bound in ("low", "high"))
    mark = "" if _within(row) else " !"
    return [f"{row['sequences']:,}", f"{low}–{high}", _ratio(row["measured"]) + mark]


def conclusions(record: Record) -> Iterator[str]:
    """Whether the prediction can be believed, a line for each finding."""
    found, rate = record["per_token"], record["rate"]
    longest = found["longest"]
    if rate["value"] * longest < NEGLIGIBLE and abs(found["drift"]["value"]) * longest < NEGLIGIBLE:
        yield (
            "At these lengths numerics cost nothing that a step could notice: "
            f"{rate['value'] * longest:.1e} of the ESS ratio at {longest:,} tokens."
        )
        return
    correlation, drift = found["correlation"], found["drift"]
    if correlation["low"] <= 1 <= correlation["high"]:
        yield "Tokens of a sequence are uncorrelated, as far as these data tell: v alone decides."
    else:
        yield (
            f"Tokens of a sequence are NOT independent: sums vary {correlation['value']:.2f} times as much "
            "as those of uncorrelated tokens; the ESS ratios above, and training, use v times that."
        )
    if not drift["low"] <= 0 <= drift["high"] and abs(drift["value"]) * longest >= NEGLIGIBLE:
        yield (
            f"The mean ratio is NOT 1 (its log is {_figure(drift['value'])} a token): the sampler does not "
            "draw from all that the learner's distribution has (top_p, top_k), or not from what it records; "
            "the ESS ratios above leave this out."
        )
    wrong = [row for row in (*record["lengths"], record["whole"]) if "measured" in row and not _within(row)]
    if wrong:
        yield (
            f"{len(wrong)} of the measured ESS ratios (marked !) lie outside the range of 95 % of such "
            "measurements: with one or two this may be chance; with more, the text's mismatch differs from "
            "sequence to sequence, or a few tokens have very large ratios."
        )
    else:
        yield "Every measured ESS ratio is where 95 % of such measurements would be."


def _within(row: Mapping[str, Any]) -> bool:
    """Whether the measured ESS ratio is where the prediction allows it."""
    low, high = row["expected"]["low"], row["expected"]["high"]
    return low - NEGLIGIBLE <= row["measured"] <= high + NEGLIGIBLE


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def calibration_svg(record: Record) -> str:
    """The chart as an SVG file of its own: predicted ESS ratio over length, and what was measured."""
    from vcpo.monitor.figures import ess_by_length, svg

    drawing = svg(ess_by_length(record), "on-policy ESS ratio by response length")
    assert drawing is not None  # a calibration always has lengths
    return drawing.replace(">", f">{_STYLE}", 1)


_STYLE = (
    "<style>svg{--muted:#5d6878;--grid:#dfe3e9;--accent:#2f5fd0;--second:#e08a1e;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{--muted:#9aa6b6;--grid:#2d3643;--accent:#7ea6ff;--second:#f2b04f;"
    "background:#191f29}}</style>"
)
