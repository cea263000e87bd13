"""Tiny models for the engine tests, and what transformers says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vcpo.policy.tokens import character_tokenizer

torch.set_num_threads(1)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = len(LETTERS) + 3
END = 1
CONTEXT = 2048


def llama(seed: int, **changes: Any) -> PreTrainedModel:
    """Far from the near-uniform policy of its initialisation, so that mistakes show; heads 32 wide, as vLLM
    needs them."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    model = LlamaForCausalLM(LlamaConfig(**(common | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, letters: str = LETTERS) -> Path:
    """In Hugging Face format, with a tokenizer."""
    model.save_pretrained(folder)
    character_tokenizer(letters).save_pretrained(folder)
    return folder


def random_tokens(count: int, seed: int) -> list[int]:
    """Letters alone."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


@torch.no_grad()
def all_log_probs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[T-1, V] log π at every place but the first, by one forward without cache."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, :-1].log_softmax(-1)


def log_probs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[T-1] log π of tokens 1…"""
    return all_log_probs(model, tokens).gather(-1, torch.tensor(list(tokens))[1:, None])[:, 0]
