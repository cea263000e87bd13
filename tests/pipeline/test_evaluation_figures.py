"""What the rewards of an evaluation say, those of episodes that failed among them."""

from __future__ import annotations

import pytest

from vcpo.pipeline.evaluation import success_figures


def test_a_failed_episode_is_a_wrong_answer_and_is_counted() -> None:
    figures = success_figures("accuracy", [1.0, 0.5, None, None, 1.0])
    assert figures.pop("accuracy_interval") == pytest.approx([0.1176, 0.7693], abs=1e-4)  # Wilson, 2 of 5
    assert figures == {"accuracy": 0.4, "accuracy_reward": 0.5, "accuracy_failed": 2}
