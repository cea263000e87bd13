"""Which problem a group plays: ``pipeline.selection = "goldilocks"``.

Without selection group n plays problem n of the run's training stream. With it, the candidates of group n are
the K problems n·K … n·K + K − 1, so that none is ever a candidate twice (until a finite stream starts over).
The teacher's favourite is played, or with probability ε any of them. What is drawn depends on the run's seed
and n alone: a resumed run chooses as the first would have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vcpo.config import Config
from vcpo.environments.protocol import Environment
from vcpo.learner.teacher import Teacher
from vcpo.pipeline.build import build_environment
from vcpo.pipeline.rollout import training_index
from vcpo.policy.loading import Policy
from vcpo.samplers.random import derive_seed

log = logging.getLogger(__name__)


class Selector:
    """Chooses problems by what a teacher says of their prompts, and has it learn from how they went."""

    def __init__(self, config: Config, policy: Policy) -> None:
        pipeline = config.pipeline
        self._seed = config.run.seed
        self._candidates, self._exploration = pipeline.candidates, pipeline.exploration
        self._codec = policy.codec
        self._environment: Environment = build_environment(config, self._codec, policy.context_length)
        self.teacher = Teacher(policy, replay=pipeline.replay, token_budget=config.learner.token_budget)

    def choose(self, numbers: Sequence[int]) -> list[int]:
        """The place in the training stream of the problem that each of the groups plays."""
        return [self._choose(number) for number in numbers]

    def learn(self, outcomes: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Learn from (problem, mean reward) of groups just played; metrics of the step."""
        known = [(prompt, mean) for problem, mean in outcomes if (prompt := self._prompt(problem))]
        states = self.teacher.states([prompt for prompt, _ in known])
        return self.teacher.learn(states, [mean for _, mean in known]) if known else {}

    def _choose(self, number: int) -> int:
        first = number * self._candidates
        random = np.random.default_rng(derive_seed(self._seed, number, self._candidates))
        if random.random() < self._exploration:
            return first + int(random.integers(self._candidates))
        return first + int(self._predictions(first).argmax())

    def _predictions(self, first: int) -> Tensor:
        """Of the candidates from ``first`` on; −1 for one that cannot be shown."""
        places = range(first, first + self._candidates)
        prompts = [self._prompt(training_index(self._seed, place)) for place in places]
        predictions = torch.full([len(prompts)], -1.0)
        states = self.teacher.states([prompt for prompt in prompts if prompt])
        predictions[torch.tensor([bool(prompt) for prompt in prompts])] = self.teacher.predict(states)
        return predictions

    def _prompt(self, index: int) -> list[int]:
        """Tokens of a training problem's prompt; none if the environment cannot make the problem: playing it
        fails too then, and is where that is counted."""
        try:
            return self._codec.encode_prompt(self._environment.problem(index, "train").prompt)
        except Exception as error:
            log.warning("could not make train problem %d: %s: %s", index, type(error).__name__, error)
            return []
