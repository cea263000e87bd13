"""After an update: does the server say what the learner says?

An update that answers "done" may have left an old head in place, or an adapter that nobody asks. Both show
in the log-probs of a few sequences, which the learner computes with the weights that it publishes: they are
further from the learner's than numerics explain, or nearer to the version before, or the very same as
before although the learner's have moved. The last finds what is stuck even where a step moves log-probs by
less than a number type of few bits blurs them.
"""

from __future__ import annotations

import asyncio

from vcpo.config import Config
from vcpo.errors import PublicationError
from vcpo.samplers.vllm.server import Server
from vcpo.weights import Probe

_TOLERANCES = {"float32": 0.01, "bfloat16": 0.1}
_QUANTIZED = 0.5
CLOSER = 4.0
"""A server that is this many times closer to the version before serves that one."""
MOVED = 1e-3
"""Mean change of the learner's log-probs, in nats, that must change at least one of a server's."""


class Prober:
    """Compares servers with the learner, version by version."""

    def __init__(self, config: Config) -> None:
        sampler = config.sampler
        dtype = config.model.dtype if sampler.dtype == "same" else sampler.dtype
        usual = _TOLERANCES[dtype] if sampler.quantization == "none" else _QUANTIZED
        self._tolerance = sampler.probe_tolerance or usual
        self._before: Probe | None = None
        self._last: dict[Server, tuple[list[list[float]], Probe]] = {}
        """What each server says, and what the learner said when the server began to say so."""
        self.error = 0.0
        """Mean difference of log-probs at the last check, in nats."""

    async def check(self, server: Server, version: int, probe: Probe) -> None:
        """Raises PublicationError, naming the server, if it serves something else."""
        told = await asyncio.gather(*(server.log_probs(tokens) for tokens in probe.tokens))
        self.error = distance(told, probe.log_probs)
        if not self.error <= self._tolerance:  # a NaN too
            raise PublicationError(
                f"{server} does not serve version {version}: its log-probs differ from the learner's by "
                f"{self.error:.3g} nats on average (sampler.probe_tolerance is {self._tolerance:g})"
            )
        if self._before is not None and CLOSER * distance(told, self._before.log_probs) < self.error:
            raise PublicationError(
                f"{server} still serves the version before {version}: its log-probs are those, to "
                f"{distance(told, self._before.log_probs):.2g} nats, and {self.error:.2g} from the new ones"
            )
        self._check_moved(server, version, told, probe)

    def _check_moved(self, server: Server, version: int, told: list[list[float]], probe: Probe) -> None:
        last, since = self._last.get(server, (None, probe))
        if told != last:
            self._last[server] = told, probe
        elif (moved := distance(probe.log_probs, since.log_probs)) >= MOVED:
            raise PublicationError(
                f"{server} does not serve version {version}: its log-probs are the very same as before, and "
                f"the learner's have moved by {moved:.2g} nats on average"
            )

    def accept(self, probe: Probe) -> None:
        """All servers serve it: the next version must differ from this one."""
        self._before = probe


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    """Mean absolute difference, in nats a token."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
