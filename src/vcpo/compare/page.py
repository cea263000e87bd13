"""compare.html: the table and the figures of a comparison, one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vcpo.compare.remarks import remarks
from vcpo.compare.results import COMPLETED, UNFINISHED, Result, Summary, lags_of
from vcpo.compare.table import (
    CAPTION,
    HEADINGS,
    OVERVIEW_CAPTION,
    by_method,
    lines,
    overview,
)
from vcpo.monitor import words
from vcpo.monitor.html import chart, page
from vcpo.monitor.sinks import write_atomically

PAGE_FILE = "compare.html"
FEW_LINES = 24
"""Up to this many lines the table of all methods and lags is open."""

COLLAPSE_RULE = (
    "A run has collapsed if its smoothed training reward ended below half of its best (and its sampled "
    "accuracy on held-out problems did too, as far as it is known), or if that accuracy is lower after "
    "training than before by more than three standard errors."
)


def write_page(
    results: Sequence[Result],
    summaries: Sequence[Summary],
    settings: Mapping[str, Any],
    recipe: str,
    out: Path,
) -> Path:
    """``settings`` are those that all runs have and the recipe has not."""
    sections = (
        _unusual(results),
        _settings(recipe, settings),
        _overview(summaries),
        _table(summaries),
        *_figures(results, summaries),
        _runs(results),
    )
    lags = ", ".join(map(str, lags_of(summaries)))
    seeds = len({result.cell.seed for result in results})
    eyebrow = f"comparison · {recipe} · lag {lags} · {seeds} seed{'s' if seeds > 1 else ''}"
    path = out / PAGE_FILE
    write_atomically(path, page(out.resolve().name, eyebrow, sections, _CSS))
    return path


def _unusual(results: Sequence[Result]) -> str:
    """What is not as it should be, and what is not there yet."""
    told = remarks(results)
    if left := sum(result.status == UNFINISHED for result in results):
        told.append(f"{left} of {len(results)} runs are not finished: the same command goes on.")
    return "".join(f"<p class=banner>{escape(remark)}</p>" for remark in told)


def _settings(recipe: str, settings: Mapping[str, Any]) -> str:
    told = ", ".join(f"{dotted} = {value}" for dotted, value in settings.items())
    text = f"Recipe {recipe}{f', with {told}' if told else ''}."
    return f"<p class=note>{escape(text)}</p>"


def _overview(summaries: Sequence[Summary]) -> str:
    """A line a method and a column a lag, tinted by accuracy."""
    lags = lags_of(summaries)
    if len(lags) < 2:
        return ""
    headings, *rows = overview(summaries)
    shades = [
        [summary.mean("greedy_accuracy_after") if (summary := own.get(lag)) else None for lag in lags]
        for own in by_method(summaries).values()
    ]
    tints = [["", *(f"{mean.value:.2f}" if mean else "" for mean in row)] for row in shades]
    table = _html_table(headings, rows, tints)
    return f"<h2>Which method survives which lag</h2>{table}<p class=note>{escape(OVERVIEW_CAPTION)}</p>"


def _table(summaries: Sequence[Summary]) -> str:
    caption = f"<p class=note>{escape(CAPTION)}</p>"
    shown = " open" if len(summaries) <= FEW_LINES else ""
    table = _html_table(HEADINGS, lines(summaries))
    return f"<details{shown}><summary>Every method at every lag</summary>{table}{caption}</details>"


def _html_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], tints: Sequence[Sequence[str]] = ()
) -> str:
    """``tints``: for each cell the strength of its colour, from 0 to 1, or nothing."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr>{''.join(_cell(*pair) for pair in zip_longest(row, tint, fillvalue=''))}</tr>"
        for row, tint in zip_longest(rows, tints, fillvalue=())
    )
    return f"<div class='scroll card'><table class=results><tr>{head}</tr>{body}</table></div>"


def _cell(text: str, tint: str) -> str:
    style = f" class=tinted style='--t:{tint}'" if tint else ""
    return f"<td{style}>{escape(text)}</td>"


