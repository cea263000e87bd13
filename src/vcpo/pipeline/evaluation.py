"""What the rewards of an evaluation say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vcpo.monitor.statistics import wilson_interval


def is_success(reward: float | None) -> bool:
    """An episode succeeds with full reward, 1; graded rewards below it do not count, nor does one that failed
    (None)."""
    return reward is not None and reward >= 1


def accuracy(rewards: Sequence[float | None]) -> float:
    """Share of episodes that succeed."""
    return sum(map(is_success, rewards)) / max(len(rewards), 1)


def success_figures(name: str, rewards: Sequence[float | None]) -> dict[str, Any]:
    """NAME (the accuracy), NAME_interval (its 95 % Wilson interval), NAME_reward (the mean reward, that of an
    episode that failed being 0) and NAME_failed (how many did)."""
    return {
        name: accuracy(rewards),
        f"{name}_interval": list(wilson_interval(sum(map(is_success, rewards)), len(rewards))),
        f"{name}_reward": sum(reward or 0.0 for reward in rewards) / max(len(rewards), 1),
        f"{name}_failed": sum(reward is None for reward in rewards),
    }
