"""The report of a run: one HTML file that needs nothing else, and reads well on a phone.

It is made from the run folder alone, finished or not: metrics.jsonl is required, summary.json and the
resolved config are shown if they are there.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vcpo.errors import CheckpointError
from vcpo.monitor import words
from vcpo.monitor.diagnosis import Finding, diagnose
from vcpo.monitor.glossary import GLOSSARY
from vcpo.monitor.sinks import METRICS_FILE, read_metrics, write_atomically
from vcpo.monitor.statistics import Row, run_totals, series, time_spent

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
    summary, before = _read_json(folder / SUMMARY_FILE), _read_json(folder / BEFORE_FILE)
    config = folder / CONFIG_FILE
    return Run(
        folder=folder,
        rows=rows,
        summary={**run_totals(rows), **(before or {}), **(summary or {})},
        finished=summary is not None,
        config=config.read_text("utf-8", "replace") if config.is_file() else "",
    )


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
    title = escape(run.folder.resolve().name)
    sections = (
        _headline(run),
        _findings(diagnose(run.rows, target_lag=run.target_lag, overlapping=run.overlapping)),
        _charts(run),
        _facts(run.summary),
        _config(run.config),
        _glossary(),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} · vcpo</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p class=eyebrow>{_eyebrow(run.summary)}</p><h1>{title}</h1></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _eyebrow(summary: Mapping[str, Any]) -> str:
    """The line over the title: what kind of run this was."""
    parts = [summary.get(key) for key in ("algorithm", "recipe", "environment", "mode")]
    if summary.get("lag") is not None:
        parts.append(f"lag {summary['lag']}")
    return escape(" · ".join(str(part) for part in parts if part)) or "vcpo run"


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
        _chart(title, subtitle, keys, drawing)
        for title, subtitle, keys, draw in charts
        if (drawing := figures.svg(draw, title))
    ]
    shown = "".join(cards) + _time(run)
    return f"<h2>Over the run</h2><div class=grid>{shown}</div>" if shown else ""


def _evaluations(run: Run) -> list[Row]:
    """The evaluated steps, with the evaluations before the first and after the last step."""
    before, after = (
        {"step": step}
        | {key: words.number(run.summary, f"{key}_{end}") for key in ("accuracy", "greedy_accuracy")}
        for end, step in (("before", 0), ("after", run.summary["steps"]))
    )
    return [before, *run.rows, after]


def _chart(
    title: str, subtitle: str, keys: Iterable[tuple[str, str]], drawing: str, wide: bool = False
) -> str:
    legend = "".join(f"<span class='key {colour}'>{escape(label)}</span>" for colour, label in keys)
    return (
        f"<figure class='card{' wide' if wide else ''}'><figcaption><h3>{escape(title)}</h3>"
        f"<p>{escape(subtitle)}</p><p class=legend>{legend}</p></figcaption>{drawing}</figure>"
    )


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
    return _chart(
        "Where the time went", f"{how}; shares of {words.duration(spent.elapsed)}", keys, drawing, wide=True
    )


def _bar(name: str, parts: Sequence[tuple[str, str, float]], scale: float) -> str:
    pieces = "".join(
        f"<i class={colour} style='width:{100 * seconds / scale:.2f}%'></i>" for colour, _, seconds in parts
    )
    label = f"<span>{name}</span>" if name else ""
    return f"<div class=bar>{label}<div>{pieces}</div></div>"


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


_CSS = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1b2330;--muted:#5d6878;--grid:#dfe3e9;--accent:#2f5fd0;--second:#e08a1e;
--third:#c3cad5;--fourth:#7c8798;--bad:#c92a2a;--shadow:0 1px 2px #1b233014,0 2px 8px #1b23300a}
@media(prefers-color-scheme:dark){:root{--page:#10141b;--card:#191f29;--ink:#e8ecf2;--muted:#9aa6b6;--grid:#2d3643;
--accent:#7ea6ff;--second:#f2b04f;--third:#465162;--fourth:#8995a6;--bad:#ff8787;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:28px 16px 56px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 20px;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:1.12rem;margin:32px 0 12px}
h3{font-size:.95rem;margin:0}
p{margin:0}
.eyebrow{color:var(--muted);font-size:.85rem;margin-bottom:2px}
.banner{background:var(--card);border-left:4px solid var(--second);border-radius:8px;padding:12px 14px;
margin-bottom:16px}
.card,.tiles,.findings li,details,.calm{background:var(--card);border-radius:12px;box-shadow:var(--shadow)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px}
.card{margin:0;padding:16px;min-width:0}
.big{font-size:2.1rem;font-weight:650;letter-spacing:-.02em;margin:2px 0 10px}
.big i{font-style:normal;font-weight:400;color:var(--muted)}
.track{display:grid;grid-template-columns:3.4em 1fr 6.6em;gap:10px;align-items:center;font-size:.82rem;
color:var(--muted)}
.track span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.rail{position:relative;height:16px}
.rail::before{content:"";position:absolute;inset:7px 0;background:var(--grid);border-radius:2px}
.range{position:absolute;top:5px;height:6px;border-radius:3px;background:var(--accent);opacity:.45}
.dot{position:absolute;top:3px;width:10px;height:10px;margin-left:-5px;border-radius:50%;background:var(--accent)}
.before .range,.before .dot{background:var(--fourth)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));margin-top:16px;padding:6px 4px}
.tile{padding:10px 12px}
.tile b{display:block;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:.82rem}
.findings{list-style:none;margin:0;padding:0;display:grid;gap:10px}
.findings li{padding:12px 14px;border-left:4px solid var(--fourth)}
.findings b{font-size:.78rem;text-transform:uppercase;letter-spacing:.05em;color:var(--muted)}
.findings .critical{border-color:var(--bad)}.findings .critical b{color:var(--bad)}
.findings .warning{border-color:var(--second)}
.advice{color:var(--muted);font-size:.92rem}
.calm{padding:12px 14px;color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px}
@media(min-width:760px){figcaption{min-height:4.4rem}.wide{grid-column:span 2}}
figcaption p{color:var(--muted);font-size:.85rem}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px}
.key::before{content:"";display:inline-block;width:12px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle;
background:var(--c)}
.accent{--c:var(--accent)}.second{--c:var(--second)}.third{--c:var(--third)}.fourth{--c:var(--fourth)}
.rest{--c:var(--grid)}
.bar{display:flex;gap:10px;align-items:center;margin-top:14px}
.bar span{width:4.6em;color:var(--muted);font-size:.85rem}
.bar div{display:flex;flex:1;height:30px;border-radius:6px;overflow:hidden}
.bar i{background:var(--c)}
svg{display:block;width:100%;height:auto;margin-top:4px}
svg text{font-family:inherit!important}
details{margin-top:16px;padding:4px 16px}
summary{cursor:pointer;padding:10px 0;font-weight:600}
details h3{margin:14px 0 4px;text-transform:capitalize}
pre,.scroll{overflow-x:auto}
pre{font-size:.82rem;margin:0 0 12px}
table{border-collapse:collapse;font-size:.86rem;margin-bottom:12px}
th{width:45%;text-align:left;font-weight:500;color:var(--muted);padding:3px 16px 3px 0}
th,td{vertical-align:top}
td{padding:3px 0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
dl{margin:0 0 12px;font-size:.9rem}
dt{margin-top:8px}dt i{color:var(--muted);font-style:normal;font-size:.82rem}
dd{margin:0}dd span{color:var(--muted)}
code{font-size:.86rem}
"""
