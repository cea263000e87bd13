"""compare.html: the table and the figures of a comparison, one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vcpo.compare.results import COMPLETED, FAILED, UNFINISHED, Result, Summary
from vcpo.compare.table import CAPTION, HEADINGS, lines
from vcpo.monitor import words
from vcpo.monitor.html import chart, page
from vcpo.monitor.sinks import write_atomically

PAGE_FILE = "compare.html"

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
        _table(summaries),
        *_figures(results, summaries),
        _runs(results),
    )
    lags = ", ".join(map(str, sorted({result.cell.lag for result in results})))
    seeds = len({result.cell.seed for result in results})
    eyebrow = f"comparison · {recipe} · lag {lags} · {seeds} seed{'s' if seeds > 1 else ''}"
    path = out / PAGE_FILE
    write_atomically(path, page(out.resolve().name, eyebrow, sections, _CSS))
    return path


def _unusual(results: Sequence[Result]) -> str:
    """What is not as it should be: failures, each with its reason, and what is not there yet."""
    failed = [result for result in results if result.status == FAILED]
    left = sum(result.status == UNFINISHED for result in results)
    parts = [f"{escape(str(result.cell))}: failed: {escape(result.error or '')}" for result in failed]
    if left:
        parts.append(f"{left} of {len(results)} runs are not finished: the same command goes on.")
    return "".join(f"<p class=banner>{part}</p>" for part in parts)


def _settings(recipe: str, settings: Mapping[str, Any]) -> str:
    told = ", ".join(f"{dotted} = {value}" for dotted, value in settings.items())
    text = f"Recipe {recipe}{f', with {told}' if told else ''}."
    return f"<p class=note>{escape(text)}</p>"


def _table(summaries: Sequence[Summary]) -> str:
    return f"<h2>Results</h2>{_html_table(HEADINGS, lines(summaries))}<p class=note>{escape(CAPTION)}</p>"


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll card'><table class=results><tr>{head}</tr>{body}</table></div>"


def _figures(results: Sequence[Result], summaries: Sequence[Summary]) -> list[str]:
    """A section of charts for the end of the runs, and one for each lag."""
    from vcpo.compare import figures  # matplotlib takes a second to import
    from vcpo.monitor.figures import svg

    styles = figures.styles_of(results)
    legend = "".join(
        f"<span class='key {style.classes}'>{escape(label)}</span>" for label, style in styles.items()
    )
    sections = [f"<p class=note>{_MARKS}</p>"]
    for heading, charts in figures.sections(results, summaries, styles):
        cards = "".join(
            chart(title, subtitle, (), drawing)
            for title, subtitle, draw in charts
            if (drawing := svg(draw, f"{title}: {heading}"))
        )
        if cards:
            top = f"<h2>{escape(heading)}</h2><p class=legend>{legend}</p>"
            sections.append(f"{top}<div class=grid>{cards}</div>")
    return sections


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


_MARKS = f"Thin: one seed; thick: their mean. ✖ collapsed, ▼ failed. {COLLAPSE_RULE}"

_CSS = """
:root{--c0:#2f5fd0;--c1:#d9730d;--c2:#1f8a4c;--c3:#b8327e;--c4:#7048c6;--c5:#0f8b9d;--c6:#8a6d1b;--c7:#5d6878}
@media(prefers-color-scheme:dark){:root{--c0:#7ea6ff;--c1:#ffa94d;--c2:#63d28e;--c3:#f783c5;--c4:#b197fc;--c5:#4dd4e6;
--c6:#e0c060;--c7:#a8b3c2}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}
.key.d1::before,.key.d2::before,.key.d3::before{background:none;height:0;width:20px;
border-top:3px dashed var(--c)}
.key.d2::before{border-top-style:dotted}.key.d3::before{border-top-style:double}
.legend{font-size:.9rem;margin-bottom:4px}
.note{color:var(--muted);font-size:.85rem;margin:6px 0 12px}
.results{width:100%;margin:0}
.results th,.results td{width:auto;padding:4px 14px 4px 0;text-align:left;white-space:nowrap}
.results th{font-weight:500}
details .card{box-shadow:none;padding:0}
"""
