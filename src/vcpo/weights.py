"""Weights on the move: a named snapshot, its checksum, and the file that carries it between processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vcpo.config import LoraConfig
from vcpo.errors import ModelError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """A few sequences, and what the learner says of them under the weights that it publishes."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    """log π of each token but the first, in nats, at temperature 1."""


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: every distinct persistent tensor, a tied one once; where some
    parameters are frozen and others are not (adapters), the trainable ones alone. Not copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    partly_frozen = {p.requires_grad for p in model.parameters()} == {True, False}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (tensor.requires_grad or not partly_frozen):
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_weights(
    model: nn.Module, weights: Weights, served: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> None:
    """Copy ``weights`` into the model in place; names and shapes must be exactly the model's.

    ``served``: what to make of each first, where the model is to have something else (fewer bits)."""
    own = weight_tensors(model)
    if own.keys() != weights.keys():
        different = sorted(own.keys() ^ weights.keys())
        raise ModelError(
            f"weights are of another model: {different[0]} is in only one ({len(different)} differ)"
        )
    for name, tensor in own.items():  # all of them before the first is copied: half an update serves nobody
        if tensor.shape != weights[name].shape:
            theirs, ours = tuple(weights[name].shape), tuple(tensor.shape)
            raise ModelError(f"weights are of another model: {name} has shape {theirs}, not {ours}")
    for name, tensor in own.items():
        tensor.copy_(served(name, weights[name].to(tensor.device)))


def checksum(weights: Weights) -> str:
    """A 64-bit digest of names, shapes and bytes: two processes that agree on it serve the same policy."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_weights(path: Path, weights: Weights) -> None:
    """Write a safetensors file; a reader never sees half of it."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
    partial.replace(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def announced_weights(entries: Iterable[tuple[str, str, list[int]]]) -> dict[str, Tensor]:
    """Tensors without numbers, from name, number type and shape: what a broadcast will bring."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape in entries
    }


def is_announced(weights: Weights) -> bool:
    """Whether the numbers are still to come."""
    return any(tensor.is_meta for tensor in weights.values())


ADAPTER = "default"
"""PEFT's name of a lone adapter; part of the names of its tensors in a model, and not in its file."""


def adapter_tensors(weights: Weights) -> dict[str, Tensor]:
    """Published adapter tensors under the names that PEFT's file of an adapter gives them.

    ``model.layers.0.self_attn.q_proj.lora_A.default.weight`` is
    ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` there.
    """
    return {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": weights[name] for name in weights}


def adapter_config(config: LoraConfig, weights: Weights, base: str = "") -> dict[str, Any]:
    """What PEFT's ``adapter_config.json`` says of published adapter tensors; ``base``: their model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".lora_")[0] for name in weights}),
    }


def write_adapter(folder: Path, config: LoraConfig, weights: Weights, base: str = "") -> None:
    """Write published adapter tensors as PEFT does: a folder that it, and vLLM, can load."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "adapter_model.safetensors", adapter_tensors(weights))
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(config, weights, base), indent=2))
