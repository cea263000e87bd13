"""How a learner's weights leave its process. The learner puts them there; samplers are told the source."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vcpo.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup
    from vcpo.weights import Weights


class Outbox(Protocol):
    def put(self, version: int, weights: Weights) -> Any:
        """Offer weights; what a sampler must know to take them, as JSON or as the runtime carries it."""
        ...

    def meet(self, address: str, port: int, world_size: int) -> None:
        """Meet those who will take them, where that is needed."""
        ...

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Do the sender's part, where there is one."""
        ...

    def close(self) -> None:
        """Remove what is left."""
        ...


class FileOutbox:
    """A safetensors file of each version, in shared memory or in a folder that all samplers see.

    When version v is written, every sampler serves v - 2 already: the controller waits for v - 1 to be
    served before it sends v. So older files can go.
    """

    def __init__(self, config: Config) -> None:
        self._parent = config.runtime.weights_folder
        self._folder: Path | None = None

    def put(self, version: int, weights: Weights) -> str:
        from vcpo.samplers.shared_memory import transfer_folder
        from vcpo.weights import write_weights

        if self._folder is None:
            self._folder = transfer_folder(3 * sum(t.nbytes for t in weights.values()), self._parent)
        path = self._folder / f"version-{version}.safetensors"
        write_weights(path, weights)
        (self._folder / f"version-{version - 2}.safetensors").unlink(missing_ok=True)
        return str(path)

    def meet(self, address: str, port: int, world_size: int) -> None:
        pass

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        pass

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class BroadcastOutbox:
    """A broadcast to all workers of all engines: NCCL between GPUs, gloo between CPUs.

    Who has failed leaves the group, so that the others notice; :meth:`meet` makes another one.
    """

    def __init__(self, config: Config) -> None:
        self._device, self._timeout = config.model.device, config.runtime.timeout_seconds
        self._group: WeightGroup | None = None

    def put(self, version: int, weights: Weights) -> list[tuple[str, str, list[int]]]:
        """What will be broadcast: name, number type, shape."""
        return [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in sorted(weights.items())
        ]

    def meet(self, address: str, port: int, world_size: int) -> None:
        """Wait for all engines to join."""
        from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup

        self._group, kind = None, self._device.partition(":")[0]
        self._group = WeightGroup(address, port, 0, world_size, kind, self._timeout)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        failed: RuntimeError | None = None
        for _, tensor in tensors:  # of several ranks all gather, to the end, and the first sends
            try:
                if self._group is not None:
                    self._group.broadcast(tensor.contiguous())
            except RuntimeError as error:
                self._group, failed = None, error
        if failed is not None:
            raise failed

    def close(self) -> None:
        self._group = None
