"""The part of our own engine in the learner's broadcast of weights: one rank, which receives in a thread, so
that sampling goes on meanwhile."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from vcpo.errors import WorkerError
from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup
from vcpo.weights import Weights


class Receiver:
    """Takes tensors on the engine's device: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self._device, self._timeout = device, timeout_seconds
        self._group: WeightGroup | None = None

    async def meet(self, address: str, port: int, rank: int, world_size: int) -> None:
        """Returns when all are there; an earlier group is left."""
        self._group = None
        self._group = await asyncio.to_thread(
            WeightGroup, address, port, rank, world_size, self._device.type, self._timeout
        )

    async def receive(self, announced: Weights) -> dict[str, Tensor]:
        """The tensors that were announced, in the order of their names. Raises RuntimeError if the learner,
        or a rank on the way from it, is gone or does not send in time."""
        if self._group is None:
            raise WorkerError("weights were announced to an engine that is not in the learner's broadcast")
        try:
            return await asyncio.to_thread(_received, self._group, announced, self._device)
        except RuntimeError:
            self._group = None
            raise


def _received(group: WeightGroup, announced: Weights, device: torch.device) -> dict[str, Tensor]:
    tensors = {name: torch.empty_like(announced[name], device=device) for name in sorted(announced)}
    for tensor in tensors.values():
        group.broadcast(tensor)
    return tensors
