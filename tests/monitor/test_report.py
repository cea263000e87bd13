"""The report says what the run folder says, needs nothing outside it, and survives what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vcpo.errors import CheckpointError
from vcpo.monitor import figures
from vcpo.monitor.glossary import GLOSSARY
from vcpo.monitor.report import load_run, write_report
from vcpo.monitor.sinks import MetricsWriter

VOID = {"meta", "wbr", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; raises where the tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data

    @property
    def drawings(self) -> list[str]:
        return [attributes["aria-label"] or "" for tag, attributes in self.tags if tag == "svg"]


def make_run(folder: Path, steps: int = 60, summary: dict[str, Any] | None = None, **change: Any) -> Path:
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            row = {
                "step": step, "reward": step / 100, "ess": 96.0, "ess_ratio": 0.75, "step_scale": 0.866,
                "grad_norm": 1.0 + step % 3, "kl": 0.02, "ratio_variance": 0.04, "lag_mean": 1.5,
                "lag_max": 2, "lag_histogram": {1: 8, 2: 8}, "tokens": 1000, "seconds_training": 0.5,
                "seconds_waiting": 0.25, "seconds_publishing": 0.25, "seconds_sampling": 0.75,
                "elapsed": 1.25 * step,
            }  # fmt: skip
            if step % 20 == 0:
                row |= {"accuracy": 0.4, "greedy_accuracy": 0.5}
            writer.write(row | change)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


ALL_DRAWINGS = [
    "Reward", "Held-out accuracy", "ESS ratio and step scale", "Gradient norm",
    "Distance to the behaviour policy", "Policy lag", "Policy lag, all groups",
]  # fmt: skip


def test_a_finished_run_shows_its_summary_figures_and_times(tmp_path: Path):
    summary = {
        "algorithm": "vcpo", "mode": "async", "lag": 2, "wall_seconds": 200.0,
        "greedy_accuracy_before": 0.301, "greedy_accuracy_before_interval": [0.263, 0.342],
        "greedy_accuracy_after": 0.724, "greedy_accuracy_after_interval": [0.684, 0.761],
    }  # fmt: skip
    page = report(make_run(tmp_path / "maze", summary=summary))
    assert page.drawings == ALL_DRAWINGS
    for said in (
        "vcpo · async · lag 2",
        "30 % → 72 %",
        "68 % – 76 %",
        "3 min 20 s",
        # 60 steps of 1000 tokens at one second of the learner's loop each; mean lag 1.5
        "1 000tokens per second",
        "1.5 / 2",
        "training 30.0 s (40 %)",
        "waiting 15.0 s (20 %)",
        "publishing 15.0 s (20 %)",
        "evaluation, other 15.0 s (20 %)",
        "sampling 45.0 s (60 %)",
        "No rule of the diagnosis found",
    ):
        assert said in page.words, said
    assert "interrupted" not in page.words


def test_widths_of_the_time_bars_are_the_shares(tmp_path: Path):
    source = write_report(make_run(tmp_path)).read_text()
    learner = re.search(r"<span>learner</span><div>(.*?)</div>", source)
    assert learner is not None
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", learner[1])]
    assert widths == pytest.approx([40, 20, 20, 20])
    samplers = re.search(r"<span>samplers</span><div>(.*?)</div>", source)
    assert samplers is not None and "width:60.00%" in samplers[1]


def test_one_process_gets_one_bar_in_which_sampling_is_not_counted_as_waiting(tmp_path: Path):
    page = report(make_run(tmp_path, summary={"mode": "exact"}, seconds_sampling=0.2))
    assert "one process samples and learns in turn" in page.words
    assert "sampling 12.0 s" in page.words and "waiting 3.0 s" in page.words
    assert "samplers" not in page.words.split("Where the time went")[1].split("All figures")[0]


def test_several_samplers_get_a_table_and_one_does_not(tmp_path: Path):
    figures = {"version": 1, "lag": 1, "tokens_per_second": 1234.0, "outstanding_groups": 7}
    one, two = {"sampler-0": figures}, {"sampler-0": figures, "<i>": figures}
    page = report(make_run(tmp_path / "two", samplers=two))
    assert "sampler-060601 2341.0017" in page.words.replace("\u202f", " ").replace("\xa0", " ")
    assert "<i>" in page.words
    assert "most groups waiting" not in report(make_run(tmp_path / "one", samplers=one)).words


def test_an_interrupted_run_still_gets_a_report(tmp_path: Path):
    make_run(tmp_path, steps=25)
    (tmp_path / "evaluation_before.json").write_text('{"greedy_accuracy_before": 0.3}')
    (tmp_path / "summary.json").write_text('{"accuracy_aft')  # killed while writing
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 26, "re')
    page = report(tmp_path)
    assert "it is still going or was interrupted; the figures show it up to step 25" in page.words
    assert "30 %" in page.words
    assert page.drawings == ALL_DRAWINGS


def test_a_run_without_a_single_step_says_so(tmp_path: Path):
    MetricsWriter(tmp_path).close()
    page = report(tmp_path)
    assert "no step was recorded" in page.words
    assert page.drawings == []


def test_metrics_of_nulls_draw_nothing_and_break_nothing(tmp_path: Path):
    page = report(make_run(tmp_path, reward=float("nan"), grad_norm=0.0, kl=None, ratio_variance=None))
    assert set(ALL_DRAWINGS) - set(page.drawings) == {
        "Reward",
        "Gradient norm",
        "Distance to the behaviour policy",
    }


def test_findings_are_in_the_report(tmp_path: Path):
    page = report(make_run(tmp_path, summary={"lag": 2, "mode": "async"}, lag_mean=9.0, equal_groups=0.9))
    assert "The mean policy lag was 9.0 steps in the later half, above the target of 2." in page.words
    assert "In 90% of the groups all rewards were equal" in page.words


def test_target_lag_and_mode_come_from_the_config_if_there_is_no_summary(tmp_path: Path):
    make_run(tmp_path)
    (tmp_path / "config.toml").write_text('[pipeline]\nmode = "exact"\nlag = 7\n')
    run = load_run(tmp_path)
    assert (run.target_lag, run.overlapping) == (7, False)


def test_all_text_is_escaped(tmp_path: Path):
    evil = "<script>alert(1)</script>&\"'"
    folder = make_run(
        tmp_path / "run<i>", summary={"algorithm": evil, "model": evil, evil: [evil], "recipe": evil}
    )
    (folder / "config.toml").write_text(f"# {evil}\n")
    page = report(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    # Two over the title, three values and one key with its value in the summary, one in the config.
    assert page.words.count(evil) == 8
    assert "run<i>" in page.words


def test_the_page_needs_nothing_outside_itself(tmp_path: Path):
    folder = make_run(tmp_path, summary={})
    (folder / "config.toml").write_text("[run]\nseed = 0\n")
    page = report(folder)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe"}
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    source = (folder / "report.html").read_text()
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    viewport = [a["content"] for t, a in page.tags if t == "meta" and a.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]
    assert "[run]\nseed = 0" in page.words
    assert all(name in page.words and metric.meaning in page.words for name, metric in GLOSSARY.items())


def test_figures_take_the_colours_of_the_page_and_share_no_ids(tmp_path: Path):
    source = write_report(make_run(tmp_path)).read_text()
    assert not any(placeholder in source for placeholder in (figures.INK, figures.ACCENT, figures.GRID))
    drawings = re.findall(r"<svg.*?</svg>", source, re.S)
    owned = [set(re.findall(r'<clipPath id="(\w+)"', drawing)) for drawing in drawings]
    assert sum(map(len, owned)) == len(set.union(*owned))


def test_the_reward_curve_is_where_the_rewards_are():
    # Two points, (1, 0) and (2, 1): the line must rise over the whole height between them.
    drawing = figures.svg(figures.reward([{"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}]), "Reward")
    assert drawing is not None
    line = next(
        d for d in re.findall(r'd="(M [^"]*)"', drawing) if d.count("L") == 1 and " " in d and _rises(d)
    )
    (x0, y0), (x1, y1) = _points(line)
    assert x1 - x0 > 200 and y0 - y1 > 80  # of 302 × 187 points; y grows downwards


def _points(path: str) -> list[tuple[float, float]]:
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _rises(path: str) -> bool:
    (x0, y0), (x1, y1) = _points(path)
    return x1 > x0 and y1 < y0


def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_report(tmp_path)
