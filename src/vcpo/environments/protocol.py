"""What an environment is, and the episode it plays with.

An environment gives problems and plays an episode of one: it shows the model tokens, lets it act, shows
it what happened, and in the end returns a reward. It sees tokens, never text that would have to be
tokenized again, and it does not know which engine samples.

A complete environment of one turn::

    class Echo:
        def __init__(self, codec, config):
            self.codec = codec

        def problem(self, index, split):
            return Problem(index, "abc>", "abc")

        async def play(self, problem, episode):
            episode.observe(self.codec.encode_prompt(problem.prompt))
            answer = await episode.act(max_tokens=4)
            return float(self.codec.decode(answer) == problem.answer)

Name it in a recipe as ``environment.kind = "my_package.my_module:Echo"``. What it may offer beyond that is
one small protocol each: an alphabet (``SmallModelEnvironment``), demonstrations
(``DemonstratingEnvironment``), a check against the model's context (``ContextChecked``), the number of its
problems (``FiniteEnvironment``), what a plan says of its data (``DataEnvironment``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vcpo.errors import ContextOverflowError, EnvironmentFailure
from vcpo.samplers.protocol import Completer, Completion
from vcpo.trajectory import NOT_SAMPLED, Outcome, Trajectory

Split = Literal["train", "held_out"]


class Codec(Protocol):
    """Text to token ids and back; :mod:`vcpo.policy.tokens` wraps a Hugging Face tokenizer as one."""

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands: no special token is added."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special tokens left out."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: through the chat template where the tokenizer has one."""
        ...


@dataclass(frozen=True)
class Problem:
    """One task of an environment."""

    index: int
    """Position in its split's stream: the same index is always the same problem."""
    prompt: str
    answer: Any = None
    """Whatever the environment needs to judge the episode."""


@dataclass(frozen=True)
class Demonstration:
    """One sequence for supervised warm start."""

    tokens: list[int]
    action_mask: list[bool]
    """True on the tokens the model should learn to produce."""

    @staticmethod
    def of_answer(codec: Codec, prompt: str, answer: str) -> Demonstration:
        """Prompt, answer and the end token; the last two are to be learned."""
        shown, learned = codec.encode(prompt), [*codec.encode(answer), codec.end_id]
        return Demonstration(shown + learned, [False] * len(shown) + [True] * len(learned))


@runtime_checkable
class Environment(Protocol):
    """Gives problems and plays them. Constructed as ``Environment(codec, config.environment)``.

    ``play`` must not share mutable state between episodes: many are in flight at once.
    """

    def problem(self, index: int, split: Split) -> Problem:
        """Problem ``index`` of the split; training streams never end (data sets start over)."""
        ...

    async def play(self, problem: Problem, episode: Episode) -> float:
        """Play one episode and return its reward. Whatever it raises costs this episode only."""
        ...


@runtime_checkable
class SmallModelEnvironment(Protocol):
    """An environment for which vcpo can build a small character-level model of its own.

    A class method, because the tokenizer is made from it before an environment can be constructed.
    """

    @classmethod
    def alphabet(cls, config: Any) -> str:
        """Every character that prompts, answers and observations may contain."""
        ...


@runtime_checkable
class DemonstratingEnvironment(Protocol):
    """An environment that can teach a fresh model its format by supervised learning."""

    def demonstrations(self, seed: int) -> Iterator[Demonstration]:
        """An endless stream, the same for the same seed; never of a held-out problem."""
        ...


@runtime_checkable
class ContextChecked(Protocol):
    """An environment that can tell before the run whether its episodes fit in the model's context."""

    def check_context(self, context_length: int) -> None:
        """Raise ConfigError (DataError, naming the line, for a file) if some episode would not fit."""
        ...


@runtime_checkable
class FiniteEnvironment(Protocol):
    """An environment with so few problems that an evaluation could meet one twice."""

    def problem_count(self, split: Split) -> int:
        """Problems of the split before its stream starts over."""
        ...


@runtime_checkable
class DataEnvironment(Protocol):
    """An environment whose problems come from a file or a hub, as a plan says before anything runs.

    A class method, because a plan has no model, and so no codec to construct an environment with.
    """

    @classmethod
    def data_text(cls, config: Any) -> str:
        """Where the problems come from and how many there are, in one line. Raises DataError, and
        UnreachableDataError for what only a run needs to have."""
        ...


