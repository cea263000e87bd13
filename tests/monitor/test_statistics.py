"""Intervals, smoothing and totals against numbers worked out by hand or by brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcpo.errors import VcpoError
from vcpo.monitor.statistics import (
    ema,
    lag_counts,
    mean,
    run_totals,
    sampler_shares,
    series,
    student_interval,
    student_quantile,
    time_spent,
    wilson_interval,
)

Z95 = 1.959963984540054


def test_wilson_interval_of_a_half_by_hand():
    # z² = 3.8414588; centre .5; half = sqrt(.25·10/... ) worked out: z/(2·sqrt(n + z²)) at p = 1/2.
    half = Z95 / (2 * math.sqrt(10 + Z95**2))
    low, high = wilson_interval(5, 10)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=5e-5)  # the textbook value


def test_wilson_interval_at_the_ends():
    # At p = 0 the upper bound is z² / (n + z²), at p = 1 the lower one is n / (n + z²).
    assert wilson_interval(0, 20) == pytest.approx((0.0, Z95**2 / (20 + Z95**2)))
    assert wilson_interval(20, 20) == pytest.approx((20 / (20 + Z95**2), 1.0))
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 4000), st.data())
def test_wilson_bounds_are_where_the_score_test_just_rejects(n: int, data: st.DataObject):
    successes = data.draw(st.integers(0, n))
    p = successes / n
    for bound in wilson_interval(successes, n):
        if 0 < bound < 1:
            assert (p - bound) ** 2 == pytest.approx(Z95**2 * bound * (1 - bound) / n, rel=1e-6, abs=1e-12)
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= p <= high <= 1


def test_a_wider_confidence_is_a_wider_interval():
    (a, b), (c, d) = wilson_interval(30, 100, 0.95), wilson_interval(30, 100, 0.99)
    assert c < a < b < d


@pytest.mark.parametrize(
    ("successes", "n", "confidence"),
    [(3, 2, 0.95), (-1, 5, 0.95), (1, 5, 1.0), (1, 5, 0.0), (math.nan, 5, 0.95)],
)
def test_an_impossible_proportion_is_named(successes: float, n: int, confidence: float):
    with pytest.raises(VcpoError, match=r"no interval of .* successes in"):
        wilson_interval(successes, n, confidence)


def test_ema_by_hand():
    # half-life 1: weights 1, 1/2, 1/4 …
    assert ema([4.0, 1.0, 2.0], 1.0) == pytest.approx([4.0, (4 / 2 + 1) / 1.5, (4 / 4 + 1 / 2 + 2) / 1.75])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0.5, 50))
def test_ema_is_the_weighted_mean_it_says(values: list[float], half_life: float):
    smooth = ema(values, half_life)
    for t in range(len(values)):
        weights = [2 ** (-(t - i) / half_life) for i in range(t + 1)]
        expected = sum(w * x for w, x in zip(weights, values, strict=False)) / sum(weights)
        assert smooth[t] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_series_leaves_out_missing_and_null():
    rows = [{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": None}, {"step": 4, "kl": 0.0}]
    assert series(rows, "kl") == ([1, 4], [0.5, 0.0])
    assert mean(rows, "kl") == 0.25
    assert mean(rows, "reward") is None


def test_lag_counts_add_up_over_steps_with_string_keys_of_json():
    rows = [
        {"step": 1, "lag_histogram": {"10": 1, "2": 3}},
        {"step": 2},
        {"step": 3, "lag_histogram": {2: 4}},
    ]
    assert list(lag_counts(rows).items()) == [(2, 7), (10, 1)]


def test_elapsed_of_a_resumed_run_adds_its_stretches():
    # 3 s, then resumed: the clock starts over and reaches 5 s.
    rows = [
        {
            "step": s,
            "elapsed": e,
            "seconds_training": 1.0,
            "seconds_waiting": 0.25,
            "seconds_publishing": 0.25,
        }
        for s, e in ((1, 1.5), (2, 3.0), (3, 2.0), (4, 5.0))
    ]
    spent = time_spent(rows)
    assert spent.elapsed == pytest.approx(8.0)
    assert (spent.learning, spent.rest) == pytest.approx((6.0, 2.0))


def test_totals_of_no_rows_are_empty_not_an_error():
    totals = run_totals([])
    assert totals["steps"] == 0 and totals["tokens"] == 0
    assert totals["tokens_per_second"] is None and totals["lag_max"] is None


def test_totals_by_hand():
    rows = [
        {
            "step": 1,
            "tokens": 100,
            "lag_mean": 1.0,
            "lag_max": 1,
            "ess_ratio": 0.5,
            "step_scale": 0.7,
            "seconds_training": 2.0,
        },
        {
            "step": 2,
            "tokens": 300,
            "lag_mean": 2.0,
            "lag_max": 4,
            "ess_ratio": 1.0,
            "step_scale": 0.9,
            "seconds_waiting": 3.0,
        },
    ]
    totals = run_totals(rows)
    assert totals["tokens_per_second"] == pytest.approx(400 / 5)
    assert (totals["lag_mean"], totals["lag_max"], totals["steps"]) == (1.5, 4, 2)
    assert (totals["ess_ratio_mean"], totals["step_scale_mean"]) == pytest.approx((0.75, 0.8))


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)
    assert student_quantile(0.5, freedom) == pytest.approx(0.0, abs=1e-9)


def test_the_interval_of_a_mean() -> None:
    """Mean 3, s = sqrt(2.5), t of 4 degrees of freedom 2.7764: 2.7764 · sqrt(2.5 / 5) = 1.9632."""
    assert student_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert student_interval([0.7]) == (0.7, 0.7)
    with pytest.raises(VcpoError):
        student_interval([])


def test_shares_of_samplers_that_come_and_go_by_hand() -> None:
    def figures(version: int, lag: int, rate: float | None, groups: int) -> dict[str, object]:
        return {
            "version": version,
            "lag": lag,
            "tokens_per_second": rate,
            "outstanding_groups": groups,
        }

    rows = [
        {"step": 1, "samplers": {"b": figures(0, 1, 100.0, 3)}},
        {"step": 2, "samplers": {"b": figures(2, 0, 300.0, 9), "a": figures(-1, 3, None, 0)}},
        {"step": 3, "samplers": {"b": figures(2, 1, None, 4)}},
        {"step": 4},
    ]
    a, b = sampler_shares(rows)
    assert (a.name, a.steps, a.last, a.tokens_per_second, a.lag_mean, a.outstanding_max) == (
        "a", 1, 2, None, 0.0, 0,
    )  # fmt: skip
    assert (b.steps, b.last, b.tokens_per_second, b.lag_max, b.outstanding_max) == (3, 3, 200.0, 1, 9)
    assert b.lag_mean == pytest.approx(2 / 3)
    assert sampler_shares([{"step": 1}]) == []
