"""What counts as a collapse of a run: one rule, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vcpo.monitor.diagnosis import REWARD_FLOOR, REWARD_LOST, reward_fall
from vcpo.monitor.statistics import Row, series

STANDARD_ERRORS = 3.0
"""Standard errors by which the accuracy after training must be below that before."""


def find_collapse(
    rows: Sequence[Row], *, before: float | None = None, after: float | None = None, problems: int = 0
) -> int | None:
    """The step at which the run collapsed; None if it did not.

    A run has collapsed if one of these holds, and the earlier step counts:

    - Its smoothed training reward ends below half of its best
      (:func:`~vcpo.monitor.diagnosis.reward_fall`, with its half-life and floor). The step is the first one
      from which on it stayed below. A fall that was made good is none; as the reward is that of policies
      ``lag`` steps old, it was also made good if the accuracy ``after`` is at least half of its own best.
    - Its sampled accuracy on held-out problems is lower ``after`` training than ``before`` by more than 3
      standard errors of their difference, sqrt(p(1 − p)/n + q(1 − q)/n) of p before, q after and n
      ``problems``. The step is that of the first evaluation from which on it was so low, or the last step.
    """
    fall = None if _accurate_at_the_end(rows, before, after) else reward_fall(rows)
    steps = [step for step in (fall and fall.step, _lost_accuracy(rows, before, after, problems)) if step]
    return min(steps, default=None)


def _accurate_at_the_end(rows: Sequence[Row], before: float | None, after: float | None) -> bool:
    if after is None:
        return False
    best = max([*series(rows, "accuracy")[1], after, before or 0.0])
    return best >= REWARD_FLOOR and after >= (1 - REWARD_LOST) * best


def _lost_accuracy(
    rows: Sequence[Row], before: float | None, after: float | None, problems: int
) -> int | None:
    if before is None or after is None or not problems or not rows:
        return None
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / problems)
    bound = before - STANDARD_ERRORS * error
    if not after < bound:
        return None
    first = rows[-1]["step"]
    for step, value in reversed(list(zip(*series(rows, "accuracy"), strict=True))):
        if value >= bound:
            break
        first = step
    return first
