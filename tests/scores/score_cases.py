"""Small models of every family and ragged batches, for the tests of score norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vcpo.trajectory import NOT_SAMPLED, Trajectory

torch.set_num_threads(1)

VOCABULARY = 13
PAD = 0


@dataclass(frozen=True)
class Batch:
    sequences: list[Tensor]
    masks: list[Tensor]
    normalisers: Tensor


@dataclass(frozen=True)
class Rows:
    ids: Tensor
    positions: Tensor
    segments: Tensor


def batch_of(lengths: Sequence[int], seed: int = 0) -> Batch:
    """Random tokens (the padding token among them); the first trajectory has no action."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.6 for n in lengths]
    for mask in masks:
        mask[-1], mask[0] = True, False
    masks[0][:] = False
    return Batch(sequences, masks, torch.rand(len(lengths), generator=generator, dtype=torch.float64) + 0.1)


def rows_of(batch: Batch, members: Sequence[Sequence[int]]) -> Rows:
    """Trajectories laid out one after another in rows; the rest of a row is a sequence of padding."""
    lengths = [len(s) for s in batch.sequences]
    width = max(sum(lengths[i] for i in row) for row in members)
    ids = torch.full((len(members), width), PAD)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    for r, row in enumerate(members):
        column = 0
        for i in row:
            span = slice(column, column + lengths[i])
            ids[r, span], segments[r, span] = batch.sequences[i], i
            positions[r, span] = torch.arange(lengths[i])
            column += lengths[i]
        positions[r, column:] = torch.arange(width - column)
    return Rows(ids, positions, segments)


def padded(batch: Batch) -> Rows:
    return rows_of(batch, [[i] for i in range(len(batch.sequences))])


def packed(batch: Batch) -> Rows:
    count = len(batch.sequences)
    order = list(range(count))[::-1]
    return rows_of(batch, [order[:2], order[2:]])


def trajectories_of(batch: Batch) -> list[Trajectory]:
    """The batch as the learner knows it."""
    return [
        Trajectory(
            tokens=tokens.numpy().astype(np.int32),
            action_mask=mask.numpy(),
            log_probs=np.zeros(len(tokens), np.float32),
            versions=np.where(mask.numpy(), 0, NOT_SAMPLED).astype(np.int32),
            reward=0.0,
        )
        for tokens, mask in zip(batch.sequences, batch.masks, strict=True)
    ]


def members_of(batch: Batch, members: Sequence[int]) -> Batch:
    """A part of the batch."""
    chosen = list(members)
    return Batch(
        [batch.sequences[i] for i in chosen], [batch.masks[i] for i in chosen], batch.normalisers[chosen]
    )


def objective_of(logits: Tensor, batch: Batch, rows: Rows) -> Tensor:
    total = logits.new_zeros(())
    for i, (tokens, mask) in enumerate(zip(batch.sequences, batch.masks, strict=True)):
        own = logits[rows.segments == i].log_softmax(-1)
        log_probs = own[:-1].gather(-1, tokens[1:, None])[:, 0]
        total = total + batch.normalisers[i] * log_probs[mask[1:]].sum()
    return total


def forward(model: nn.Module, rows: Rows) -> Tensor:
    return model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False).logits


def build(
    kind: Callable[..., PreTrainedModel], config: Callable[..., Any], **changes: object
) -> PreTrainedModel:
    """A random float64 model; norms, biases and scales moved away from their special initial values."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
    }
    return disturbed(kind(config(**(common | changes))))


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    model = model.double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def llama(**changes: object) -> PreTrainedModel:
    return build(LlamaForCausalLM, LlamaConfig, **changes)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return disturbed(GPT2LMHeadModel(config))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config),
    "gemma-tied": lambda: build(GemmaForCausalLM, GemmaConfig, tie_word_embeddings=True),
    "gemma3-tied": lambda: build(Gemma3ForCausalLM, Gemma3TextConfig, tie_word_embeddings=True),
    "mistral": lambda: build(MistralForCausalLM, MistralConfig),
    "gpt2-tied": gpt2,
}

RAGGED = [5, 9, 1, 3, 17, 8]
"""Lengths of the trajectories of most tests."""


def gradient_oracle(model: nn.Module, batch: Batch, coefficients: Tensor) -> dict[str, Tensor]:
    """Σ_i c_i ∇ n_i log π(τ_i) by its definition, one backward pass a trajectory; 0 where nothing arrives."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i, (tokens, mask) in enumerate(zip(batch.sequences, batch.masks, strict=True)):
        own = Batch([tokens], [mask], batch.normalisers[i : i + 1])
        rows = padded(own)
        objective = objective_of(forward(model, rows), own, rows)
        grads = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += coefficients[i] * grad
    return total


def separate_gradients(model: nn.Module, logits: Tensor, batch: Batch, rows: Rows) -> list[dict[str, Tensor]]:
    """∇ n_i log π(τ_i) of each trajectory, by one backward pass a trajectory through one forward pass.

    Rounding and dropout of the forward pass are then the same for all methods.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for i in range(len(batch.sequences)):
        alone = replace(batch, normalisers=batch.normalisers * (torch.arange(len(batch.sequences)) == i))
        objective = objective_of(logits, alone, rows)
        grads = torch.autograd.grad(
            objective, list(parameters.values()), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        found.append(dict(zip(parameters, grads, strict=True)))
    return found


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """What is in ``.grad`` of the trainable parameters; 0 where nothing is."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
