"""Log-probabilities of sampled tokens under a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from vcpo.policy.packing import PackedRows, pack
from vcpo.trajectory import NOT_SAMPLED, Trajectory


def sampled_log_probs(model: nn.Module, rows: PackedRows) -> Tensor:
    """log π(y_t | y_<t) of every sampled token, temperature 1.

    Returns [N] in the order of ``rows.action_owners`` (``rows.spread`` makes it [B, A]), in float32 or
    better whatever the model's number type. Gradient flows into the model's parameters.
    """
    logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    before = logits[rows.action_rows, rows.action_columns - 1]
    precise = before.to(torch.promote_types(before.dtype, torch.float32))
    chosen = rows.input_ids[rows.action_rows, rows.action_columns]
    return precise.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether sequences that share a row do not see each other, tried on three short ones."""
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    random = np.random.default_rng(0)
    probes = []
    for length in (6, 3, 3):  # the second and the third share a row
        mask = np.arange(length) > 0
        probes.append(
            Trajectory(
                tokens=random.integers(0, vocabulary, length).astype(np.int32),
                action_mask=mask,
                log_probs=np.zeros(length, np.float32),
                versions=np.where(mask, 0, NOT_SAMPLED).astype(np.int32),
                reward=0.0,
            )
        )
    together, alone = (
        sampled_log_probs(model, pack(probes, packed=packed).to(model.device)) for packed in (True, False)
    )
    # A leak moves log-probs by nats, the order of summation by 1e-6 (float32) to 1e-2 (bfloat16).
    return bool((together - alone).abs().max() < 0.1)
