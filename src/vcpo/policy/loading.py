"""From a config to a policy: a causal language model with its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging

from vcpo.config import ModelConfig
from vcpo.errors import ModelError
from vcpo.policy.tokens import TokenizerCodec, character_tokenizer


@dataclass(frozen=True)
class Policy:
    """A causal language model, its tokenizer, and the context it is used with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    name: str = "the small model"

    @property
    def codec(self) -> TokenizerCodec:
        return TokenizerCodec(self.tokenizer, self.name)

    @property
    def stop(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's, and those of the generation config (chat models often
        end a turn with another one)."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return frozenset([self.codec.end_id, *(t for t in more if t is not None)])

    def save(self, folder: Path) -> None:
        """Write model and tokenizer in Hugging Face format."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def small_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The small Llama; its head is untied."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )


def small_policy(config: ModelConfig, alphabet: str, seed: int) -> Policy:
    """A freshly initialised small Llama with a character tokenizer for ``alphabet``."""
    tokenizer = character_tokenizer(alphabet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(small_architecture(config, tokenizer))
    return Policy(_place(model, config), tokenizer, config.context_length)


def load_policy(name: str, config: ModelConfig) -> Policy:
    """Any causal LM that transformers loads, from a folder or a hub id; its weights are never unpickled."""
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            name,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random, with a warning
        raise ModelError(
            f"cannot load the model {name!r}: its weights lack {missing[0]} ({len(missing)} missing); "
            "is it a causal language model?"
        )
    supported = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = min(config.context_length, supported) if supported else config.context_length
    return Policy(_place(model, config), tokenizer, context, name)


def load_architecture(name: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a model, without its weights."""
    with _loading(name):
        return AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _loading(name: str) -> Generator[None]:
    """Turns what goes wrong in transformers into one line that names the model."""
    parent = Path(name).parent
    if not Path(name).exists() and (Path(name).is_absolute() or (parent != Path() and parent.is_dir())):
        raise ModelError(f"cannot load the model {name!r}: there is no such folder")
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"cannot load the model {name!r}: {what} (give a folder with config.json, "
            "model.safetensors and tokenizer files, or a hub id that this machine can reach)"
        ) from error


def hide_loading_bars() -> None:
    """No bars of transformers for reading and writing weights: a run has one bar, and it is ours."""
    transformers_logging.disable_progress_bar()


def _place(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Dropout off (the behaviour policy has none), on the device, in the number type."""
    model.eval()
    try:
        model.to(device=config.device, dtype=getattr(torch, config.dtype))  # pyright: ignore[reportCallIssue]
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"cannot use device {config.device!r}: {str(error).splitlines()[0]}; set model.device"
        ) from error
    return model
