"""The rule of collapse on series made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from vcpo.monitor.collapse import find_collapse


def rows(rewards: list[float], accuracies: dict[int, float] | None = None) -> list[dict[str, Any]]:
    known = accuracies or {}
    return [
        {"step": step, "reward": reward, "accuracy": known.get(step)}
        for step, reward in enumerate(rewards, start=1)
    ]


def test_a_reward_that_is_lost_for_good_fell_when_its_average_was_halved() -> None:
    """0.8 for 100 steps, then 0: with a half-life of 15 steps the average is 0.8 · 2^(-n/15) after n steps,
    (all but) below 0.4 at n = 16, which is step 116."""
    assert find_collapse(rows([0.8] * 100 + [0.0] * 100)) == pytest.approx(116, abs=1)


@pytest.mark.parametrize(
    "rewards",
    [
        [0.5] * 200,
        [0.8] * 80 + [0.0] * 40 + [0.8] * 80,  # it came back
        [0.8] * 100 + [0.5] * 100,  # less than half is lost
        [0.04] * 100 + [0.0] * 100,  # too little to tell from noise
        [0.8] * 5,
        [],
    ],
)
def test_what_is_no_collapse(rewards: list[float]) -> None:
    assert find_collapse(rows(rewards)) is None


def test_a_reward_of_old_policies_does_not_count_against_the_last_one() -> None:
    fallen = rows([0.8] * 100 + [0.0] * 100, {100: 0.7, 150: 0.2})
    assert find_collapse(fallen, before=0.6, after=0.36) is None, "more than half of 0.7"
    assert find_collapse(fallen, before=0.6, after=0.34) == find_collapse(fallen) is not None
    assert find_collapse(rows([0.8] * 100 + [0.0] * 100), before=0.0, after=0.0) is not None, "tells nothing"


def test_an_accuracy_far_below_that_before_is_a_collapse() -> None:
    """n = 100, from .50: the error of the difference to .25 is sqrt(.25 + .1875) / 10 = .066, three are .198;
    .25 is below .302, and has been since step 40."""
    accuracies = {20: 0.2, 30: 0.4, 40: 0.3, 50: 0.1}
    steady = rows([0.5] * 60, accuracies)
    assert find_collapse(steady, before=0.5, after=0.25, problems=100) == 40
    assert find_collapse(steady, before=0.5, after=0.31, problems=100) is None
    assert find_collapse(rows([0.5] * 60, {50: 0.4}), before=0.5, after=0.25, problems=100) == 60
    assert find_collapse(steady, before=None, after=0.25, problems=100) is None
    assert find_collapse(steady, before=0.0, after=0.0, problems=100) is None
