"""vLLM servers as child processes of the sampler that uses them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vcpo.config import Config
from vcpo.errors import ConfigError, WorkerError

if TYPE_CHECKING:  # it needs the extra [vllm], and starting a server does not
    from vcpo.samplers.vllm.server import Server

INSIDE = Path(__file__).parent / "inside"
POLL_SECONDS = 0.25
EXIT_SECONDS = 3.0
_ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB for keys and values
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all servers of a machine are bound to the same cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in the engine's process: one process less
}
"""Unless the environment says otherwise."""
_QUANTIZATION = {"none": [], "fp8": ["--quantization", "fp8"]}


@dataclass(frozen=True)
class Command:
    """How to start a server."""

    arguments: list[str]
    environment: Mapping[str, str]


def server_command(
    config: Config, model: str, port: int, *, host: str = "127.0.0.1", place: int = 0
) -> Command:
    """The command of the ``place``-th server for this recipe.

    Raises ConfigError for what vLLM cannot do.
    """
    sampler = config.sampler
    check_quantization(sampler.quantization)
    dtype = config.model.dtype if sampler.dtype == "same" else sampler.dtype
    arguments = [
        sampler.python or sys.executable, str(INSIDE / "launch.py"),
        "--model", model, "--host", host, "--port", str(port), "--dtype", dtype,
        "--max-model-len", str(config.model.context_length),
        "--max-num-seqs", str(sampler.slots),
        "--max-num-batched-tokens", str(max(sampler.prefill_tokens, sampler.slots)),
        "--seed", str(config.run.seed), "--enable-scale-out",
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--worker-extension-cls", "vcpo_in_vllm.Extension", "--disable-uvicorn-access-log",
        "--weight-transfer-config", json.dumps({"backend": "vcpo"}),
        *_QUANTIZATION[sampler.quantization], *_device_options(config), *_lora_options(config),
        *sampler.options,
    ]  # fmt: skip
    return Command(arguments, _environment(config, place))


def check_quantization(name: str) -> None:
    """Raise ConfigError for a rounding that vLLM cannot do anew for weights that arrive."""
    if name not in _QUANTIZATION:
        raise ConfigError(
            f"sampler.quantization = {name!r} is not offered for vLLM, which cannot round to it at every "
            "update: use fp8 (GPUs), or sampler.kind = 'local' (the numerics without the speed)"
        )


def _device_options(config: Config) -> list[str]:
    # Compiling for a CPU takes 40 seconds and gains little.
    return ["--enforce-eager"] if config.model.device == "cpu" else []


def _lora_options(config: Config) -> list[str]:
    if not config.lora.rank:
        return []
    allowed = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= config.lora.rank), 0)
    if not allowed:
        raise ConfigError(f"lora.rank = {config.lora.rank}: vLLM serves adapters up to rank 512")
    return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(allowed)]


def _environment(config: Config, place: int) -> dict[str, str]:
    path = os.pathsep.join([str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1"}
    if config.lora.rank:
        settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.model.device == "cpu":
        settings["OMP_NUM_THREADS"] = str(config.runtime.threads)
        settings |= {name: os.environ.get(name, value) for name, value in _ON_A_CPU.items()}
    if config.sampler.devices:
        settings["CUDA_VISIBLE_DEVICES"] = config.sampler.devices[place].replace("+", ",")
    return dict(os.environ) | settings


class ServerProcess:
    """A server that this process has started."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, begin: int = 0) -> None:
        """``begin``: the size of the log before, with what servers of the same run wrote earlier."""
        self.name, self._process, self._log, self._begin = name, process, log, begin

    @staticmethod
    async def start(name: str, command: Command, log: Path) -> ServerProcess:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            begin = output.tell()
            process = await _spawn(command, output)
        return ServerProcess(name, process, log, begin)

    async def wait_until_ready(self, server: Server, timeout: float) -> None:
        """Raises WorkerError, with vLLM's own last words, if it ends or takes too long."""
        limit = time.monotonic() + timeout
        # A server that answers where this one has ended is another run's, which took the port.
        while self._process.returncode is not None or not await server.is_healthy():
            if self._process.returncode is not None:
                why = last_error(self._log, self._begin)
                raise WorkerError(f"{self.name} did not start: {why}; see {self._log}")
            if time.monotonic() > limit:
                late = f"was not ready within {timeout:g} s (of runtime.timeout_seconds)"
                raise WorkerError(f"{self.name} {late}; see {self._log}")
            await asyncio.sleep(POLL_SECONDS)

    async def end_in_words(self) -> str:
        """How it ended, if it did: its connections may break a moment before."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await self._process.wait()
        code = self._process.returncode
        if code is None:
            return f"see {self._log}"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"it {how}; see {self._log}"

    async def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # it notices, and kills its group
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # it leads a process group of its own
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


async def _spawn(command: Command, output: IO[bytes]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command.arguments, env=dict(command.environment), stdin=asyncio.subprocess.PIPE,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise _no_python(command, error) from error


def serve_in_front(config: Config, host: str, port: int) -> int:
    """Run a server with this terminal's output until it ends or Ctrl-C; its exit code."""
    command = server_command(config, config.model.name, port, host=host)
    try:
        process = subprocess.Popen(
            command.arguments, env=dict(command.environment), stdin=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise _no_python(command, error) from error
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def _no_python(command: Command, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot start vLLM with {command.arguments[0]!r} ({error.strerror}): set sampler.python to the "
        "Python of the environment that has vLLM"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_error(log: Path, begin: int = 0) -> str:
    """The last line of a log that names an error, from byte ``begin`` on; of the engine's error and the one
    of the API server that follows from it, the engine's."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    named = [line for line in lines if "Error: " in line or line.startswith("No module")]
    causes = [line for line in named if "EngineCore" not in line.rpartition("Error: ")[2]]
    chosen = (causes or named or lines or ["it printed nothing"])[-1]
    return chosen[chosen.find("] ") + 2 :].strip()[:300] if "] " in chosen else chosen.strip()[:300]
