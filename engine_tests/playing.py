"""What the engine tests do with servers: start them, ask them, count what they do."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel

from vcpo.config import Config
from vcpo.policy.text import load_text
from vcpo.samplers.protocol import Completion
from vcpo.samplers.vllm.handshake import Expected
from vcpo.samplers.vllm.process import free_port
from vcpo.samplers.vllm.sampler import VllmSampler
from vcpo.weights import Probe

PATIENCE = 600.0
"""Seconds before a test gives up: servers start on a busy machine."""
NEVER = frozenset[int]()


def config_of(model: Path, lora: dict[str, Any] | None = None, **sampler: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(model), "context_length": tiny.CONTEXT},
            "lora": lora or {},
            "sampler": {"kind": "vllm", "slots": 16, **sampler},
        }
    )


def expected_of(config: Config) -> Expected:
    text = load_text(config.model.name, config.model)
    size = text.architecture["vocab_size"]
    return Expected(text.name, text.architecture, text.codec.encode, size, text.context_length)


@asynccontextmanager
async def sampling(
    config: Config, expected: Expected | None = None, logs: Path | None = None
) -> AsyncIterator[VllmSampler]:
    """A sampler that is ready, and is closed at the end."""
    sampler = VllmSampler(config, expected or expected_of(config), logs=logs)
    try:
        await sampler.ready()
        yield sampler
    finally:
        await sampler.close()


@contextmanager
def vcpo_serve(python: str, model: Path, log: Path, *settings: str) -> Iterator[str]:
    """The URL of a server started by ``vcpo serve`` and stopped by Ctrl-C."""
    port = free_port()
    command = [
        sys.executable, "-m", "vcpo.cli", "serve", str(model), "--port", str(port),
        "--model.context_length", str(tiny.CONTEXT), "--sampler.slots", "16", "--sampler.python", python,
        *settings,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url) or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-2000:]
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert not answers(url)


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=10) as response:
        return response.status == 200
    return False


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


async def until(condition: Callable[[], object]) -> None:
    """The same while other tasks go on."""
    end = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


def count(url: str, name: str) -> float:
    """A figure of the server's own, such as ``generation_tokens_total``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as response:
        text = response.read().decode()
    found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    assert found, f"the server does not count {name}"
    return float(found[1])


def tokens_given(url: str) -> float:
    return count(url, "generation_tokens_total")


def servers_of(marker: object) -> list[int]:
    """Process ids of the vLLM servers with ``marker`` (a model's folder) on their command line, each of which
    leads a group of processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            process = int(entry.parent.name)
            words = entry.read_bytes().decode(errors="replace").split("\0")
            ours = any(w.endswith("launch.py") for w in words) and any(str(marker) in w for w in words)
            if ours and os.getpgid(process) == process:
                found.append(process)
    return found


def left_of(group: int) -> list[int]:
    """The processes of a server that are alive; its engine has no marker on its command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of = entry.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                found.append(int(entry.parent.name))
    return found


def kill_server(process: int) -> None:
    """As the kernel does when memory runs out: the whole group."""
    os.killpg(process, signal.SIGKILL)


def probe_of(model: PreTrainedModel) -> Probe:
    tokens = [tiny.random_tokens(12, seed) for seed in (100, 101)]
    return Probe(tokens, [tiny.log_probs(model, t).tolist() for t in tokens])


def assert_stamped_right(
    models: dict[int, PreTrainedModel], prompt: Sequence[int], done: Completion, tolerance: float = 1e-5
) -> None:
    """Every log-prob is that of the version it is stamped with; the other versions' differ widely."""
    whole = [*prompt, *done.tokens]
    by_version = {v: tiny.log_probs(m, whole)[len(prompt) - 1 :] for v, m in models.items()}
    right = torch.stack([by_version[v][i] for i, v in enumerate(done.versions)])
    torch.testing.assert_close(torch.tensor(done.log_probs), right, rtol=0, atol=tolerance)
    first, *others = by_version.values()
    assert all(float((first - other).abs().mean()) > 0.1 for other in others)
