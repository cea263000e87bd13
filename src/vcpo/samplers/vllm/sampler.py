"""The vLLM engine: completions from one or more servers, and the weights they serve.

A conversation stays with one server, which has its prefix in the cache; a new one goes to the server with
the fewest tokens outstanding. A server that is lost hands its requests to the others, which begin them anew;
the last one that is lost ends the run.

An update, on all servers at once: pause, take the weights, label them with the version, resume. ``keep``
freezes running completions meanwhile and computes their prefix again under the new weights, so that each
token's log-prob is that of the version it is stamped with; ``drain`` waits for running conversations first.
Then a probe compares log-probs of a few sequences with the learner's: an update that says "done" and was not
is found before the next version is published. (What was sampled meanwhile has the log-probs of what was
served.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from vcpo.config import Config
from vcpo.errors import EngineLost, PublicationError, WorkerError
from vcpo.samplers.protocol import Completion, check_request
from vcpo.samplers.tasks import gather_all, to_its_end
from vcpo.samplers.vllm.handshake import Expected, check_server
from vcpo.samplers.vllm.probe import Prober
from vcpo.samplers.vllm.process import ServerProcess, free_port, server_command
from vcpo.samplers.vllm.server import Server, ServerLost
from vcpo.samplers.vllm.traffic import BusyClock, Gate
from vcpo.samplers.vllm.transfer import CollectiveTransfer, Transfer, transfer_for
from vcpo.weights import Probe

log = logging.getLogger(__name__)

PATIENCE = 0.9
"""Of runtime.timeout_seconds: who waits for this process has all of it, and would name the wrong one."""
RESUME_SECONDS = 10.0
"""For a server whose update failed; it may be what hangs."""


class VllmSampler:
    """A :class:`vcpo.samplers.protocol.Sampler` over vLLM servers."""

    def __init__(
        self,
        config: Config,
        expected: Expected,
        *,
        share: tuple[int, int] = (0, 1),
        logs: Path | None = None,
    ) -> None:
        """``share`` = (i, n): of all servers, this sampler has each n-th, from the i-th on. ``logs``: where
        servers that it starts write theirs; None: in a temporary folder, which stays."""
        self._config, self._expected = config, expected
        self._share, self._logs = share, logs
        self._timeout = PATIENCE * config.runtime.timeout_seconds
        self._processes: dict[Server, ServerProcess] = {}
        self._known: list[Server] = []
        self._servers: list[Server] = []
        """Those of them that are not lost."""
        self._starting: asyncio.Task[None] | None = None
        self._transfer: Transfer = transfer_for(config)
        self._prober = Prober(config)
        self._homes: dict[int, Server] = {}
        """Where each session lives."""
        self._gate, self._clock = Gate(), BusyClock()
        self._version = 0
        self.sampled_tokens = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def context_length(self) -> int:
        return self._expected.context_length

    @property
    def busy_seconds(self) -> float:
        """Time with at least one completion in flight."""
        return self._clock.seconds

    @property
    def servers(self) -> list[Server]:
        """Those that answer."""
        return list(self._servers)

    async def ready(self) -> None:
        """Start the servers, or look at those that run; at once after the first time."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)

    async def ranks(self) -> list[int]:
        """Worker processes of each server: the ranks that it takes in a broadcast."""
        answers = await self._on_all(lambda server: server.get("/get_world_size"))
        return [answer["world_size"] for answer in answers.values()]

    async def meet(self, address: str, port: int, offset: int, world_size: int) -> None:
        """Join the learner's broadcast with all servers, as ranks from ``offset`` on."""
        assert isinstance(self._transfer, CollectiveTransfer)
        offsets = accumulate(await self.ranks(), initial=offset)
        await gather_all(
            self._transfer.meet(server, address, port, first, world_size)
            for server, first in zip(self.servers, offsets, strict=False)
        )

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in self._processes.values()))
        await asyncio.gather(*(server.close() for server in self._known))
        self._transfer.close()

    # Servers

    async def _start(self) -> None:
        sampler, timeout = self._config.sampler, self._timeout
        first, step = self._share
        if sampler.urls:
            shared = list(enumerate(sampler.urls))[first::step]
            self._known += [Server(f"vLLM server {i}", url, timeout) for i, url in shared]
        else:
            # A folder of its own: in the common one, names that can be guessed belong to whoever is first.
            self._logs = self._logs or Path(tempfile.mkdtemp(prefix="vcpo-vllm-"))
            for place in range(first, sampler.servers, step):
                await self._launch(place, self._logs)
        self._servers = list(self._known)
        await gather_all(self._greet(server, timeout) for server in self._known)

    async def _launch(self, place: int, logs: Path) -> None:
        port = free_port()
        name = f"vLLM server {place}"
        command = server_command(self._config, self._expected.model, port, place=place)
        server = Server(name, f"http://127.0.0.1:{port}", self._timeout)
        self._known.append(server)
        self._processes[server] = await ServerProcess.start(name, command, logs / f"vllm-{place}.log")

    async def _greet(self, server: Server, timeout: float) -> None:
        if (process := self._processes.get(server)) is not None:
            await process.wait_until_ready(server, timeout)
        await check_server(server, self._config, self._expected)
        await self._transfer.join(server)

    async def _lose(self, server: Server, error: ServerLost) -> None:
        """Go on without a server; raises EngineLost if it was the last."""
        news = server in self._servers
        if news:
            self._servers.remove(server)
        self._homes = {session: home for session, home in self._homes.items() if home is not server}
        if self._servers and not news:
            return
        process = self._processes.get(server)
        how = f"; {await process.end_in_words()}" if process is not None else ""
        if not self._servers:
            raise EngineLost(f"{error}{how}; no other vLLM server is left") from error
        log.warning("%s%s; going on with %d others", error, how, len(self._servers))

    # Tokens

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
        check_request(tokens, max_tokens, self._expected.context_length, self._expected.vocabulary)
        await self.ready()
        conversation = object() if session is None else session
        await self._gate.enter(conversation)
        sampling = self._sampling(max_tokens, stop, seed, greedy)
        try:
            with self._clock.running():
                completion = await self._somewhere(tokens, sampling, session)
        finally:
            if session is None:
                self._gate.leave(conversation)
        self.sampled_tokens += len(completion.tokens)
        return completion

    async def _somewhere(
        self, tokens: Sequence[int], sampling: dict[str, Any], session: int | None
    ) -> Completion:
        while True:
            server = self._home(session)
            try:
                return await server.generate(tokens, sampling)
            except ServerLost as error:
                await self._lose(server, error)

    def _home(self, session: int | None) -> Server:
        if session is not None and session in self._homes:
            return self._homes[session]
        if not self._servers:
            raise EngineLost("no vLLM server is left")
        server = min(self._servers, key=lambda s: s.outstanding)
        if session is not None:
            self._homes[session] = server
        return server

    def _sampling(self, max_tokens: int, stop: frozenset[int], seed: int, greedy: bool) -> dict[str, Any]:
        """Every parameter that shapes the distribution is named: a server may have defaults of its own."""
        sampler = self._config.sampler
        return {
            "max_tokens": max_tokens, "stop_token_ids": sorted(stop), "seed": seed & (2**63 - 1),
            "temperature": 0.0 if greedy else sampler.temperature, "top_p": sampler.top_p,
            "top_k": sampler.top_k, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": 0, "detokenize": False, "ignore_eos": True,
        }  # fmt: skip

    def release(self, session: int) -> None:
        self._homes.pop(session, None)
        self._gate.leave(session)

    # Weights

    async def update(self, version: int, weights: Mapping[str, Tensor], probe: Probe | None = None) -> str:
        await self.ready()
        async with self._quiet():
            served = await self._on_all(lambda server: self._take(server, version, weights))
        self._transfer.served(version)
        self._version = version
        if probe is not None:
            await self._on_all(lambda server: self._prober.check(server, version, probe))
            self._prober.accept(probe)
        different = {server.name: digest for server, digest in served.items()}
        if len(set(different.values())) != 1:
            told = ", ".join(f"{name} has {digest}" for name, digest in different.items())
            raise PublicationError(f"vLLM servers took different weights as version {version}: {told}")
        return next(iter(different.values()))

    @asynccontextmanager
    async def _quiet(self) -> AsyncIterator[None]:
        """With ``drain``, no conversation is under way within it."""
        if self._config.sampler.update != "drain":
            yield
            return
        async with self._gate.closed():
            yield

    async def _take(self, server: Server, version: int, weights: Mapping[str, Tensor]) -> str:
        try:  # the pause too: given up half-way, it may have been heard
            await server.post("/pause", mode="keep", clear_cache="true")
            digest = await self._transfer.send(server, version, weights)
        except BaseException:
            with contextlib.suppress(WorkerError, TimeoutError):  # the first error is the one to tell
                async with asyncio.timeout(RESUME_SECONDS):
                    await self._resume(server)
            raise
        await self._resume(server)
        return digest

    async def _resume(self, server: Server) -> None:
        """Another server's error cancels this one's update: one that stayed paused would answer nobody."""
        await to_its_end(server.post("/resume"), RESUME_SECONDS)

    async def _on_all(self, work: Callable[[Server], Awaitable[Any]]) -> dict[Server, Any]:
        """The result of ``work`` for every server that is not lost meanwhile."""

        async def one(server: Server) -> Any:
            try:
                return await work(server)
            except ServerLost as error:
                await self._lose(server, error)
                return None

        servers = self.servers
        results = await gather_all(one(server) for server in servers)
        return {s: result for s, result in zip(servers, results, strict=True) if s in self._servers}