class Episode:
    """One rollout being played: the environment's hands on the sampler, and the record of what happened."""

    def __init__(
        self,
        sampler: Completer,
        *,
        seed: int,
        session: int,
        stop: frozenset[int],
        greedy: bool = False,
    ) -> None:
        self._sampler = sampler
        self._seed, self._session, self._stop, self._greedy = seed, session, stop, greedy
        self._tokens: list[int] = []
        self._mask: list[bool] = []
        self._log_probs: list[float] = []
        self._versions: list[int] = []
        self.outcome: Outcome = "finished"
        self.sampler_error: Exception | None = None
        """What the sampler failed with, if it did: that is not the environment's fault."""
        self._sampled_seconds = 0.0
        self._sampling_since: float | None = None

    @property
    def sampling_seconds(self) -> float:
        """Time spent waiting for the sampler, a call under way included."""
        under_way = 0.0 if self._sampling_since is None else time.perf_counter() - self._sampling_since
        return self._sampled_seconds + under_way

    @property
    def tokens(self) -> list[int]:
        """Everything seen and sampled so far."""
        return self._tokens

    @property
    def room(self) -> int:
        """How many more tokens fit in the context."""
        return self._sampler.context_length - len(self._tokens)

    def observe(self, tokens: Sequence[int]) -> None:
        """Show the model ``tokens`` (the prompt, an answer of the world): masked from the loss."""
        if len(tokens) > self.room:
            raise ContextOverflowError(
                f"{len(tokens)} observed tokens do not fit: {len(self._tokens)} of "
                f"{self._sampler.context_length} context tokens are used; shorten the prompt or use a "
                "model with a longer context"
            )
        self._append(tokens, False, [0.0] * len(tokens), [NOT_SAMPLED] * len(tokens))

    async def act(self, max_tokens: int, stop: frozenset[int] | None = None) -> list[int]:
        """Let the model act: at most ``max_tokens`` tokens, ending with a stop token (default: the end
        token). Cut by the limit or by the context, the episode is marked ``truncated`` if no stop token
        was sampled and more than one token was asked for; without room the answer is empty."""
        limit = min(max_tokens, self.room)
        if limit <= 0:
            self.outcome = "truncated"
            return []
        completion = await self._generate(limit, self._stop if stop is None else stop)
        if completion.finish == "length" and (max_tokens > 1 or limit < max_tokens):
            self.outcome = "truncated"
        self._append(completion.tokens, True, completion.log_probs, completion.versions)
        return completion.tokens

    async def _generate(self, limit: int, stop: frozenset[int]) -> Completion:
        if not self._tokens:
            raise EnvironmentFailure("act before observe: show the model a prompt first")
        if self._sampling_since is not None:
            raise EnvironmentFailure("two calls of act at once: await the first")
        self._sampling_since = time.perf_counter()
        try:
            return await self._sampler.generate(
                self._tokens,
                max_tokens=limit,
                stop=stop,
                seed=self._seed,
                greedy=self._greedy,
                session=self._session,
            )
        except EnvironmentFailure:  # the call was wrong, not the sampler
            raise
        except Exception as error:
            self.sampler_error = error
            raise
        finally:
            self._sampled_seconds = self.sampling_seconds
            self._sampling_since = None

    def _append(
        self, tokens: Sequence[int], sampled: bool, log_probs: Sequence[float], versions: Sequence[int]
    ) -> None:
        self._tokens.extend(tokens)
        self._mask.extend([sampled] * len(tokens))
        self._log_probs.extend(log_probs)
        self._versions.extend(versions)

    def trajectory(self, reward: float, *, outcome: Outcome | None = None, note: str = "") -> Trajectory:
        """The record so far."""
        return Trajectory(
            tokens=np.array(self._tokens, np.int32),
            action_mask=np.array(self._mask, bool),
            log_probs=np.array(self._log_probs, np.float32),
            versions=np.array(self._versions, np.int32),
            reward=float(reward),
            outcome=outcome or self.outcome,
            note=note,
        )
