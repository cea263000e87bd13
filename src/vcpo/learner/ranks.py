"""The processes that share one learner, and what they tell each other beside weights and gradients.

Every rank gets the whole minibatch and does its part of it; what it measured is gathered, so that all decide
the same. Nothing is pickled: tensors travel, and they are small (figures of trajectories and tokens, never
activations or gradients, which are FSDP2's business).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vcpo.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """All ranks of a learner, as one of them sees them."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """This rank's."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def mesh(self) -> DeviceMesh:
        """Over which parameters are sharded."""
        return init_device_mesh(self.device.partition(":")[0], (self.size,))

    def gathered(self, own: Tensor) -> Tensor:
        """[Σ N_r, …] on the CPU: the [N_r, …] of all ranks, in their order. Every rank must call it."""
        own = own.detach().cpu().contiguous()
        if not self.several:
            return own
        kind, sent = own.dtype, own.to(torch.uint8) if own.dtype == torch.bool else own
        counts = torch.zeros(self.size, dtype=torch.long)
        counts[self.rank] = len(own)
        dist.all_reduce(counts)
        most = int(counts.max())
        padded = sent.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = sent
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded)
        parts = [part[:count] for part, count in zip(everyone, counts.tolist(), strict=True)]
        return torch.cat(parts).to(kind)

    def total(self, own: float) -> float:
        """The sum over ranks, the same to the bit on each. Every rank must call it."""
        return float(self.gathered(torch.tensor([own], dtype=torch.float64)).sum())

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        self.total(0.0)


ALONE = Ranks()


def join(rank: int, size: int, meeting: str, device: str, timeout: float) -> Ranks:
    """Meet the other ranks at ``meeting`` (``file://PATH`` or ``tcp://HOST:PORT``).

    Every wait for another rank, here and in collectives later, ends after ``timeout`` seconds with an error.
    ``device`` is this rank's own.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    limit, parts = timedelta(seconds=timeout), urlsplit(meeting)
    if parts.scheme == "tcp":
        store = _store(parts.hostname or "", parts.port or 0, rank, size, limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    else:
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=limit)
    return Ranks(rank, size, device)


def _store(host: str, port: int, rank: int, size: int, timeout: timedelta) -> Any:
    """The first rank's: listening on its address alone. A store that opens its port itself listens on all
    interfaces, and takes whatever anybody says."""
    listening = socket.create_server((host, port)).detach() if rank == 0 else None
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening
    )


def device_of(rank: int, device: str) -> str:
    """Rank r of a learner on ``cuda`` or ``cuda:K`` takes the r-th device of its machine, counted from K.

    Raises ConfigError if the machine has not so many.
    """
    kind, _, first = device.partition(":")
    if kind != "cuda":
        return device
    place, count = int(first or 0) + rank, torch.cuda.device_count()
    if place >= count:
        raise ConfigError(
            f"rank {rank} of the learner needs device cuda:{place}, and this machine has {count} CUDA "
            "devices: lower runtime.learner_ranks"
        )
    return f"cuda:{place}"


def leave() -> None:
    """Let go of the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
