"""The limit that overlong answers are punished by is one of a turn, not of an episode."""

from __future__ import annotations

import numpy as np
import pytest

from vcpo.algorithms import get_algorithm
from vcpo.learner.minibatch import Minibatch
from vcpo.trajectory import NOT_SAMPLED, Group, Trajectory


def episode(*turns: int) -> Trajectory:
    """An observed token before each turn, then its sampled ones."""
    mask = np.array([sampled for turn in turns for sampled in [False, *[True] * turn]], bool)
    return Trajectory(
        tokens=np.zeros(len(mask), np.int32),
        action_mask=mask,
        log_probs=np.zeros(len(mask), np.float32),
        versions=np.where(mask, 0, NOT_SAMPLED).astype(np.int32),
        reward=1.0,
    )


def test_the_longest_turn_is_punished_and_not_their_sum() -> None:
    group = Group(0, 0, (episode(8, 8, 8), episode(3, 9, 1), episode(10), episode()))
    batch = Minibatch.of([group], get_algorithm("dapo"), longest_answer=10)
    assert batch.rewards.tolist() == pytest.approx([1.0, 0.5, 0.0, 1.0])  # from 8 to 10 tokens
