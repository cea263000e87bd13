"""Tiny models, ragged groups and learners, for the tests of the learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_utils import PreTrainedModel

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import LearnerConfig
from vcpo.learner.learner import Learner
from vcpo.policy.loading import Policy
from vcpo.policy.tokens import character_tokenizer
from vcpo.trajectory import Group, Trajectory

VOCABULARY = 11
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def tiny_model(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    sizes = SIZES | changes
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    with torch.no_grad():  # initial norm weights of one would hide mistakes in their gradients
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def policy_of(model: PreTrainedModel) -> Policy:
    tokenizer: PreTrainedTokenizerFast = character_tokenizer("abcdefgh")
    return Policy(model, tokenizer, 64)


def random_groups(seed: int = 0, sizes: Sequence[int] = (3, 2, 4), staleness: float = 0.4) -> list[Group]:
    """Ragged multi-turn trajectories with behaviour log-probs that differ from any model's."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, size in enumerate(sizes):
        members = []
        for _ in range(size):
            length = int(rng.integers(5, 14))
            mask = rng.random(length) < 0.6
            mask[:2], mask[-1] = False, True
            members.append(
                Trajectory(
                    tokens=rng.integers(0, VOCABULARY, length).astype(np.int32),
                    action_mask=mask,
                    log_probs=np.where(mask, -2.4 + staleness * rng.standard_normal(length), 0).astype(
                        np.float32
                    ),
                    versions=np.where(mask, 0, -1).astype(np.int32),
                    reward=float(rng.integers(0, 2)) + 0.25 * g,
                )
            )
        groups.append(Group(index=g, problem=g, trajectories=tuple(members)))
    return groups


def learner_for(model: PreTrainedModel, name: str, **settings: object) -> Learner:
    learner_settings = {"learning_rate": 0.01, "max_grad_norm": 1e9} | settings
    algorithm = get_algorithm(name)
    return Learner(policy_of(model), algorithm, LearnerConfig.model_validate(learner_settings))


def log_probs_of(model: PreTrainedModel, trajectory: Trajectory) -> Tensor:
    """log π of the sampled tokens, one unpadded sequence at a time."""
    ids = torch.from_numpy(trajectory.tokens.astype(np.int64))[None]
    every = model(input_ids=ids).logits[0].log_softmax(-1)
    places = torch.from_numpy(np.flatnonzero(trajectory.action_mask))
    return every[places - 1, ids[0, places]]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
