"""One vLLM server as its clients see it: requests over HTTP, and errors that name it.

=================== ============================ ================================
what                waits for                    gives up after
=================== ============================ ================================
a completion        the whole answer             0.9 runtime.timeout_seconds
an update           each of its five requests    0.9 runtime.timeout_seconds
a lost connection                                at once: :class:`ServerLost`
=================== ============================ ================================
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from vcpo.errors import ConfigError, WorkerError
from vcpo.samplers.protocol import Completion

try:
    import aiohttp
except ImportError as error:
    raise ConfigError(
        "vLLM servers are reached through aiohttp, which is not installed: pip install 'vcpo[vllm]'"
    ) from error

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0
"""An idle connection is closed before the server does it (5 s) while a request is on its way."""
ATTEMPTS = 3
"""Of a request whose connection broke although the server is well."""

Json = dict[str, Any]


class ServerLost(WorkerError):
    """A server that no longer answers: killed, crashed, or cut off."""


class ConnectionBroken(WorkerError):
    """One request was lost, and the server is well."""


class Server:
    """A client of one server."""

    def __init__(self, name: str, url: str, timeout: float) -> None:
        """Within a running event loop."""
        self.name, self.url = name, url.rstrip("/")
        self._timeout = timeout
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self.model = ""
        """What requests name: the model, or the adapter on top of it."""
        self.takes_adapters = False
        self.outstanding = 0
        """Tokens asked for and not yet given."""

    def __str__(self) -> str:
        return f"{self.name} at {self.url}"

    async def close(self) -> None:
        await self._http.close()

    async def is_healthy(self) -> bool:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(TimeoutError):
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        return (await self._send("GET", "/health"))[0] == 200
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    if not isinstance(error, aiohttp.ClientConnectorError):
                        continue  # a kept connection that the server closed: vLLM does so after its errors
                except aiohttp.ClientError:
                    pass
            return False
        return False

    async def get(self, path: str) -> Json:
        return await self._request("GET", path)

    async def post(self, path: str, body: Json | None = None, **query: str) -> Json:
        return await self._request("POST", path, json=body, params=query)

    async def _request(self, method: str, path: str, **options: Any) -> Json:
        try:
            status, answer = await self._send(method, path, **options)
        except aiohttp.SocketTimeoutError as error:
            raise WorkerError(
                f"{self} did not answer {path} within {self._timeout:g} s (of runtime.timeout_seconds)"
            ) from error
        except aiohttp.ClientError as error:
            what = f"{type(error).__name__}: {error}".removesuffix(": ")
            if await self.is_healthy():
                raise ConnectionBroken(f"{self} broke the connection of {path} ({what})") from error
            raise ServerLost(f"{self} cannot be reached ({what})") from error
        if status >= 400:
            raise await self._refusal(path, status, answer)
        return _json(answer)

    async def _send(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        async with self._http.request(method, self.url + path, **options) as response:
            return response.status, await response.read()

    async def _refusal(self, path: str, status: int, answer: bytes) -> WorkerError:
        message = f"{self} answered {path} with {status}: {_reason(answer)}"
        if status >= 500 and not await self.is_healthy():
            return ServerLost(message)
        return WorkerError(message)

    # Tokens

    async def generate(self, tokens: Sequence[int], sampling: Json) -> Completion:
        """One completion; raises WorkerError if the server did not end it by itself."""
        self.outstanding += (size := sampling["max_tokens"])
        try:
            answer = await self._generate(tokens, sampling)
        finally:
            self.outstanding -= size
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise WorkerError(f"{self} ended a completion by {choice['finish_reason']!r}")
        sampled: list[int] = choice["token_ids"]
        versions = [
            _version(span["version"])
            for span in choice["weight_versions"]
            for _ in range(span["start"], span["end"])
        ]
        log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return Completion(sampled, log_probs, versions, choice["finish_reason"])

    async def log_probs(self, tokens: Sequence[int]) -> list[float]:
        """log π of every token but the first, given those before it, at temperature 1."""
        if self.takes_adapters:
            return list(await asyncio.gather(*(self._log_prob(tokens, i) for i in range(1, len(tokens)))))
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        answer = await self._generate(tokens, sampling)
        return [
            found[str(token)]["logprob"]
            for token, found in zip(tokens[1:], answer["prompt_logprobs"][1:], strict=True)
        ]

    async def _log_prob(self, tokens: Sequence[int], place: int) -> float:
        """The same for one token. A vLLM 0.32 that takes adapters applies those of the batch's rows to the
        log-probs of a prompt, and crashes as soon as there is more than one row."""
        token = tokens[place]
        # Two are shown: the one that is sampled, and the one asked about, where it is another.
        sampling = {"max_tokens": 1, "logprobs": 2, "logprob_token_ids": [token] * 2, "detokenize": False}
        answer = await self._generate(tokens[:place], sampling)
        told = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return next(entry["logprob"] for entry in told if entry["token_id"] == token)

    async def _generate(self, tokens: Sequence[int], sampling: Json) -> Json:
        body = {"token_ids": list(tokens), "sampling_params": sampling, "model": self.model}
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(ConnectionBroken):
                return await self.post("/inference/v1/generate", body)
        return await self.post("/inference/v1/generate", body)


def _version(label: str) -> int:
    return int(label) if label.isdigit() else 0  # a server that was never updated says "default"


def _json(answer: bytes) -> Json:
    """Routes that only do something answer with nothing, or with a sentence."""
    with contextlib.suppress(ValueError):
        return json.loads(answer)
    return {}


def _reason(answer: bytes) -> str:
    """The server's own words, in one line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(answer)
        return str(told["detail"] if "detail" in told else told["error"]["message"])[:300]
    return " ".join(answer.decode(errors="replace").split())[:300] or "no reason given"
