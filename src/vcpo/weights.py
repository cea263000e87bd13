"""Weights on the move: a named snapshot, its checksum, and the file that carries it between processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vcpo.errors import ModelError

Weights = Mapping[str, Tensor]


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct persistent tensor of the model, by name; a tied tensor appears once. Not copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy ``weights`` into the model in place; names and shapes must be exactly the model's."""
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
        tensor.copy_(weights[name])


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
