"""The report of a run: one HTML file that needs nothing else, and reads well on a phone.

It is made from the run folder alone, finished or not: metrics.jsonl is required, summary.json and the
resolved config are shown if they are there.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vcpo.errors import CheckpointError
from vcpo.monitor import words
from vcpo.monitor.diagnosis import Finding, diagnose
from vcpo.monitor.glossary import GLOSSARY
from vcpo.monitor.html import chart, page
from vcpo.monitor.sinks import METRICS_FILE, read_metrics, write_atomically
from vcpo.monitor.statistics import Row, run_totals, sampler_shares, series, time_spent

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.toml"
BEFORE_FILE = "evaluation_before.json"
"""Written before the first step, so that an interrupted run still shows where it began."""


@dataclass(frozen=True)
class Run:
    """What the report knows about a run."""

    folder: Path
    rows: Sequence[Row]
    summary: Mapping[str, Any]
    """summary.json over the totals of the rows; without it, the totals and the evaluation before."""
    finished: bool
    """Whether there was a readable summary.json."""
    config: str
    """Text of the resolved config; empty if there is none."""

    @property
    def target_lag(self) -> int | None:
        """Target policy lag S; None if neither the summary nor the config says it."""
        lag = self._setting("lag")
        return lag if isinstance(lag, int) else None

    @property
    def overlapping(self) -> bool:
        """Whether samplers ran beside the learner."""
        return self._setting("mode") != "exact"

    def _setting(self, name: str) -> Any:
        return self.summary.get(name, _pipeline_setting(self.config, name))


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises :class:`CheckpointError` if it is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run folder: there is no such folder; check the path")
    rows = read_metrics(folder)
    summary, before = read_summary(folder), _read_json(folder / BEFORE_FILE)
    config = folder / CONFIG_FILE
    return Run(
        folder=folder,
        rows=rows,
        summary={**run_totals(rows), **(before or {}), **(summary or {})},
        finished=summary is not None,
        config=config.read_text("utf-8", "replace") if config.is_file() else "",
    )


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a run has written at its end; None if it has not ended, or if the file is damaged."""
    return _read_json(folder / SUMMARY_FILE)


