"""Servers that cannot be used, or cannot start: each has one error that says what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import playing
import pytest
import tiny
from playing import answers, config_of, expected_of, sampling, wait_until

from vcpo.config import Config
from vcpo.errors import ConfigError, WorkerError
from vcpo.samplers.vllm.handshake import Expected
from vcpo.samplers.vllm.process import free_port

pytestmark = pytest.mark.xdist_group("served")


def refusal(config: Config, expected: Expected | None = None) -> str:
    async def run() -> None:
        async with sampling(config, expected):
            pass

    with pytest.raises(ConfigError) as refused:
        asyncio.run(run())
    return str(refused.value)


def test_another_model(served: str, model: Path, tmp_path: Path) -> None:
    other = tiny.save(tiny.llama(0, num_hidden_layers=3), tmp_path)
    message = refusal(config_of(other, urls=[served]))
    assert message == (
        f"vLLM server 0 at {served} serves another model ({model}): its num_hidden_layers is 2, "
        f"that of {other} is 3"
    )


def test_another_tokenizer(served: str, tmp_path: Path) -> None:
    other = tiny.save(tiny.llama(0), tmp_path, tiny.LETTERS.upper())
    message = refusal(config_of(other, urls=[served]))
    assert f'vLLM server 0 at {served} has another tokenizer than {other}: it reads "What is' in message
    assert message.endswith(f"start it with --tokenizer {other}")


def test_a_longer_context_than_the_server_has(served: str, model: Path) -> None:
    config = config_of(model, urls=[served])
    message = refusal(config, dataclasses.replace(expected_of(config), context_length=tiny.CONTEXT + 1))
    assert f"holds {tiny.CONTEXT} tokens and model.context_length is {tiny.CONTEXT + 1}" in message


@pytest.fixture(scope="module")
def plain(engine_python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server as its manual starts one, without anything of vcpo."""
    port, log = free_port(), tmp_path_factory.mktemp("plain") / "log"
    command = [
        engine_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(tiny.CONTEXT),
    ]  # fmt: skip
    small = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=small)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(url) or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-2000:]
        yield url
    finally:
        playing.kill_server(process.pid)
        process.wait()


def test_a_server_that_vcpo_did_not_start(plain: str, model: Path) -> None:
    message = refusal(config_of(model, urls=[plain]))
    assert message == (
        f"vLLM server 0 at {plain} answered /collective_rpc with 404: Not Found: "
        "it lacks what updates weights; start it with `vcpo serve`, which sets what vcpo needs"
    )


def test_too_little_memory(engine_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save(tiny.llama(0), tmp_path / "model")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")

    async def run() -> None:
        async with sampling(config_of(model, python=engine_python), logs=tmp_path):
            pass

    with pytest.raises(WorkerError) as failed:
        asyncio.run(run())
    message, log = str(failed.value), tmp_path / "vllm-0.log"
    assert message.startswith("vLLM server 0 did not start: ")
    assert "memory" in message
    assert message.endswith(f"; see {log}")
    assert (
        message.removeprefix("vLLM server 0 did not start: ").removesuffix(f"; see {log}") in log.read_text()
    )
    assert playing.servers_of(model) == []
