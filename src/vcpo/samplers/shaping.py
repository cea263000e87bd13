"""From logits to the distribution that is sampled, and a draw from it.

Temperature first, then top-k, then top-p of what top-k left, then normalised anew: the order of vLLM, whose
``processed_logprobs`` are these. Top-k keeps every token that ties with the k-th. Top-p keeps the shortest
list of most probable tokens whose probabilities reach p, so always the first; of tokens that tie there, those
with smaller numbers come first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def sampled_log_probs(
    logits: Float[Tensor, "B V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """log μ of every token, in float32 or better; −inf for those that are cut. 0 and 1 cut nothing."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        scaled = scaled / temperature
    if 0 < top_k < logits.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        scaled = _most_probable(scaled, top_p)
    return scaled.log_softmax(-1)


def _most_probable(logits: Tensor, top_p: float) -> Tensor:
    """−inf where more probable tokens have ``top_p`` already."""
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1, dtype=torch.float64)
    more_probable = probabilities.cumsum(-1) - probabilities
    kept = ordered.masked_fill(more_probable >= top_p, -torch.inf)
    return torch.empty_like(kept).scatter_(-1, tokens, kept)


def draw(log_probs: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, "B 1"]:
    """The token at which the cumulative distribution passes each of ``uniforms``, which are in [0, 1).

    In float64: in float32 a number near 1 would become 1 and draw the last token, however improbable. A token
    without probability is never drawn.
    """
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The product may round up to the total, which no token passes.
    reached = torch.minimum(
        uniforms.to(cumulative)[:, None] * total, total.nextafter(torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, reached, right=True)