def write_report(run_folder: Path | str) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Raises :class:`CheckpointError` if the folder is not a run.
    """
    run = load_run(Path(run_folder))
    path = run.folder / REPORT_FILE
    write_atomically(path, _page(run))
    return path


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None if the run did not live to write a whole one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _pipeline_setting(config: str, name: str) -> Any:
    try:
        return tomllib.loads(config)["pipeline"][name]
    except (ValueError, KeyError, TypeError):
        return None


def _page(run: Run) -> str:
    sections = (
        _headline(run),
        _findings(diagnose(run.rows, target_lag=run.target_lag, overlapping=run.overlapping)),
        _charts(run),
        _facts(run.summary),
        _config(run.config),
        _glossary(),
    )
    return page(run.folder.resolve().name, _eyebrow(run.summary), sections)


def _eyebrow(summary: Mapping[str, Any]) -> str:
    """The line over the title: what kind of run this was."""
    parts = [summary.get(key) for key in ("algorithm", "recipe", "environment", "mode")]
    if summary.get("lag") is not None:
        parts.append(f"lag {summary['lag']}")
    return " · ".join(str(part) for part in parts if part) or "vcpo run"


def _headline(run: Run) -> str:
    summary = run.summary
    cards = [
        card
        for key, title in (("greedy_accuracy", "Greedy accuracy"), ("accuracy", "Sampled accuracy"))
        if (card := _accuracy_card(summary, key, title))
    ]
    steps = words.number(summary, "steps")
    spent = words.number(summary, "wall_seconds") or time_spent(run.rows).elapsed
    tiles = (
        ("optimizer steps", words.amount(steps)),
        ("wall time", words.duration(spent)),
        ("tokens per second", words.amount(words.number(summary, "tokens_per_second"))),
        ("mean ESS ratio", words.amount(words.number(summary, "ess_ratio_mean"))),
        ("mean / max policy lag", _pair(summary, "lag_mean", "lag_max")),
        ("mean step scale", words.amount(words.number(summary, "step_scale_mean"))),
    )
    shown = "".join(f"<div class=tile><b>{escape(v)}</b><span>{k}</span></div>" for k, v in tiles)
    return f"{_interruption(run)}<div class=cards>{''.join(cards)}</div><div class=tiles>{shown}</div>"


def _pair(summary: Mapping[str, Any], first: str, second: str) -> str:
    return f"{words.amount(words.number(summary, first))} / {words.amount(words.number(summary, second))}"


def _interruption(run: Run) -> str:
    if run.finished:
        return ""
    steps = series(run.rows, "step")[0]
    seen = f"the figures show it up to step {steps[-1]}" if steps else "no step was recorded"
    return (
        f"<p class=banner>This run has no complete {SUMMARY_FILE}: it is still going or was "
        f"interrupted; {seen}.</p>"
    )


def _accuracy_card(summary: Mapping[str, Any], key: str, title: str) -> str:
    """Before → after on held-out problems, with the intervals drawn on a scale from 0 to 1."""
    ends = [(end, words.number(summary, f"{key}_{end}")) for end in ("before", "after")]
    known = [(end, value) for end, value in ends if value is not None]
    if not known:
        return ""
    values = " <i>→</i> ".join(words.percent(value) for _, value in known)
    tracks = "".join(_track(end, value, words.interval(summary, f"{key}_{end}")) for end, value in known)
    return f"<section class=card><h3>{title}, held-out</h3><p class=big>{values}</p>{tracks}</section>"


def _track(end: str, value: float, bounds: tuple[float, float] | None) -> str:
    low, high = bounds or (value, value)
    text = f"{words.percent(low)} – {words.percent(high)}" if bounds else words.percent(value)
    return (
        f"<div class=track><span>{end}</span><div class='rail {end}'>"
        f"<div class=range style='left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%'></div>"
        f"<div class=dot style='left:{100 * value:.1f}%'></div></div><span>{text}</span></div>"
    )


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(
        f"<li class={finding.severity}><b>{finding.severity}</b>"
        f"<p>{escape(finding.sentence)}</p><p class=advice>{escape(finding.advice)}</p></li>"
        for finding in findings
    )
    none = "<p class=calm>No rule of the diagnosis found anything to say.</p>"
    return f"<h2>Findings</h2>{f'<ul class=findings>{items}</ul>' if items else none}"


def _charts(run: Run) -> str:
    from vcpo.monitor import figures  # matplotlib takes a second to import

    rows = run.rows
    charts = (
        ("Reward", "mean of each minibatch", [], figures.reward(rows)),
        (
            "Held-out accuracy",
            "problems never trained on",
            [("accent", "greedy"), ("second", "sampled")],
            figures.accuracy(_evaluations(run)),
        ),
        (
            "ESS ratio and step scale",
            "1 is on-policy",
            [("accent", "ESS ratio"), ("second", "step scale")],
            figures.ess(rows),
        ),
        ("Gradient norm", "before clipping, log scale", [], figures.gradient(rows)),
        (
            "Distance to the behaviour policy",
            "per sampled token",
            [("accent", "KL, nats"), ("second", "log-ratio mean square")],
            figures.divergence(rows),
        ),
        (
            "Policy lag",
            "of the groups, in optimizer steps",
            [("accent", "mean"), ("second", "largest")],
            figures.lag(rows),
        ),
        ("Policy lag, all groups", "share of groups at each lag", [], figures.lag_histogram(rows)),
    )
    cards = [
        chart(title, subtitle, keys, drawing)
        for title, subtitle, keys, draw in charts
        if (drawing := figures.svg(draw, title))
    ]
    shown = "".join(cards) + _time(run) + _samplers(run)
    return f"<h2>Over the run</h2><div class=grid>{shown}</div>" if shown else ""


def _evaluations(run: Run) -> list[Row]:
    """The evaluated steps, with the evaluations before the first and after the last step."""
    before, after = (
        {"step": step}
        | {key: words.number(run.summary, f"{key}_{end}") for key in ("accuracy", "greedy_accuracy")}
        for end, step in (("before", 0), ("after", run.summary["steps"]))
    )
    return [before, *run.rows, after]


def _time(run: Run) -> str:
    """The learner's wall time as one stacked bar; samplers beside it have a bar to the same scale."""
    spent = time_spent(run.rows)
    if spent.elapsed <= 0:
        return ""
    sampling = ("second", "sampling", spent.sampling)
    # In one process the learner waits exactly while it samples: that time is sampling.
    waiting = spent.waiting if run.overlapping else max(0.0, spent.waiting - spent.sampling)
    learner = [
        ("accent", "training", spent.training),
        ("third", "waiting", waiting),
        ("fourth", "publishing", spent.publishing),
        ("rest", "evaluation, other", spent.rest),
    ]
    bars = [("learner", learner), ("samplers", [sampling])]
    if not run.overlapping:
        bars = [("", [sampling, *learner])]
    parts = [part for _, bar in bars for part in bar]
    keys = [
        (colour, f"{name} {words.duration(seconds)} ({words.percent(seconds / spent.elapsed)})")
        for colour, name, seconds in parts
    ]
    scale = max(sum(seconds for _, _, seconds in bar) for _, bar in bars)
    drawing = "".join(_bar(name, bar, scale) for name, bar in bars)
    how = "samplers work beside the learner" if run.overlapping else "one process samples and learns in turn"
    return chart(
        "Where the time went", f"{how}; shares of {words.duration(spent.elapsed)}", keys, drawing, wide=True
    )


