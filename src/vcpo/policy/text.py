"""What a policy reads and writes, without its weights: enough to play with an engine that has them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from vcpo.config import ModelConfig
from vcpo.policy.loading import load_architecture, supported_context
from vcpo.policy.tokens import TokenizerCodec, stop_tokens

SHAPES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Fields of an architecture that decide the shapes of its weights."""


@dataclass(frozen=True)
class PolicyText:
    """Tokenizer, tokens that end an answer, and context of a policy."""

    name: str
    codec: TokenizerCodec
    stop: frozenset[int]
    context_length: int
    architecture: Mapping[str, Any]
    """The fields of :data:`SHAPES` that its config has."""


def load_text(name: str, config: ModelConfig) -> PolicyText:
    """Of the model in a folder or on the hub; ModelError as for the model itself."""
    architecture, tokenizer = load_architecture(name)
    codec = TokenizerCodec(tokenizer, name)
    generation = None
    with contextlib.suppress(OSError):  # not every model has one
        generation = GenerationConfig.from_pretrained(name)
    shapes = {field: getattr(architecture, field) for field in SHAPES if hasattr(architecture, field)}
    return PolicyText(
        name, codec, stop_tokens(codec, generation), supported_context(architecture, config), shapes
    )
