"""Two servers that a sampler starts itself, of a model with tied embeddings: the fault of vLLM's own that the
probe is for, load, and the loss of one server and of the last."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import playing
import pytest
import tiny
import torch
from playing import NEVER, config_of, count, expected_of, kill_server, probe_of, tokens_given, until
from transformers import PreTrainedModel

from vcpo.config import Config
from vcpo.errors import PublicationError, WorkerError
from vcpo.samplers.protocol import Completion
from vcpo.samplers.vllm.sampler import VllmSampler
from vcpo.weights import checksum, weight_tensors, write_weights

pytestmark = pytest.mark.xdist_group("servers")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(0, tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the module's sampler, which starts its servers once."""
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="module")
def config(tied: Path, engine_python: str) -> Config:
    return config_of(tied, python=engine_python, servers=2)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def sampler(runner: asyncio.Runner, config: Config, tied: Path, logs: Path) -> Iterator[VllmSampler]:
    async def start() -> VllmSampler:
        made = VllmSampler(config, expected_of(config), logs=logs)
        await made.ready()
        return made

    made = runner.run(start())
    assert len(playing.servers_of(tied)) == 2
    yield made
    runner.run(made.close())
    assert playing.servers_of(tied) == []


def tied_llama(version: int) -> PreTrainedModel:
    return tiny.llama(version, tie_word_embeddings=True)


async def serve(sampler: VllmSampler, version: int) -> None:
    model = tied_llama(version)
    weights = weight_tensors(model)
    assert "lm_head.weight" not in weights
    assert await sampler.update(version, weights, probe_of(model)) == checksum(weights)


def test_a_tied_head_follows_its_embedding(runner: asyncio.Runner, sampler: VllmSampler) -> None:
    async def run() -> Completion:
        for version in (1, 2):
            await serve(sampler, version)
        return await sampler.generate([5, 6, 7], max_tokens=30, stop=NEVER, seed=0)

    models = {version: tied_llama(version) for version in (2, 1)}
    playing.assert_stamped_right(models, [5, 6, 7], runner.run(run()))


def test_the_probe_finds_the_old_tied_head_that_vllms_own_reload_leaves(
    runner: asyncio.Runner, sampler: VllmSampler, tmp_path: Path
) -> None:
    """``reload_weights`` answers 200. With a vLLM that mends this, the test fails and our mend can go."""
    write_weights(tmp_path / "model.safetensors", weight_tensors(tied_llama(3)))

    async def run() -> None:
        await serve(sampler, 2)
        for server in sampler.servers:
            arguments = {"weights_path": str(tmp_path)}
            await server.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
            with pytest.raises(PublicationError, match="does not serve version 3"):
                await sampler._prober.check(server, 3, probe_of(tied_llama(3)))
        await serve(sampler, 3)

    runner.run(run())


def test_a_tied_head_after_an_update_that_broke_off(runner: asyncio.Runner, sampler: VllmSampler) -> None:
    async def run() -> None:
        await serve(sampler, 1)
        wrong = weight_tensors(tied_llama(2))
        wrong["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(3, 3)
        with pytest.raises(WorkerError, match="answered /update_weights with 500"):
            await sampler.update(2, wrong)
        await sampler.generate([5, 6, 7], max_tokens=2, stop=NEVER, seed=0)
        await serve(sampler, 3)

    runner.run(run())


def test_conversations_go_to_the_server_with_less_to_do(runner: asyncio.Runner, sampler: VllmSampler) -> None:
    """Tokens outstanding decide: one long completion weighs as much as four short ones."""

    async def run() -> list[float]:
        before = [tokens_given(server.url) for server in sampler.servers]
        sizes = [80, 20, 20, 20, 20]
        await asyncio.gather(
            *(
                sampler.generate([5, 6], max_tokens=n, stop=NEVER, seed=n, session=i)
                for i, n in enumerate(sizes)
            )
        )
        await asyncio.gather(  # and stay there
            *(sampler.generate([5, 6, 7], max_tokens=1, stop=NEVER, seed=0, session=i) for i in range(5))
        )
        for session in range(5):
            sampler.release(session)
        after = [tokens_given(server.url) for server in sampler.servers]
        return [b - a for a, b in zip(before, after, strict=True)]

    assert sorted(runner.run(run())) == [80 + 1, 80 + 4]


LONG = 1000
"""Tokens that take longer than it does to find and kill a server."""


def test_one_server_lost_and_then_the_last(
    runner: asyncio.Runner, sampler: VllmSampler, tied: Path, logs: Path
) -> None:
    async def begin() -> list[asyncio.Task[Completion]]:
        before = [tokens_given(server.url) for server in sampler.servers]
        calls = [
            asyncio.ensure_future(
                sampler.generate([5, 6, 7 + i], max_tokens=LONG, stop=NEVER, seed=i, session=i)
            )
            for i in range(6)
        ]
        await until(
            lambda: all(tokens_given(s.url) > b + 5 for s, b in zip(sampler.servers, before, strict=True))
        )
        return calls

    async def lose_one() -> list[Completion]:
        await serve(sampler, 4)
        first, second = sampler.servers
        process = next(p for p in playing.servers_of(tied) if first.url.rpartition(":")[2] in words(p))
        calls = await begin()
        kill_server(process)
        done = await asyncio.gather(*calls)
        assert sampler.servers == [second]
        assert count(second.url, "num_requests_running") == 0
        await serve(sampler, 5)  # an update too goes on without the lost one
        for session in range(6):
            sampler.release(session)
        return done

    models = {version: tied_llama(version) for version in (4, 5)}
    for i, done in enumerate(runner.run(lose_one())):
        assert len(done.tokens) == LONG
        playing.assert_stamped_right(models, [5, 6, 7 + i], done, tolerance=3e-5)

    async def lose_all() -> None:
        (last,) = playing.servers_of(tied)
        calls = await begin()
        kill_server(last)
        await asyncio.gather(*calls)

    with pytest.raises(WorkerError) as lost:
        runner.run(lose_all())
    message = str(lost.value)
    assert message.startswith("vLLM server 1 at http://127.0.0.1:")
    assert message.endswith(
        f"it was killed by signal 9; see {logs / 'vllm-1.log'}; no other vLLM server is left"
    )


def words(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
