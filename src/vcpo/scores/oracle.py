"""The slow, obvious twin of :class:`vcpo.scores.ScoreTape`: one forward and backward pass a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vcpo.errors import VcpoError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def squared_score_norms_oracle(
    model: nn.Module,
    sequences: Sequence[Int[Tensor, " T"]],
    masks: Sequence[Bool[Tensor, " T"]],
    normalisers: Sequence[float] | Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """‖∇_θ n_i Σ_t log π_θ(y_{i,t})‖² of each trajectory, by its definition.

    ``sequences[i]`` has the token ids of trajectory i, unpadded; ``masks[i]`` is true on its sampled
    tokens, never the first, since the logits of token t are those at t-1. The caller normalises, by n_i.
    No gradient flows through the result and none reaches ``.grad``. Every layer is supported.

    Raises VcpoError if a mask marks the first token.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for tokens, mask, normaliser in zip(sequences, masks, normalisers, strict=True):
        if bool(mask[0]):
            raise VcpoError("the first token of a sequence cannot be a sampled one: nothing comes before it")
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        log_probs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        objective = normaliser * log_probs[mask[1:]].sum()
        grads = torch.autograd.grad(objective, parameters, allow_unused=True)
        norms.append(_squared_norm([g for g in grads if g is not None]))
    return torch.stack(norms)


def _squared_norm(grads: Sequence[Tensor]) -> Float[Tensor, ""]:
    precise = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
    return torch.stack([g.square().sum() for g in precise]).sum()
