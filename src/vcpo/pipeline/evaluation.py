"""What the rewards of an evaluation say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vcpo.monitor.statistics import wilson_interval


def is_success(reward: float) -> bool:
    """An episode succeeds with full reward, 1; graded rewards below it do not count."""
    return reward >= 1


def accuracy(rewards: Sequence[float]) -> float:
    """Share of episodes that succeed."""
    return sum(map(is_success, rewards)) / max(len(rewards), 1)


def success_figures(name: str, rewards: Sequence[float]) -> dict[str, Any]:
    """NAME (the accuracy), NAME_interval (its 95 % Wilson interval) and NAME_reward (the mean reward)."""
    return {
        name: accuracy(rewards),
        f"{name}_interval": list(wilson_interval(sum(map(is_success, rewards)), len(rewards))),
        f"{name}_reward": sum(rewards) / max(len(rewards), 1),
    }
