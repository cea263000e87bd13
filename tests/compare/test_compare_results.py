"""Rows, means, controls and the page, from runs written by hand."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vcpo.compare.children import is_finished
from vcpo.compare.controls import make_controls
from vcpo.compare.grid import Cell, make_grid, parse_methods
from vcpo.compare.page import write_page
from vcpo.compare.remarks import remarks
from vcpo.compare.results import (
    Result,
    impossible_results,
    known_results,
    result_of,
    summarise,
    write_results,
)
from vcpo.compare.table import lines, markdown, overview, rich_tables
from vcpo.config import Config, apply_overrides, load_config
from vcpo.errors import ConfigError
from vcpo.monitor.sinks import MetricsWriter

STEPS = 12
RECIPE = load_config("sort", ["--pipeline.steps", str(STEPS)])
SCALES = [0.5, 1.0, 0.25, 0.75]


def finished(cell: Cell, after: float, rewards: float | list[float] = 0.5) -> Result:
    """A run of as many steps as there are rewards that ended at a greedy accuracy of ``after``."""
    series = rewards if isinstance(rewards, list) else [rewards] * STEPS
    pipeline = cell.config.pipeline.model_copy(update={"steps": len(series)})
    cell = replace(cell, config=cell.config.model_copy(update={"pipeline": pipeline}))
    with MetricsWriter(cell.folder) as writer:
        for step, reward in enumerate(series, start=1):
            scale = SCALES[(step - 1) % 4]
            row = {"step": step, "reward": reward, "ess_ratio": scale**2, "step_scale": scale}
            writer.write(row | {"grad_norm": 2.0, "tokens": 10})
    summary: dict[str, Any] = {"held_out_problems": 64, "wall_seconds": 7.0}
    summary |= {f"{kind}accuracy_before": 0.25 for kind in ("", "greedy_")}
    summary |= {f"{kind}accuracy_after": after for kind in ("", "greedy_")} | {"steps": len(series)}
    (cell.folder / "summary.json").write_text(json.dumps(summary))
    return result_of(cell)


def cells_of(out: Path, methods: str, seeds: int, lags: tuple[int, ...] = (8,)) -> list[Cell]:
    return make_grid(RECIPE, parse_methods(methods), lags, range(seeds), out)


def test_means_and_intervals_are_over_completed_seeds(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "vcpo", 4)
    results = [finished(cell, after) for cell, after in zip(cells[:3], (0.5, 0.6, 0.7), strict=True)]
    results.append(result_of(cells[3], "no luck"))
    (summary,) = summarise(results)
    mean = summary.mean("greedy_accuracy_after")
    assert mean is not None
    # s = 0.1, and t of 2 degrees of freedom at 97.5 % is 4.3027: 4.3027 · 0.1 / sqrt(3) = 0.24842
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.6, 0.6 - 0.24842, 0.6 + 0.24842), abs=1e-5)
    (line,) = lines([summary])
    assert line == ["8", "vcpo", "3, 1 failed", "25.0 % [25, 25]", "60.0 % [35, 85]", "25.0 % [25, 25]",
                    "60.0 % [35, 85]", "0.469", "0.625", "0 of 4"]  # fmt: skip


def test_a_row_says_what_differs_from_the_recipe(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "grpo[pipeline.group_size=16]", 1)
    write_results([result_of(cell, "no luck")], RECIPE, tmp_path)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["overrides"] == {"algorithm.name": "grpo", "pipeline.group_size": 16}
    assert (row["method"], row["lag"], row["seed"]) == ("grpo[pipeline.group_size=16]", 8, 0)
    assert (row["status"], row["error"], row["collapsed"]) == ("failed", "no luck", False)


def test_a_row_counts_for_the_recipe_it_was_made_with_alone(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "grpo", 1)
    write_results([finished(cell, 0.5)], RECIPE, tmp_path)
    assert list(known_results([cell], RECIPE, tmp_path)) == [cell.name]
    (elsewhere,) = cells_of(tmp_path / "moved", "grpo", 1)
    assert list(known_results([elsewhere], RECIPE, tmp_path)) == [cell.name]
    edited = apply_overrides(RECIPE, ["--pipeline.steps", "7"])
    (other,) = make_grid(edited, parse_methods("grpo"), (8,), (0,), tmp_path)
    with pytest.raises(ConfigError, match=f"a row of {cell.name} with other settings: choose another --out"):
        known_results([other], edited, tmp_path)  # the recipe's own steps are others now


def test_a_finished_run_whose_metrics_are_damaged_keeps_its_figures(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "grpo", 1)
    finished(cell, 0.75)
    metrics = cell.folder / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())
    result = result_of(cell)
    assert (result.status, result.figure("greedy_accuracy_after"), result.rows) == ("completed", 0.75, ())
    assert remarks([result]) == [
        "1 of 1 runs are known by their figures alone, as their metrics are not here: they have no curves, "
        "and only a row that was kept knows whether they collapsed"
    ]
    metrics.write_text("".join(f'{{"step": {step}, "reward": 0.5}}\n' for step in (1, 2)))
    assert result_of(cell).rows == (), "ten of twelve are missing"
    (cell.folder / "summary.json").write_text('{"torn')
    assert (result_of(cell).status, is_finished(cell)) == ("unfinished", False)


@pytest.mark.parametrize(
    "line",
    [
        '{"run": "a", "sta',
        "[]",
        '{"run": "a"}',
        '{"run": "a", "status": "completed", "overrides": {}, "collapsed_at": null, "accuracy_after": "1"}',
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    (cell,) = cells_of(tmp_path, "grpo", 1)
    path = write_results([finished(cell, 0.5)], RECIPE, tmp_path)
    path.write_text(path.read_text() + f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 3 is not the row of a run"):
        known_results([cell], RECIPE, tmp_path)


@pytest.mark.parametrize(
    ("failed", "status", "told"),
    [
        (0, "completed", []),
        (1, "completed", []),
        (2, "completed", ["grpo, lag 3, seed 0: 2 of 100 episodes failed (reward 0, nothing to learn from); "
                          "its log says why"]),
        (51, "failed", ["failed: grpo, lag 3, seed 0: 51 of its 100 episodes failed, its log says why; "
                        "remove FOLDER to have it run again"]),
    ],
)  # fmt: skip
def test_failed_episodes_are_told_and_most_of_them_are_a_failed_run(
    tmp_path: Path, failed: int, status: str, told: list[str]
) -> None:
    (cell,) = cells_of(tmp_path, "grpo", 1, (3,))
    finished(cell, 0.0)
    path = cell.folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"episodes": 100, "failed_episodes": failed}))
    result = result_of(cell)
    row = result.row(RECIPE)
    assert (row["status"], row["episodes"], row["failed_episodes"]) == (status, 100, failed)
    assert [remark.replace(str(cell.folder), "FOLDER") for remark in remarks([result])] == told


@pytest.mark.parametrize(("failed", "status"), [(8, "completed"), (33, "failed")])
def test_failures_on_held_out_problems_count_as_well(tmp_path: Path, failed: int, status: str) -> None:
    (cell,) = cells_of(tmp_path, "grpo", 1)
    finished(cell, 0.0)
    path = cell.folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy_after_failed": failed}))
    result = result_of(cell)
    assert (result.status, result.row(RECIPE)["accuracy_after_failed"]) == (status, failed)
    (told,) = remarks([result])
    assert f"{failed} of {'its ' if failed > 32 else ''}64 held-out episodes failed" in told


def test_a_completed_row_is_not_replaced_by_that_of_a_run_that_is_not(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "vcpo", 1)
    (first,) = [finished(cell, 0.5) for cell in cells]
    controls, _ = make_controls([first], tmp_path)
    results = [first, *(finished(control, 0.75) for control in controls)]
    before = write_results(results, RECIPE, tmp_path).read_text()
    assert write_results([result_of(cells[0], "no luck")], RECIPE, tmp_path).read_text() == before
    # The run's rerun fails, so that its controls cannot be made: what they gave stays, and is shown where the
    # settings do not hang on that run.
    cannot, impossible = make_controls([result_of(cells[0], "no luck")], tmp_path)
    assert cannot == [] and [result.status for result in impossible] == ["failed"] * 3
    shown = impossible_results(impossible, RECIPE, tmp_path)
    assert [result.cell.method for result in shown.values()] == ["vcpo+zero-baseline"]
    assert write_results(list(shown.values()), RECIPE, tmp_path).read_text().count('"completed"') == 4


def test_factors_that_are_gone_fail_their_control_unless_it_was_completed(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "vcpo", 1)
    first = finished(cell, 0.5)
    controls, _ = make_controls([first], tmp_path)
    write_results([first, *(finished(control, 0.75) for control in controls)], RECIPE, tmp_path)
    (tmp_path / "controls" / f"{cell.name}.json").unlink()
    left, (permuted,) = make_controls([replace(first, rows=())], tmp_path)
    assert [control.method for control in left] == ["vcpo+constant-lr", "vcpo+zero-baseline"]
    assert permuted.error == f"the metrics of {cell.name} are gone, and its step scales with them"
    (known,) = impossible_results([permuted], RECIPE, tmp_path).values()
    assert (known.status, known.figure("accuracy_after")) == ("completed", 0.75)


def test_a_lag_that_is_never_reached_is_told(tmp_path: Path) -> None:
    short = apply_overrides(RECIPE, ["--pipeline.steps", "8"])
    cells = make_grid(short, parse_methods("grpo"), (7, 8), (0,), tmp_path)
    (told,) = remarks([result_of(cell) for cell in cells])
    assert told == "lag 8 is never reached in 8 steps: rollouts there are at most 7 steps old, as at lag 7"


def test_controls_have_the_same_mean_or_the_same_factors(tmp_path: Path) -> None:
    results = [finished(cell, 0.5) for cell in cells_of(tmp_path, "vcpo[learner.learning_rate=0.001],tis", 1)]
    controls, impossible = make_controls(results, tmp_path)
    assert impossible == []
    method = "vcpo[learner.learning_rate=0.001]"
    assert [c.method for c in controls] == [
        f"{method}+{c}" for c in ("constant-lr", "permuted", "zero-baseline")
    ]
    assert {(c.lag, c.seed, c.control_of) for c in controls} == {(8, 0, results[0].cell.name)}
    constant, permuted, zero = (control.config for control in controls)
    assert constant.algorithm.step_scale == "off"
    assert constant.learner.learning_rate == pytest.approx(0.001 * 0.625)
    factors = json.loads(Path(permuted.algorithm.step_scales).read_text())
    assert sorted(factors) == sorted(SCALES * 3) and factors != SCALES * 3
    assert (permuted.algorithm.step_scale, permuted.learner.learning_rate) == (None, 0.001)
    assert (zero.algorithm.baseline, zero.algorithm.step_scales) == ("zero", "")


def test_a_control_that_the_grid_has_is_not_run_again(tmp_path: Path) -> None:
    off = "algorithm.step_scale=off"
    cells = cells_of(tmp_path, f"vcpo[{off}],vcpo[{off};algorithm.baseline=zero]", 1)
    assert make_controls([finished(cell, 0.5) for cell in cells], tmp_path) == ([], [])


def test_the_zero_baseline_has_no_margin_of_the_baseline_it_replaces(tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, "vcpo[algorithm.baseline=bounded-optimal;algorithm.margin=0]", 1)
    controls, _ = make_controls([finished(cell, 0.5)], tmp_path)
    made = {c.method.rpartition("+")[2]: c.config.algorithm for c in controls}
    assert (made["zero-baseline"].baseline, made["zero-baseline"].margin) == ("zero", None)
    assert (made["constant-lr"].baseline, made["constant-lr"].margin) == ("bounded-optimal", 0)


def page_of(out: Path, results: list[Result], settings: Config = RECIPE) -> str:
    return write_page(results, summarise(results), {"pipeline.steps": 40}, "sort", out).read_text()


def test_the_page_has_every_figure_and_marks_collapse_and_failure(tmp_path: Path) -> None:
    """A grid of two methods at two lags, of which one run collapses and one fails after some steps."""
    cells = cells_of(tmp_path, "vcpo,tis", 2, (0, 8))
    fall = [0.8] * 40 + [0.0] * 60
    results = [finished(cell, 0.5) for cell in cells[:-1] if cell is not cells[3]]
    results.insert(3, finished(cells[3], 0.05, fall))
    with MetricsWriter(cells[-1].folder) as writer:
        writer.write({"step": 1, "reward": 0.5, "ess_ratio": 0.5, "step_scale": 1.0, "grad_norm": 1.0})
    results.append(result_of(cells[-1], "no <luck>"))
    text = page_of(tmp_path, results)
    over_lags = [f"{kind} accuracy: Final accuracy against policy lag" for kind in ("Greedy", "Sampled")]
    names = ("Greedy accuracy", "Sampled accuracy", "Reward", "ESS ratio", "Gradient norm", "Step scale")
    for name in [*over_lags, *(f"{name}: Lag {lag}, over steps" for lag in (0, 8) for name in names)]:
        assert f'aria-label="{name}"' in text
    assert "failed: tis, lag 8, seed 1: no &lt;luck&gt;" in text
    for drawing in re.findall("<svg.*?</svg>", text, re.DOTALL):
        assert 'class="series m0"' in drawing and 'class="series m1"' in drawing
    collapsed = results[3]
    assert collapsed.collapsed_at is not None and 40 < collapsed.collapsed_at < 70
    assert f"<td>step {collapsed.collapsed_at}</td>" in text
    for outside in ("http://www", "https://", "<script src", "<link", "src="):
        assert outside not in text.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace(
            'xmlns="http://www.w3.org/2000/svg"', ""
        ), outside


def test_a_table_in_markdown_keeps_its_columns_whatever_a_label_has_in_it(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "vcpo[sampler.options=a|b;sampler.kind=vllm]", 1)
    header, rule, line = markdown(summarise([result_of(cell) for cell in cells])).splitlines()[:3]
    assert header.count("|") == rule.count("|") == line.replace("\\|", "").count("|") == 11
    assert "a\\|b" in line


def test_the_table_can_be_read_in_80_columns(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, "vcpo,vcpo-taper[learner.learning_rate=8e-4]", 2)
    results = [finished(cell, after) for cell, after in zip(cells, (0.5, 1.0, 0.9, 0.8), strict=True)]
    console = Console(width=80, record=True, file=io.StringIO())
    (table,) = rich_tables(summarise(results))  # one lag has no overview
    console.print(table)
    text = console.export_text()
    by_start = {tuple(line.split()[:2]): line for line in text.splitlines() if line.strip()}
    first, second = by_start["8", "vcpo"], by_start["8", "vcpo-taper"]
    # Seeds come one after the other: 0.5 and 0.9, 1.0 and 0.8.
    assert first.split()[2:] == ["2", "70.0", "%", "70.0", "%", "0.469", "0.625", "0", "of", "2"]
    assert second.split()[2:] == ["2", "90.0", "%", "90.0", "%", "0.469", "0.625", "0", "of", "2"]
    column = slice(second.index("vcpo-taper"), second.index("2 "))
    name = "".join(line[column].strip() for line in text[text.index(second) :].splitlines()[:4])
    assert name.startswith("vcpo-taper[learner.learning_rate=8e-4]")


def test_the_overview_has_a_line_a_method_the_best_first_and_controls_below_their_own(tmp_path: Path) -> None:
    def of(method: str, lag: int, *after: float, control_of: str = "") -> list[Result]:
        cells = cells_of(tmp_path / method.replace("+", "-"), method.partition("+")[0], len(after), (lag,))
        named = [replace(cell, method=method, control_of=control_of) for cell in cells]
        return [finished(cell, value) for cell, value in zip(named, after, strict=True)]

    fallen, steady = of("tis", 8, 0.4, 0.4)
    results = [
        *of("tis", 0, 0.5, 0.7), replace(fallen, collapsed_at=3), steady,
        *of("vcpo", 0, 0.9, 0.9), *of("vcpo", 8, 0.6, 0.8),
        *of("vcpo+permuted", 8, 0.95, 0.95, control_of="vcpo"),
        *of("grpo", 0, 1.0),
    ]  # fmt: skip
    for method, lag in (("grpo", 8), ("vcpo", 0)):
        (cell,) = cells_of(tmp_path / f"failed-{method}", method, 1, (lag,))
        results.append(replace(result_of(cell, "no luck"), collapsed_at=2))
    # Half an interval of two values at a distance d is t · d / 2, and t is 12.706 with one degree of freedom.
    assert overview(summarise(results)) == [
        ["method", "lag 0", "lag 8"],
        ["vcpo", "90 ±0 (2), 1 failed", "70 ±127 (2)"],
        ["vcpo+permuted", "–", "95 ±0 (2)"],
        ["tis", "60 ±127 (2)", "40 ±0 (2) †1"],
        ["grpo", "100 (1)", "1 failed"],
    ]


def test_seeds_without_a_step_in_common_have_no_mean_line(tmp_path: Path) -> None:
    """The gradient is positive in step 1 of one seed and in step 2 of the other, as rare rewards make it."""
    results = []
    base = apply_overrides(RECIPE, ["--pipeline.steps", "2"])
    for seed, cell in enumerate(make_grid(base, parse_methods("vcpo"), (8,), (0, 1), tmp_path)):
        with MetricsWriter(cell.folder) as writer:
            for step in (1, 2):
                writer.write({"step": step, "reward": 0.0, "grad_norm": float(step == seed + 1)})
        (cell.folder / "summary.json").write_text('{"steps": 2}')
        results.append(result_of(cell))
    assert 'aria-label="Gradient norm: Lag 8, over steps"' in page_of(tmp_path, results)
