"""Questions with known answers, one turn: what the environments have in common that read their problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import numpy as np

from vcpo.config import EnvironmentConfig
from vcpo.environments.data import Line, read_problems
from vcpo.environments.protocol import Codec, Episode, Problem, Split
from vcpo.environments.templates import check_template, fill
from vcpo.errors import DataError


class SingleTurn(ABC):
    """The problem through the template, one answer of at most ``environment.max_tokens`` tokens, and a reward
    of 1 if :meth:`is_right` says so, else 0."""

    default_template: ClassVar[str] = "{prompt}"
    """Used where ``environment.template`` is empty."""

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        self._codec, self._max_tokens = codec, config.max_tokens
        self._template = self._checked_template(config)
        problems = read_problems(config)
        self._splits: dict[Split, list[Line]] = {"train": problems.train, "held_out": problems.held_out}

    @abstractmethod
    async def is_right(self, response: str, answer: str) -> bool:
        """Whether ``response`` gives ``answer``."""

    @classmethod
    def alphabet(cls, config: EnvironmentConfig) -> str:
        """The characters of prompts, as they are shown, and answers."""
        problems = read_problems(config)
        texts = [line.prompt + line.answer for line in [*problems.train, *problems.held_out]]
        return "".join(sorted({*fill(cls._checked_template(config), prompt=""), *"".join(texts)}))

    @classmethod
    def data_text(cls, config: EnvironmentConfig) -> str:
        """Where the problems come from and how many there are."""
        train, held_out, source = read_problems(config)
        return f"{source}: {len(train):,} problems to train on, {len(held_out):,} held out"

    def problem(self, index: int, split: Split) -> Problem:
        """Held out: one order, over and over. Train: every line once an epoch, each epoch in an order of its
        own."""
        lines = self._splits[split]
        epoch, place = divmod(index, len(lines))
        if split == "train":
            place = int(_order(len(lines), epoch)[place])
        return Problem(index, lines[place].prompt, lines[place].answer)

    def problem_count(self, split: Split) -> int:
        """Lines of the split."""
        return len(self._splits[split])

    def check_context(self, context_length: int) -> None:
        """Raise DataError for the first prompt that leaves no room for even one token of an answer."""
        for line in sorted({*self._splits["train"], *self._splits["held_out"]}):
            used = len(self._shown(line.prompt))
            if used >= context_length:
                raise DataError(
                    f"{line.place}: the prompt takes {used} tokens and the context "
                    f"holds {context_length}, answer included; shorten it or raise model.context_length"
                )

    async def play(self, problem: Problem, episode: Episode) -> float:
        """One answer."""
        episode.observe(self._shown(problem.prompt))
        response = self._codec.decode(await episode.act(self._max_tokens))
        return float(await self.is_right(response, problem.answer))

    def _shown(self, prompt: str) -> list[int]:
        return self._codec.encode_prompt(fill(self._template, prompt=prompt))

    @classmethod
    def _checked_template(cls, config: EnvironmentConfig) -> str:
        template = config.template or cls.default_template
        check_template(template, ["prompt"])
        return template


@lru_cache(maxsize=4)
def _order(count: int, epoch: int) -> np.ndarray:
    """[count]: the order of one epoch. Rollouts near an epoch's end ask for two epochs in turn."""
    return np.random.default_rng(epoch).permutation(count)
