"""What an engine that generates must offer: tokens in, tokens out, each with its log-prob and version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from vcpo.errors import ContextOverflowError, EnvironmentFailure

if TYPE_CHECKING:
    from torch import Tensor

    from vcpo.weights import Probe


@dataclass(frozen=True)
class Completion:
    """What one call to :meth:`Completer.generate` produced; the three lists have one length."""

    tokens: list[int]
    """Sampled token ids, the stop token included."""
    log_probs: list[float]
    """Log-probability of each sampled token under the distribution it was sampled from (temperature, top-k
    and top-p included), in nats; of a greedy token, under softmax(logits)."""
    versions: list[int]
    """Policy version that produced each token."""
    finish: Literal["stop", "length"]
    """``stop``: a stop token was sampled; ``length``: ``max_tokens`` was reached."""


class Completer(Protocol):
    """What an episode sees of an engine. Calls from many tasks at once are batched by the engine."""

    @property
    def version(self) -> int:
        """Version of the policy now served."""
        ...

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have."""
        ...

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        stop: frozenset[int],
        seed: int,
        greedy: bool = False,
        session: int | None = None,
    ) -> Completion:
        """Continue ``tokens`` by at most ``max_tokens`` sampled tokens.

        ``seed`` fixes the random numbers of the sequence, wherever in a batch it lands: token t is drawn
        with a number that depends on (seed, position) alone. ``session`` names a conversation, so that
        the engine may keep its cache between turns; ``release`` it at the end.
        """
        ...

    def release(self, session: int) -> None:
        """Forget a session; unknown sessions are ignored."""
        ...


class Sampler(Completer, Protocol):
    """One engine: it generates, and serves the weights that it is given."""

    async def update(self, version: int, weights: Mapping[str, Tensor], probe: Probe | None = None) -> str:
        """Serve ``weights`` as ``version`` from now on; the answer is the checksum of what is served.

        ``probe`` says what the learner thinks of a few sequences, for engines that must be asked.
        """
        ...

    async def ranks(self) -> list[int]:
        """How many ranks of the learner's broadcast its processes take."""
        ...

    async def meet(self, address: str, port: int, offset: int, world_size: int) -> None:
        """Join the learner's broadcast, as ranks from ``offset`` on; an earlier one is left. From then on
        weights may be announced (:func:`vcpo.weights.announced_weights`): they come by the broadcast."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Time spent generating since the beginning."""
        ...

    async def ready(self) -> None:
        """Return when the engine can generate."""
        ...

    async def close(self) -> None:
        """Stop; calls still waiting are cancelled."""
        ...


def check_request(tokens: Sequence[int], max_tokens: int, context_length: int, vocabulary: int) -> None:
    """Raise EnvironmentFailure for a request that cannot be answered: it must not reach the engine, where it
    would fail everybody's."""
    if not tokens:
        raise EnvironmentFailure("cannot continue an empty sequence: show the model a prompt first")
    if max_tokens < 1:
        raise EnvironmentFailure(f"max_tokens is {max_tokens}: ask for at least one token")
    if len(tokens) + max_tokens > context_length:
        raise ContextOverflowError(
            f"{len(tokens)} + {max_tokens} tokens do not fit in the context of {context_length}"
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        wrong = next(t for t in tokens if not 0 <= t < vocabulary)
        raise EnvironmentFailure(f"token {wrong} is not in the model's vocabulary of {vocabulary}")
