"""Log-probabilities of sampled tokens under a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vcpo.policy.packing import PackedRows


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
