"""benchmarks.evidence_pages and benchmarks.lead_time, on rows whose figures were worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import ALGORITHMS
from benchmarks.evidence_pages import PAGES, cell, draw_study, plain_name, table, with_tables
from benchmarks.lag_figure import GAP, PANELS, spread
from benchmarks.lead_time import Signal, fall, judge
from vcpo.monitor.statistics import series


def a_row(
    method: str, lag: int, seed: int, greedy: float, sampled: float = 0.5, **more: Any
) -> dict[str, Any]:
    figures = {"greedy_accuracy_after": greedy, "accuracy_after": sampled}
    usual = {"status": "completed", "collapsed": False, "ess_ratio_mean": 0.25, "step_scale_mean": 1.0}
    return {"method": method, "lag": lag, "seed": seed, **usual, **figures, **more}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        a_row("topr", 0, 0, 0.9, 0.8),
        a_row("topr", 0, 1, 0.7, 0.6),
        a_row("topr", 64, 0, 0.8, 0.5),
        a_row("topr", 64, 2, 0.8, 0.1),
        a_row("vcpo[learner.learning_rate=2e-4]", 64, 0, 0.1, 0.25, collapsed=True),
        a_row("vcpo[learner.learning_rate=2e-4]", 64, 1, 0.3, 0.25),
        a_row("grpo", 64, 0, 0.0, status="failed"),
    ]
    (tmp_path / "lag").mkdir()
    (tmp_path / "lag" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def body(text: str) -> list[str]:
    return text.splitlines()[2:]


def test_a_cell_has_mean_interval_and_count() -> None:
    # Mean .8, deviation .1414, over sqrt 2: .1; t of one degree of freedom at 97.5 % is 12.706.
    assert cell([0.9, 0.7]) == ".800 ± 1.271 (2)"
    assert cell([0.25], 1) == ".250 (1) †1"
    assert cell([-0.3], signed=True) == "−.300 (1)"
    assert cell([]) == "–"


def test_over_lags_leaves_failed_runs_out_and_puts_the_best_first(data: Path) -> None:
    assert body(table("lag, over lags", data)) == [
        "| topr | .800 ± 1.271 (2) | .800 ± .000 (2) |",
        "| vcpo at 2e-4 | – | .200 ± 1.271 (2) †1 |",
    ]


def test_over_rates_the_rule_chooses_the_best_mean_and_of_equals_the_lowest(tmp_path: Path) -> None:
    found = {"a": {"2e-4": (0.5, 0.3), "8e-4": (0.2, 0.6)}, "b": {"8e-4": (0.9,), "4e-4": (0.1,)}}
    (tmp_path / "rates").mkdir()
    with (tmp_path / "rates" / "results.jsonl").open("w") as file:
        for name, rates in found.items():
            for rate, values in rates.items():
                for seed, value in enumerate(values):
                    method = f"{name}[learner.learning_rate={rate}]"
                    row = a_row(method, 16, seed, 0.0, value, collapsed=value == 0.1)
                    file.write(json.dumps(row) + "\n")
    assert table("rates, over rates", tmp_path).splitlines() == [
        "| method | at 2e-4 | at 4e-4 | at 8e-4 |",
        "| --- | --- | --- | --- |",
        "| b | – | .100 (.100) †1 | **.900** (.900) |",
        "| a | **.400** (.500, .300) | – | .400 (.200, .600) |",
    ]


def test_at_a_lag(data: Path) -> None:
    assert body(table("lag, at lag 64, only vcpo", data)) == [
        "| vcpo at 2e-4 | .200 ± 1.271 (2) | .250 ± .000 (2) | 0.25 | 1.00 | 1 of 2 |"
    ]


def test_differences_are_of_the_same_seed(data: Path) -> None:
    # Seed 0: .5 − .8; seeds 1 and 2 have no partner. Against topr: .25 − .5.
    assert body(table("lag, against lag 0", data)) == ["| topr | −.300 (1) |"]
    assert body(table("lag, against topr", data)) == ["| vcpo at 2e-4 | – | −.250 (1) |"]
    assert body(table("lag, against vcpo at 2e-4", data)) == ["| topr | – | +.250 (1) |"]


def test_settings_are_kept_in_names() -> None:
    assert (
        plain_name("vcpo[learner.learning_rate=2e-4;algorithm.truncation=4]")
        == "vcpo[algorithm.truncation=4]"
    )
    assert (
        plain_name("vcpo[algorithm.truncation=4;learner.learning_rate=2e-4]")
        == "vcpo[algorithm.truncation=4]"
    )


def test_an_unknown_form_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="over lags"):
        table("lag, by moonlight", data)


def test_only_what_is_between_the_comments_is_replaced(data: Path) -> None:
    page = "before\n<!-- table: lag, against lag 0 -->\nold\n<!-- end -->\nafter\n"
    made = with_tables(page, data)
    assert made.startswith("before\n<!-- table: lag, against lag 0 -->\n\n| method | lag 64 − lag 0 |")
    assert made.endswith("| topr | −.300 (1) |\n\n<!-- end -->\nafter\n")
    assert with_tables(made, data) == made


def test_the_figure_has_the_methods_that_ran_at_several_lags(data: Path, tmp_path: Path) -> None:
    draw_study(data / "lag" / "results.jsonl", tmp_path / "lag.svg")
    drawn = (tmp_path / "lag.svg").read_text()
    assert "topr" in drawn
    assert "vcpo" not in drawn


def test_every_method_has_a_place_in_one_panel_of_the_figure() -> None:
    assert sorted(name for own in PANELS.values() for name in own) == sorted(ALGORITHMS)


def test_labels_are_moved_apart_and_stay_within_the_figure() -> None:
    assert spread([0.5, 0.9, 0.5]) == [0.5, 0.9, 0.5 + GAP]
    assert spread([1.0, 0.99]) == pytest.approx([1.0, 1.0 - GAP])
    assert spread([0.0, 0.0, 0.0]) == pytest.approx([0.0, GAP, 2 * GAP])
    assert spread([]) == []


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_the_pages_have_the_tables_of_their_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text, PAGES / "data") == text, "run python -m benchmarks.evidence_pages"


def a_run(accuracies: list[float], ess: list[float]) -> list[dict[str, Any]]:
    """An evaluation every 10 steps, an ESS ratio every step."""
    rows: list[dict[str, Any]] = [
        {"step": step, "ess_ratio": ess[(step - 1) // 10], "top_weight_share": 0.0, "kl": 0.0}
        | {"ratio_variance": 0.0, "grad_norm": 1.0, "reward": 1.0}
        for step in range(1, 10 * len(accuracies) + 1)
    ]
    for place, accuracy in enumerate(accuracies, 1):
        rows[10 * place - 1]["accuracy"] = accuracy
    return rows


def test_a_run_falls_where_it_stays_below_half_of_its_best() -> None:
    # Means of three evaluations: .5 .6 .7 .7 .5 .3 .1; half of the best is .35.
    assert fall(a_run([0.5, 0.7, 0.9, 0.5, 0.1, 0.3, -0.1], [1.0] * 7)) == 60
    assert fall(a_run([0.5, 0.7, 0.0, 0.7, 0.7, 0.6, 0.5], [1.0] * 7)) is None


def test_lead_is_from_the_alarm_to_the_fall() -> None:
    falling = a_run([0.8, 0.8, 0.8, 0.8, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0] + [0.0] * 5)
    steady = a_run([0.8] * 8, [1.0] * 8)
    restless = a_run([0.8] * 8, [1.0] * 3 + [0.0] * 5)
    signal = Signal("ess", lambda rows: series(rows, "ess_ratio"), (0.5,))
    # After n steps of 0 the average is about 2^(−n/5): below .5 from the fifth or sixth on.
    assert signal.alarm(falling, 0.5) in (35, 36)
    assert fall(falling) == 60  # means .8 .8 .8 .8 .53 .27 0 0, half of the best is .4
    found = next(f for f in judge([falling, steady, restless]) if f.level == "below 0.5")
    assert list(found.leads) == [60 - signal.alarm(falling, 0.5)]  # type: ignore[operator]
    assert (found.falls, found.false_alarms, found.others) == (1, 1, 2)
