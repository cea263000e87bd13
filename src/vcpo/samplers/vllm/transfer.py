"""How weights reach a paused vLLM server. Each way is a :class:`Transfer`; :func:`transfer_for` chooses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vcpo.config import Config
from vcpo.errors import PublicationError
from vcpo.samplers.shared_memory import transfer_folder
from vcpo.samplers.vllm.server import Server
from vcpo.weights import WeightFile, checksum, is_announced, write_adapter, write_weights

ADAPTER = "vcpo-policy"
"""The name under which servers know the adapter."""


class Transfer(Protocol):
    """One way for weights to travel."""

    async def join(self, server: Server) -> None:
        """Once for each server, before the first update."""
        ...

    async def send(self, server: Server, version: int, weights: Mapping[str, Tensor]) -> str:
        """Make a paused server take ``weights`` and label them; the checksum of what arrived."""
        ...

    def served(self, version: int) -> None:
        """All servers have taken this version."""
        ...

    def close(self) -> None: ...


class _Folder:
    """Where weights that are no file yet become one, a version a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path: Path | None = None

    def of(self, weights: Mapping[str, Tensor]) -> Path:
        if self._path is None:
            size = 3 * sum(t.nbytes for t in weights.values())
            self._path = transfer_folder(size, self._config.runtime.weights_folder)
        return self._path

    def forget(self, version: int) -> None:
        if self._path is not None:
            for old in self._path.glob(f"*-{version}*"):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)

    def close(self) -> None:
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)


class FileTransfer:
    """The server reads a safetensors file, in shared memory or a folder that it sees."""

    def __init__(self, config: Config) -> None:
        self._folder = _Folder(config)
        self._written: tuple[int, Path] | None = None

    async def join(self, server: Server) -> None:
        await server.post("/init_weight_transfer_engine", {"init_info": {}})

    async def send(self, server: Server, version: int, weights: Mapping[str, Tensor]) -> str:
        return await send_update(server, version, {"path": str(self._file(version, weights))})

    def _file(self, version: int, weights: Mapping[str, Tensor]) -> Path:
        if isinstance(weights, WeightFile):
            return weights.path
        if self._written is None or self._written[0] != version:
            path = self._folder.of(weights) / f"version-{version}.safetensors"
            write_weights(path, weights)
            self._written = version, path
        return self._written[1]

    def served(self, version: int) -> None:
        self._folder.forget(version)
        self._written = None

    def close(self) -> None:
        self._folder.close()


class AdapterTransfer:
    """LoRA: the server reads a folder in PEFT's format; its model stays, and requests name the adapter."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = _Folder(config)

    async def join(self, server: Server) -> None:
        server.takes_adapters = True

    async def send(self, server: Server, version: int, weights: Mapping[str, Tensor]) -> str:
        folder = self._folder.of(weights) / f"adapter-{version}"
        if not folder.exists():
            write_adapter(folder, self._config.lora, weights)
        if ADAPTER not in [known["id"] for known in (await server.get("/v1/models"))["data"]]:
            await server.post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(folder)})
        # Not by load_inplace: running requests would load their own version again, at every step.
        arguments = {"name": ADAPTER, "path": str(folder)}
        await server.post("/collective_rpc", {"method": "vcpo_load_adapter", "kwargs": arguments})
        await server.post("/update_weight_version", {"new_version": str(version)})
        server.model = ADAPTER
        return checksum(weights)

    def served(self, version: int) -> None:
        self._folder.forget(version - 1)  # a server may read its newest adapter again

    def close(self) -> None:
        self._folder.close()


class CollectiveTransfer:
    """The learner broadcasts; servers need only the names, types and shapes of what comes. Weights that are
    here already go by file: to who comes between two broadcasts."""

    def __init__(self, config: Config) -> None:
        self._timeout = config.runtime.timeout_seconds
        self._files = FileTransfer(config)

    async def join(self, server: Server) -> None:
        await self._files.join(server)

    async def meet(self, server: Server, address: str, port: int, offset: int, world_size: int) -> None:
        """Join the learner's group as ranks from ``offset`` on; an earlier one is left."""
        init = {"address": address, "port": port, "rank_offset": offset, "world_size": world_size}
        await server.post(
            "/init_weight_transfer_engine", {"init_info": init | {"timeout_seconds": self._timeout}}
        )

    async def send(self, server: Server, version: int, weights: Mapping[str, Tensor]) -> str:
        if not is_announced(weights):
            return await self._files.send(server, version, weights)
        names = sorted(weights)
        update = {
            "names": names,
            "dtypes": [str(weights[name].dtype).removeprefix("torch.") for name in names],
            "shapes": [list(weights[name].shape) for name in names],
        }
        return await send_update(server, version, update)

    def served(self, version: int) -> None:
        self._files.served(version)

    def close(self) -> None:
        self._files.close()


async def send_update(server: Server, version: int, update: dict[str, object]) -> str:
    """One whole update by vLLM's own protocol; the digest of what arrived."""
    await server.post("/start_weight_update")
    await server.post("/update_weights", {"update_info": update})
    await server.post("/finish_weight_update", {"weight_version": str(version)})
    answer = await server.post("/collective_rpc", {"method": "vcpo_digest"})
    digests = set(answer["results"])
    if len(digests) != 1:
        raise PublicationError(f"workers of {server} took different weights: {', '.join(sorted(digests))}")
    return digests.pop()


def transfer_for(config: Config) -> Transfer:
    if config.lora.rank:
        return AdapterTransfer(config)
    return {"files": FileTransfer, "collective": CollectiveTransfer}[config.sampler.transfer](config)
