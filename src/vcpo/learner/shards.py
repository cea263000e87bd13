"""Checkpoints of sharded learners: torch's distributed ones, as safetensors, for any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, empty

from vcpo.errors import CheckpointError
from vcpo.learner.ranks import Ranks


def write_shards(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Each rank writes its part of every tensor; what is not sharded is written by one rank."""
    tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_shards(folder: Path, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """What any number of ranks wrote, for this number of ranks: whole tensors for one, else each its part.

    Raises CheckpointError if it cannot be read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    mesh = ranks.mesh() if ranks.several else None
    try:
        found = {
            name: _empty(entry, mesh)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(found, storage_reader=reader, no_dist=not ranks.several)
    except (OSError, ValueError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        part, _, own = name.partition("/")
        parts.setdefault(part, {})[own] = tensor
    return parts


def _empty(entry: TensorStorageMetadata, mesh: DeviceMesh | None) -> Tensor:
    """A tensor to read into. Parameters, and what belongs to them, are sharded by their first dimension."""
    kind: Any = entry.properties.dtype
    if mesh is None or not entry.size or not kind.is_floating_point:
        return torch.empty(entry.size, dtype=kind)
    return empty(*entry.size, dtype=kind, device_mesh=mesh, placements=[Shard(0)])
