"""Warm start: teach a fresh small model the format of a task by supervised learning on demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import nn

from vcpo.config import WarmStartConfig
from vcpo.policy.loading import Policy
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.packing import pack
from vcpo.trajectory import Trajectory


def warm_start(
    policy: Policy,
    demonstrations: Iterator[Trajectory],
    config: WarmStartConfig,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Minimise −mean log π over the demonstrated tokens with AdamW; ``on_step`` hears each step's loss."""
    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    for _ in range(config.steps):
        rows = pack(list(islice(demonstrations, config.batch_size))).to(model.device)
        loss = -sampled_log_probs(model, rows).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(float(loss.detach()))