def _bar(name: str, parts: Sequence[tuple[str, str, float]], scale: float) -> str:
    pieces = "".join(
        f"<i class={colour} style='width:{100 * seconds / scale:.2f}%'></i>" for colour, _, seconds in parts
    )
    label = f"<span>{name}</span>" if name else ""
    return f"<div class=bar>{label}<div>{pieces}</div></div>"


def _samplers(run: Run) -> str:
    """What each of several samplers did; they may have come and gone."""
    shares = sampler_shares(run.rows)
    if len(shares) < 2:
        return ""
    titles = ("", "steps", "last step", "tokens a second", "lag, mean", "largest", "most groups waiting")
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(
        f"<tr><th>{escape(s.name)}</th><td>{s.steps}</td><td>{s.last}</td>"
        f"<td>{words.NOTHING if s.tokens_per_second is None else words.amount(s.tokens_per_second)}</td>"
        f"<td>{s.lag_mean:.2f}</td><td>{s.lag_max}</td><td>{s.outstanding_max}</td></tr>"
        for s in shares
    )
    table = f"<div class=scroll><table class=columns><tr>{head}</tr>{body}</table></div>"
    return chart("Samplers", "steps at whose end each was there", [], table, wide=True)


def _facts(summary: Mapping[str, Any]) -> str:
    """Every entry of the summary, as it is."""
    entries = "".join(
        f"<tr><th>{escape(str(key)).replace('_', '_<wbr>')}</th><td>{escape(_fact(value))}</td></tr>"
        for key, value in summary.items()
    )
    table = f"<div class=scroll><table>{entries}</table></div>"
    return f"<details><summary>All figures of the summary</summary>{table}</details>"


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_fact(part) for part in value)
    return words.NOTHING if value is None else str(value)


def _config(text: str) -> str:
    if not text:
        return ""
    return f"<details><summary>Resolved config</summary><pre>{escape(text)}</pre></details>"


def _glossary() -> str:
    groups: dict[str, str] = {}
    for metric in GLOSSARY.values():
        unit = f" <i>{escape(metric.unit)}</i>" if metric.unit else ""
        groups[metric.group] = groups.get(metric.group, "") + (
            f"<dt><code>{escape(metric.name)}</code>{unit}</dt>"
            f"<dd>{escape(metric.meaning)} <span>{escape(metric.suspect)}</span></dd>"
        )
    body = "".join(f"<h3>{escape(group)}</h3><dl>{entries}</dl>" for group, entries in groups.items())
    return f"<details><summary>What the metrics mean ({METRICS_FILE})</summary>{body}</details>"