def _figures(results: Sequence[Result], summaries: Sequence[Summary]) -> list[str]:
    """A section of charts for the end of the runs, and one for each lag."""
    from vcpo.compare import figures  # matplotlib takes a second to import
    from vcpo.monitor.figures import svg

    styles = figures.styles_of(results)
    keys = "".join(
        f"<button class='key {style.classes}' aria-pressed=false data-method=m{style.number}>"
        f"{escape(label)}</button>"
        for label, style in styles.items()
    )
    sections = [f"<p class=note>{_MARKS}</p>", f"<div class='legend keys'>{keys}</div>"]
    for heading, charts in figures.sections(results, summaries, styles):
        cards = "".join(
            chart(title, subtitle, (), drawing)
            for title, subtitle, draw in charts
            if (drawing := svg(draw, f"{title}: {heading}"))
        )
        if cards:
            sections.append(f"<h2>{escape(heading)}</h2><div class=grid>{cards}</div>")
    return [*sections, f"<script>{_SCRIPT}</script>"]


def _runs(results: Sequence[Result]) -> str:
    headings = (
        *("run", "status", "greedy before", "greedy after", "sampled before", "sampled after"),
        *("ESS ratio", "step scale", "collapsed at", "wall time"),
    )
    rows = [
        [
            result.cell.name,
            result.status if result.error is None else f"{result.status}: {result.error}",
            *(
                words.percent(result.figure(f"{key}_{end}"))
                for key in ("greedy_accuracy", "accuracy")
                for end in ("before", "after")
            ),
            *(words.amount(result.figure(key)) for key in ("ess_ratio_mean", "step_scale_mean")),
            words.NOTHING if result.collapsed_at is None else f"step {result.collapsed_at}",
            words.duration(result.figure("wall_seconds")),
        ]
        for result in results
    ]
    done = sum(result.status == COMPLETED for result in results)
    summary = f"Every run: {done} of {len(results)} completed"
    return f"<details><summary>{summary}</summary>{_html_table(headings, rows)}</details>"


_MARKS = (
    "Thin: one seed; thick: their mean. ✖ collapsed, ▼ failed. Point at a method to see it alone, click to "
    f"keep it (several can be kept). {COLLAPSE_RULE}"
)

_SCRIPT = """
{const keys=[...document.querySelectorAll('.keys button')],kept=new Set;
const show=names=>{document.body.classList.toggle('some',names.size>0);
for(const key of keys){const name=key.dataset.method,on=names.has(name);
key.setAttribute('aria-pressed',kept.has(name));
document.querySelectorAll('.'+name).forEach(e=>e.classList.toggle('on',on))}};
for(const key of keys){const name=key.dataset.method;
key.onpointerenter=key.onfocus=()=>show(new Set([...kept,name]));
key.onpointerleave=key.onblur=()=>show(kept);
key.onclick=()=>{kept.delete(name)||kept.add(name);show(kept)}}}
"""

_CSS = """
:root{--c0:#2f5fd0;--c1:#d9730d;--c2:#1f8a4c;--c3:#b8327e;--c4:#7048c6;--c5:#0f8b9d;--c6:#8a6d1b;--c7:#5d6878}
@media(prefers-color-scheme:dark){:root{--c0:#7ea6ff;--c1:#ffa94d;--c2:#63d28e;--c3:#f783c5;--c4:#b197fc;--c5:#4dd4e6;
--c6:#e0c060;--c7:#a8b3c2}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}
.key.d1::before,.key.d2::before,.key.d3::before{background:none;height:0;width:20px;
border-top:3px dashed var(--c)}
.key.d2::before{border-top-style:dotted}.key.d3::before{border-top-style:double}
.keys{position:sticky;top:0;z-index:1;max-height:26vh;overflow:auto;padding:6px 0;background:var(--page);
font-size:.9rem}
.keys button{all:unset;cursor:pointer;border-radius:4px;padding:0 4px;overflow-wrap:anywhere}
.keys button:focus-visible{outline:2px solid var(--accent)}
.keys button[aria-pressed=true]{font-weight:600}
.some .key:not(.on),.some .series:not(.on){opacity:.12}
.tinted{background:color-mix(in srgb,var(--accent) calc(var(--t)*var(--t)*45%),transparent)}
.note{color:var(--muted);font-size:.85rem;margin:6px 0 12px}
.results{width:100%;margin:0}
.results th,.results td{width:auto;padding:4px 14px 4px 0;text-align:left;white-space:nowrap}
.results th{font-weight:500}
@media(max-width:759px){.results:has(.tinted) td:first-child{white-space:normal;overflow-wrap:anywhere;
min-width:8em}}
details .card{box-shadow:none;padding:0}
"""
