"""What runs inside a vLLM server, with vLLM's Python and without vcpo: the taking over of weights.

vLLM has a protocol for weight updates (start, update, finish) with pluggable engines; this module adds one,
``vcpo``, that reads a safetensors file or receives a broadcast. It is named on the server's command line
(``--worker-extension-cls vcpo_in_vllm.Extension``), so that each worker process imports it, which registers
the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vcpo_rendezvous import WeightGroup  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngineFactory,
)
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
from vllm.model_executor.model_loader.reload.layerwise import (  # pyright: ignore[reportMissingImports]
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

_last_digest = ""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How to join the learner's broadcast; all empty for files."""

    address: str = ""
    port: int = 0
    rank_offset: int = 0
    world_size: int = 0
    timeout_seconds: float = 600.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """``path``: a safetensors file; else the tensors that will be broadcast, in this order."""

    path: str = ""
    names: list[str] | None = None
    dtypes: list[str] | None = None
    shapes: list[list[int]] | None = None


class VcpoWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes whole models in checkpoint format."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._group = None
        if init_info.world_size:
            self._group = WeightGroup(
                init_info.address,
                init_info.port,
                init_info.rank_offset + self.parallel_config.rank,
                init_info.world_size,
                self.device.type,
                init_info.timeout_seconds,
            )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        global _last_digest
        digest = hashlib.blake2b(digest_size=8)
        tensors = _from_file(update_info.path) if update_info.path else self._broadcast(update_info)
        try:
            self.model.load_weights(_digesting(tensors, digest))
        except BaseException:
            self._break_off()
            raise
        _last_digest = digest.hexdigest()

    def _break_off(self) -> None:
        """Layers that were not whole yet get their old tensors back. What is left of the layers would break
        vLLM at its next token, and the next update would be added to it."""
        for layer in self.model.modules():
            if (info := get_layerwise_info(layer)).can_load():
                info.load_numel = 0
                info.loaded_weights.clear()
        self.finish_weight_update()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        # A tied head shares the table's numbers, but a repacked copy of them (CPU) is the head's own.
        if method is not None and _is_tied(self.model_config):
            method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self._group = None

    def _broadcast(self, info: UpdateInfo) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise RuntimeError("this server has not joined the learner's broadcast")
        for name, dtype, shape in zip(info.names or (), info.dtypes or (), info.shapes or (), strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self._group.broadcast(tensor)
            yield name, tensor


class Extension:
    """Mixed into vLLM's workers: what ``/collective_rpc`` can ask of them."""

    vllm_config: Any
    list_loras: Callable[[], set[int]]
    add_lora: Callable[[LoRARequest], bool]

    def vcpo_facts(self) -> dict[str, Any]:
        """What is served, and how. (``/server_info`` knows too, and asks pip for all packages each time.)"""
        model, transfer = self.vllm_config.model_config, self.vllm_config.weight_transfer_config
        adapters = self.vllm_config.lora_config
        return {
            "architecture": model.hf_text_config.to_dict(),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "weight_transfer": transfer.backend if transfer else "",
            "max_lora_rank": adapters.max_lora_rank if adapters else 0,
        }

    def vcpo_load_adapter(self, name: str, path: str) -> bool:
        """Replace the one adapter that is loaded, also for requests under way."""
        (number,) = self.list_loras()
        return self.add_lora(LoRARequest(name, number, path, load_inplace=True))

    def vcpo_digest(self) -> str:
        """Of the weights received last, as they arrived."""
        return _last_digest


def _from_file(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _digesting(tensors: Iterable[tuple[str, Tensor]], digest: Any) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; ``digest`` sees name, shape, type and bytes of each on the way."""
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        yield name, tensor


def _is_tied(model_config: Any) -> bool:
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))


WeightTransferEngineFactory.register_engine("vcpo", VcpoWeights)
