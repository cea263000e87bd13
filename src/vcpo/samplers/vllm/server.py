"""One vLLM server as its clients see it: requests over HTTP, and errors that name it.

=================== ============================ ================================
what                waits for                    gives up after
=================== ============================ ================================
a completion        the whole answer             runtime.timeout_seconds
an update           each of its five requests    runtime.timeout_seconds
a lost connection                                at once: :class:`ServerLost`
=================== ============================ ================================
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import httpx2

from vcpo.errors import WorkerError
from vcpo.samplers.protocol import Completion

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0
"""An idle connection is closed before the server does it (5 s) while a request is on its way."""
ATTEMPTS = 3
"""Of a completion whose connection broke although the server is well."""

Json = dict[str, Any]

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would write a line a request


class ServerLost(WorkerError):
    """A server that no longer answers: killed, crashed, or cut off."""


class ConnectionBroken(WorkerError):
    """One request was lost, and the server is well."""


class Server:
    """A client of one server."""

    def __init__(self, name: str, url: str, timeout: float) -> None:
        self.name, self.url = name, url
        self._timeout = timeout
        self._http = httpx2.AsyncClient(
            base_url=url,
            timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
            ),
            trust_env=False,  # a proxy of the environment is not meant for this
        )
        self.model = ""
        """What requests name: the model, or the adapter on top of it."""
        self.outstanding = 0
        """Tokens asked for and not yet given."""

    def __str__(self) -> str:
        return f"{self.name} at {self.url}"

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return (await self._http.get("/health", timeout=CONNECT_SECONDS)).status_code == 200
        return False

    async def get(self, path: str) -> Json:
        return await self._request("GET", path)

    async def post(self, path: str, body: Json | None = None, **query: str) -> Json:
        return await self._request("POST", path, json=body, params=query)

    async def _request(self, method: str, path: str, **options: Any) -> Json:
        try:
            response = await self._http.request(method, path, **options)
        except httpx2.ReadTimeout as error:
            raise WorkerError(
                f"{self} did not answer {path} within {self._timeout:g} s (runtime.timeout_seconds)"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            what = f"{type(error).__name__}: {error}".removesuffix(": ")
            if await self.is_healthy():
                raise ConnectionBroken(f"{self} broke the connection of {path} ({what})") from error
            raise ServerLost(f"{self} cannot be reached ({what})") from error
        if response.status_code >= 400:
            raise await self._refusal(path, response)
        return _json(response)

    async def _refusal(self, path: str, response: httpx2.Response) -> WorkerError:
        message = f"{self} answered {path} with {response.status_code}: {_reason(response)}"
        if response.status_code >= 500 and not await self.is_healthy():
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
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        answer = await self._generate(tokens, sampling)
        return [
            found[str(token)]["logprob"]
            for token, found in zip(tokens[1:], answer["prompt_logprobs"][1:], strict=True)
        ]

    async def _generate(self, tokens: Sequence[int], sampling: Json) -> Json:
        body = {"token_ids": list(tokens), "sampling_params": sampling, "model": self.model}
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(ConnectionBroken):
                return await self.post("/inference/v1/generate", body)
        return await self.post("/inference/v1/generate", body)


def _version(label: str) -> int:
    return int(label) if label.isdigit() else 0  # a server that was never updated says "default"


def _json(response: httpx2.Response) -> Json:
    return response.json() if response.content else {}


def _reason(response: httpx2.Response) -> str:
    """The server's own words, in one line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["error"]["message"])[:300]
    return " ".join(response.text.split())[:300] or response.reason_phrase
