"""An environment of long-tailed answers: lengths are drawn with the problem, whatever the policy does."""

from __future__ import annotations

import math
import random
from typing import Any

from vcpo.environments.protocol import Codec, Episode, Problem, Split

LETTERS = "abcdefgh"
MEDIAN, SIGMA, LONGEST = 12, 1.0, 150


class LongTail:
    """``environment.kind = "benchmarks.long_tail:LongTail"``: a letter is shown, and an answer of a
    log-normal number of tokens is rewarded by the share of that letter."""

    def __init__(self, codec: Codec, config: Any) -> None:
        self._codec = codec

    @classmethod
    def alphabet(cls, config: Any) -> str:
        return LETTERS + ">"

    def problem(self, index: int, split: Split) -> Problem:
        drawn = random.Random(f"{split} {index}")
        length = min(LONGEST, math.ceil(drawn.lognormvariate(math.log(MEDIAN), SIGMA)))
        letter = drawn.choice(LETTERS)
        return Problem(index, f"{letter}>", (letter, length))

    async def play(self, problem: Problem, episode: Episode) -> float:
        letter, length = problem.answer
        episode.observe(self._codec.encode(problem.prompt))
        answer = await episode.act(length, stop=frozenset())
        return self._codec.decode(answer).count(letter) / length
