"""Whether a vLLM server is the one that the recipe means: asked once, before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vcpo.config import Config
from vcpo.errors import ConfigError, WorkerError
from vcpo.samplers.vllm.server import Server

SAMPLE = "What is 12 + 30? Let's see: x = 42."
START = "start it with `vcpo serve`, which sets what vcpo needs"


@dataclass(frozen=True)
class Expected:
    """What the servers must serve."""

    model: str
    """Folder or hub id."""
    architecture: Mapping[str, Any]
    """Of the model's config: the fields that decide the shapes of its weights."""
    tokenize: Callable[[str], list[int]]
    vocabulary: int
    context_length: int


async def check_server(server: Server, config: Config, expected: Expected) -> None:
    """Raises ConfigError that names the server and what is wrong with it; sets ``server.model``."""
    told = await _facts(server)
    server.model = str((await server.get("/v1/models"))["data"][0]["id"])
    _check_architecture(server, told["architecture"], expected)
    await _check_tokenizer(server, expected)
    if told["max_model_len"] < expected.context_length:
        raise ConfigError(
            f"{server} holds {told['max_model_len']} tokens and model.context_length is "
            f"{expected.context_length}: lower it, or give `vcpo serve` the same --model.context_length"
        )
    if told["max_lora_rank"] < config.lora.rank:
        raise ConfigError(
            f"{server} serves adapters up to rank {told['max_lora_rank']} and lora.rank is "
            f"{config.lora.rank}: give `vcpo serve` the same --lora.rank"
        )
    sampler = config.sampler
    shaped = sampler.temperature != 1 or sampler.top_p != 1 or sampler.top_k
    if shaped and told["logprobs_mode"] != "processed_logprobs":
        raise ConfigError(
            f"{server} gives log-probs of softmax(logits) ({told['logprobs_mode']}), not of what it samples "
            f"with temperature {sampler.temperature:g}, top_p {sampler.top_p:g}, top_k {sampler.top_k}: "
            "start it with --logprobs-mode processed_logprobs (`vcpo serve` does)"
        )


async def _facts(server: Server) -> Mapping[str, Any]:
    """What vcpo's extension says of the server that it is in."""
    if not await server.is_healthy():
        raise ConfigError(f"{server} does not answer: is it running, and is sampler.urls right?")
    try:
        facts = (await server.post("/collective_rpc", {"method": "vcpo_facts"}))["results"][0]
    except WorkerError as error:
        raise ConfigError(f"{error}: it lacks what updates weights; {START}") from error
    if facts["weight_transfer"] != "vcpo":
        raise ConfigError(f"{server} takes no weights from vcpo; {START}")
    return facts


def _check_architecture(server: Server, found: Mapping[str, Any], expected: Expected) -> None:
    for field, wanted in expected.architecture.items():
        if found.get(field) != wanted:
            raise ConfigError(
                f"{server} serves another model ({server.model}): its {field} is {found.get(field)}, that of "
                f"{expected.model} is {wanted}"
            )


async def _check_tokenizer(server: Server, expected: Expected) -> None:
    body = {"prompt": SAMPLE, "add_special_tokens": False, "model": server.model}
    theirs, ours = (await server.post("/tokenize", body))["tokens"], expected.tokenize(SAMPLE)
    if theirs != ours:
        raise ConfigError(
            f"{server} has another tokenizer than {expected.model}: it reads {SAMPLE!r} as {theirs[:8]}…, "
            f"not as {ours[:8]}…; start it with --tokenizer {expected.model}"
        )
