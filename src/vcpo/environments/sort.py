"""Sort digits: ``3141>`` asks for ``1134``. One turn; the warm start alone nearly solves it greedily, so
that reinforcement learning only sharpens: useful to watch a method collapse, not to watch it learn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from vcpo.config import EnvironmentConfig
from vcpo.environments.protocol import Codec, Demonstration, Episode, Problem, Split
from vcpo.environments.splits import draw
from vcpo.errors import ConfigError

DIGITS = "0123456789"


class Sort:
    """``size`` digits to put in ascending order; reward 1 for exactly the right digits and an end."""

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        self._codec, self._size = codec, config.size
        self._max_tokens = config.size + 1
        if config.max_tokens < self._max_tokens:
            raise ConfigError(
                f"environment.max_tokens = {config.max_tokens}: sorting {config.size} digits takes "
                f"{self._max_tokens} tokens, the end token included; raise it or lower environment.size"
            )
        for split in ("train", "held_out"):
            self.problem(0, split)

    @classmethod
    def alphabet(cls, config: EnvironmentConfig) -> str:
        """Digits and the separator."""
        return DIGITS + ">"

    def problem(self, index: int, split: Split) -> Problem:
        """Digits independent and uniform; the answer is the sorted text."""
        return draw(index, split, self._propose)

    def check_context(self, context_length: int) -> None:
        """Raise ConfigError if prompt and answer would not fit."""
        needed = len(self._codec.encode("0" * self._size + ">")) + self._max_tokens
        if needed > context_length:
            raise ConfigError(
                f"sorting {self._size} digits needs {needed} tokens and the context holds {context_length}; "
                "raise model.context_length or lower environment.size"
            )

    async def play(self, problem: Problem, episode: Episode) -> float:
        """One answer, judged as text."""
        episode.observe(self._codec.encode(problem.prompt))
        answer = await episode.act(self._max_tokens)
        ended = bool(answer) and answer[-1] == self._codec.end_id
        return float(ended and self._codec.decode(answer) == problem.answer)

    def demonstrations(self, seed: int) -> Iterator[Demonstration]:
        """Right answers to training prompts."""
        rng = random.Random(seed)
        while True:
            problem = self.problem(rng.getrandbits(40), "train")
            yield Demonstration.of_answer(self._codec, problem.prompt, problem.answer)

    def _propose(self, rng: random.Random) -> tuple[str, str]:
        digits = rng.choices(DIGITS, k=self._size)
        return "".join(digits) + ">", "".join(sorted(digits))
