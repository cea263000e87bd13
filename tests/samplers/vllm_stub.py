"""A stand-in for a vLLM server, for what needs no engine: answers over HTTP as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[Any], Awaitable[Any] | Any]

SHAPE = {"model_type": "llama", "hidden_size": 64}
FACTS = {
    "architecture": SHAPE,
    "max_model_len": 64,
    "logprobs_mode": "processed_logprobs",
    "weight_transfer": "vcpo",
    "max_lora_rank": 0,
}


class Stub:
    """One server. ``answers``: route → function of the request's body; what it returns is the answer, a
    ``web.Response`` as it is. ``heard``: routes in the order of their requests."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.healthy = True
        self.url = ""
        self.answers: dict[str, Answer] = {
            "/collective_rpc": lambda body: {"results": [FACTS]},
            "/v1/models": lambda body: {"data": [{"id": "served-model"}]},
            "/tokenize": lambda body: {"tokens": [ord(c) for c in body["prompt"]]},
            "/init_weight_transfer_engine": lambda body: {},
            "/inference/v1/generate": completion,
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path == "/health":
            return web.Response(status=200 if self.healthy else 503)
        self.heard.append(path)
        if path not in self.answers:
            return web.Response(status=404, text="Not Found")
        text = await request.text()
        answer = self.answers[path](json.loads(text) if text else None)
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer is BREAK:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stub]:
        server = web.Server(self.handle, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()


BREAK = object()
"""An answer that is none: the connection is cut."""


def completion(body: Any) -> dict[str, Any]:
    """As many tokens 7 as were asked for, of version 3, each of log-prob -0.5."""
    count = body["sampling_params"]["max_tokens"]
    return {
        "choices": [
            {
                "finish_reason": "length",
                "token_ids": [7] * count,
                "weight_versions": [{"version": "3", "start": 0, "end": count}],
                "logprobs": {"content": [{"token_id": 7, "logprob": -0.5}] * count},
            }
        ]
    }


async def never(body: Any) -> None:
    await asyncio.Event().wait()
