"""Tiny models of the families that people train, randomly initialised from their configs, in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from vcpo.policy.tokens import character_tokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz []"
VOCABULARY = len(ALPHABET) + 3
CONTEXT = 64
MIXED = ["sliding_attention", "full_attention"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=None,
        eos_token_id=1,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2.5": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=ROPE),
    "gemma": lambda: GemmaConfig(**SIZES),
    # Both caps bend what random weights give; the released models' 50 and 30 would not be noticed.
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        sliding_window=5,
        layer_types=MIXED,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=2.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=MIXED),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),
    "smollm2": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "smollm3": lambda: SmolLM3Config(**SIZES, tie_word_embeddings=True, no_rope_layers=[1, 0]),
    "gpt2": gpt2,
}


def save_model(family: str, folder: Path, seed: int = 0) -> Path:
    """A model far from the near-uniform policy of its initialisation, norms and biases included, so that
    mistakes show; with its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter += scale * torch.randn_like(parameter)
    model.save_pretrained(folder)
    character_tokenizer(ALPHABET).save_pretrained(folder)
    return folder
