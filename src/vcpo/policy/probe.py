"""What the learner says of a few sequences: the question that every served copy of the policy must answer."""

from __future__ import annotations

import numpy as np
import torch

from vcpo.policy.loading import Policy
from vcpo.weights import Probe

SEQUENCES, LENGTH = 3, 16


@torch.no_grad()
def make_probe(policy: Policy) -> Probe:
    """Log-probs of the same few random sequences, under the weights as they are; temperature 1."""
    tokens = torch.from_numpy(_sequences(policy)).to(policy.model.device)
    logits = policy.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return Probe(tokens.tolist(), log_probs.tolist())


def _sequences(policy: Policy) -> np.ndarray:
    """Ordinary tokens only: what an engine makes of special ones is its own affair."""
    special = set(policy.tokenizer.all_special_ids)
    ordinary = [t for t in range(len(policy.tokenizer)) if t not in special]
    length = max(2, min(LENGTH, policy.context_length - 1))
    return np.random.default_rng(0).choice(ordinary, (SEQUENCES, length))
