"""Each rule against a synthetic run that shows the sign and one that does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from vcpo.monitor.diagnosis import Finding, diagnose

STEPS = 120


def healthy_run(**change: Callable[[int], Any]) -> list[dict[str, Any]]:
    """A run without any sign; ``change`` replaces a metric by a function of the step."""
    noise = random.Random(3)
    rows = []
    for step in range(1, STEPS + 1):
        row = {
            "step": step,
            "reward": 0.3 + 0.4 * step / STEPS + noise.gauss(0, 0.04),
            "ess": 128 * 0.8,
            "ess_ratio": 0.8,
            "kl": 0.03,
            "grad_norm": 0.5 * 2 ** noise.gauss(0, 0.5),
            "equal_groups": 0.3,
            "failed_episodes": 0,
            "truncated_episodes": 4,
            "seconds_training": 0.05,
            "seconds_waiting": 0.02,
            "seconds_publishing": 0.001,
            "seconds_sampling": 0.065,
            "elapsed": 0.072 * step,
            "lag_mean": 1.8,
        }
        rows.append(row | {key: function(step) for key, function in change.items()})
    return rows


def words_of(findings: list[Finding]) -> str:
    return " | ".join(f"{f.severity}: {f.sentence}" for f in findings)


def ess(ratio: Callable[[int], float]) -> dict[str, Callable[[int], float]]:
    return {"ess_ratio": ratio, "ess": lambda step: 128 * ratio(step)}


def test_a_healthy_run_has_no_findings():
    assert diagnose(healthy_run(), target_lag=2) == []


def test_an_empty_or_short_or_null_run_is_no_error():
    assert diagnose([]) == []
    assert diagnose([{"step": 1}], target_lag=2) == []
    assert diagnose([{"step": s, "ess_ratio": None, "kl": None, "reward": None} for s in range(50)]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ess(lambda s: 0.75 if s < 40 else 0.04),
            "critical: The ESS ratio fell from 0.75 to below 0.10 at step 5",
        ),
        (
            {"kl": lambda s: s / 100},
            "warning: KL per token from behaviour to current policy passed 0.5 at step",
        ),
        ({"reward": lambda s: 0.8 if s < 70 else 0.1}, "critical: The reward fell from 0.80 at step"),
        ({"grad_norm": lambda s: 50.0 if s % 25 == 0 else 0.5}, "warning: 4 of 120 gradient norms"),
        ({"equal_groups": lambda s: 0.95}, "warning: In 95% of the groups all rewards were equal"),
        ({"failed_episodes": lambda s: 13}, "warning: The environment failed in 10.2% of the episodes"),
        ({"truncated_episodes": lambda s: 64}, "warning: 50% of the episodes were cut by a length limit"),
        ({"seconds_waiting": lambda s: 0.153}, "info: The learner waited for samplers 75% of the time"),
        ({"seconds_sampling": lambda s: 0.0213}, "info: The samplers worked only 30% of the time"),
        ({"lag_mean": lambda s: 6.5}, "warning: The mean policy lag was 6.5 steps"),
    ],
)
def test_each_sign_is_found_and_nothing_else(change: dict[str, Callable[[int], float]], said: str):
    findings = diagnose(healthy_run(**change), target_lag=2)
    assert len(findings) == 1, words_of(findings)
    assert words_of(findings).startswith(said)
    assert findings[0].advice.endswith(".")


@pytest.mark.parametrize(
    "change",
    [
        ess(lambda s: 0.06),  # small from the first step on: the sampler's numerics, not a collapse
        ess(lambda s: 0.02 if s == 60 else 0.8),  # one bad minibatch
        ess(lambda s: 0.8 if s < 40 else 0.12),  # low, but as in runs that survived
        {"kl": lambda s: 2.0 if s == 60 else 0.03},
        {"kl": lambda s: 0.45},
        {"reward": lambda s: 0.8 if s < 70 else 0.5},
        {"reward": lambda s: 0.03 if s < 70 else 0.0},  # too small to tell from noise
        {"reward": lambda s: -1.0 - s / 100},  # negative rewards have no "half of the best"
        {"grad_norm": lambda s: 50.0 if s == 60 else 0.5},  # a lone spike
        {"grad_norm": lambda s: 0.0},
        {"equal_groups": lambda s: 0.95 if s < 50 else 0.5},  # only at the start
        {"failed_episodes": lambda s: int(s == 9)},
    ],
)
def test_what_only_resembles_a_sign_is_not_reported(change: dict[str, Callable[[int], float]]):
    assert diagnose(healthy_run(**change), target_lag=2) == []


def test_a_run_in_which_every_episode_failed_says_so():
    rows = healthy_run(
        failed_episodes=lambda s: 128, action_tokens=lambda s: 0, response_length=lambda s: 0.0
    )
    assert "failed in 100.0%" in words_of(diagnose(rows))


def test_the_worst_comes_first():
    rows = healthy_run(equal_groups=lambda s: 0.9, reward=lambda s: 0.8 if s < 70 else 0.1)
    assert [finding.severity for finding in diagnose(rows)] == ["critical", "warning"]


def test_waiting_is_not_judged_where_one_process_does_both():
    rows = healthy_run(seconds_waiting=lambda s: 0.2, seconds_sampling=lambda s: 0.2)
    assert "waited" in words_of(diagnose(rows))
    assert diagnose(rows, overlapping=False) == []


def test_the_lag_is_judged_only_against_a_known_target():
    rows = healthy_run(lag_mean=lambda s: 64.0)
    assert diagnose(rows) == []
    assert diagnose(rows, target_lag=64) == []
