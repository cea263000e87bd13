"""Weights in Ray's object store: put there once by the learner, mapped by the samplers of each machine.

One object a tensor, as bytes: on the learner's machine, and on every other one that has fetched it, samplers
read it where it lies, without a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from vcpo.errors import WorkerError

if TYPE_CHECKING:  # the controller, which imports this too, needs no tensor
    import numpy as np
    from torch import Tensor

Entry = tuple[str, str, list[int], Any]
"""(name, number type, shape, reference to the bytes) of a tensor."""
Source = list[Entry]
Announcement = list[tuple[str, str, list[int]]]
"""(name, number type, shape) of each tensor."""


class ObjectStoreOutbox:
    """Keeps references to the last two versions; Ray frees what nobody refers to."""

    def __init__(self) -> None:
        self._kept: list[Source] = []

    def put(self, version: int, weights: Mapping[str, Tensor]) -> Source:
        try:
            source = [_put(name, tensor) for name, tensor in sorted(weights.items())]
        except (ObjectStoreFullError, OutOfDiskError) as error:
            size = sum(t.nbytes for t in weights.values())
            raise WorkerError(
                f"Ray's object store has no room for version {version} of the weights ({size:,} bytes): "
                "start Ray with a larger --object-store-memory, or free the disk it spills to "
                f"({type(error).__name__}: {error})"
            ) from error
        self._kept = [*self._kept[-1:], source]
        return source

    def meet(self, address: str, port: int, world_size: int) -> None:
        pass

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        pass

    def close(self) -> None:
        self._kept.clear()


def _put(name: str, tensor: Tensor) -> tuple[str, str, list[int], Any]:
    import torch

    array = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), ray.put(array)


class ObjectWeights(Mapping[str, "Tensor"]):
    """Tensors over bytes that are not copied, and must not be written to."""

    def __init__(self, source: Sequence[Entry], arrays: list[np.ndarray]) -> None:
        self._entries = {
            name: (dtype, shape, array) for (name, dtype, shape, _), array in zip(source, arrays, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        import torch

        dtype, shape, array = self._entries[name]
        if not array.size:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "not writable": nobody writes
            return torch.from_numpy(array).view(getattr(torch, dtype)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


async def arriving(source: Source | Announcement) -> Mapping[str, Tensor]:
    """The tensors; of those that a broadcast will bring, all but the numbers."""
    stored = [entry for entry in source if len(entry) == 4]
    if stored:
        return ObjectWeights(stored, [await reference for *_, reference in stored])
    from vcpo.weights import announced_weights

    return announced_weights([entry for entry in source if len(entry) == 3])
