"""The group over which the learner broadcasts weights: imported by the learner, by our own engine, and inside
vLLM's workers.

Rank 0 is the learner, the others are the engines, or the workers of all servers. The group stands beside
vLLM's own.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch
from torch import Tensor, distributed

MEETING_SECONDS = 60.0
"""How long to wait for the others, who are all there and ready when they are told to meet."""
PATIENCE = 0.7
"""Of the time after which the controller would give up."""


class WeightGroup:
    """A process group that broadcasts tensors from rank 0: NCCL between GPUs, gloo between CPUs."""

    def __init__(
        self, address: str, port: int, rank: int, world_size: int, device: str, timeout_seconds: float
    ) -> None:
        """Returns when all ranks are here; raises RuntimeError if they are not within MEETING_SECONDS or half
        of the timeout. Each broadcast has PATIENCE of the timeout for itself."""
        timeout = datetime.timedelta(seconds=min(timeout_seconds / 2, MEETING_SECONDS))
        # A store that opens its port itself listens on all interfaces, and takes whatever anybody says.
        listening = socket.create_server((address, port)).detach() if rank == 0 else None
        store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening
        )
        apart = distributed.PrefixStore("vcpo", store)  # pyright: ignore[reportPrivateImportUsage]
        self._options = distributed.BroadcastOptions()
        self._options.rootRank = 0
        self._options.timeout = datetime.timedelta(seconds=PATIENCE * timeout_seconds)
        self._group = _group(apart, rank, world_size, device, timeout)
        self.broadcast(torch.zeros(1, device=device))  # NCCL connects at its first call

    def broadcast(self, tensor: Tensor) -> None:
        """Fill ``tensor`` with rank 0's. Raises RuntimeError if a rank is gone or does not answer in time;
        this one then leaves, so that who waits for this one fails too."""
        if self._group is None:
            raise RuntimeError("this rank has left the broadcast, which failed")
        try:
            self._group.broadcast([tensor], self._options).wait()
        except BaseException:
            self._group = None  # not by forgetting this object: the error's traceback holds it
            raise


def _group(store: Any, rank: int, world_size: int, device: str, timeout: datetime.timedelta) -> Any:
    if device == "cuda":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return distributed.ProcessGroupNCCL(store, rank, world_size, options)
    return distributed.ProcessGroupGloo(store, rank, world_size, timeout)
