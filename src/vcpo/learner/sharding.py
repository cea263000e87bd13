"""FSDP2: each rank holds a part of every parameter, and gathers a layer's when it computes it.

Every decoder layer is a group of its own; what is left (embedding, head, last norm) is one more. Gradients
are reduced in float32 and are means over ranks, so what a rank adds is multiplied by their number
(:mod:`vcpo.learner.across_ranks`). torch does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vcpo.learner.ranks import Ranks
from vcpo.scores.record import is_sharded


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Shard in place; the model, whole on every rank's CPU, moves to the devices layer by layer."""
    mesh = ranks.mesh()
    first = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(first, torch.float32))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*layers, model):
        # The last group too, which torch would keep gathered: outside of a pass, parameters are their shards.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every rank; every rank must ask. One that is not sharded is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Sharded tensors gathered to the CPU of the first rank, one at a time; the others get none.

    Without sharding they are returned as they are: live, not copied.
    """
    if not ranks.several:
        return dict(tensors)
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if ranks.first:
            gathered[name] = full.cpu()
    return gathered


def part_of(value: Tensor, like: Any) -> Tensor:
    """``value``, which every rank has whole or its part of, sharded as ``like`` is, on its device."""
    if not is_sharded(like) or is_sharded(value):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
