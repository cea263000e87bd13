"""From a config to a policy: a causal language model with its tokenizer.

What would train wrongly without a word is refused here, by name: weights that lack keys (transformers would
leave them random), models that see the tokens to come (encoders), models of more than text, adapters taken
for models, tokenizers with more tokens than the model. ``docs/models.md`` lists what was tried.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from vcpo.config import ModelConfig
from vcpo.errors import ModelError
from vcpo.policy.tokens import TokenizerCodec, character_tokenizer, stop_tokens

log = logging.getLogger(__name__)


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
        return stop_tokens(self.codec, self.model.generation_config)

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
        attn_implementation=config.attention,  # pyright: ignore[reportCallIssue]
    )


def small_policy(config: ModelConfig, alphabet: str, seed: int) -> Policy:
    """A freshly initialised small Llama with a character tokenizer for ``alphabet``."""
    tokenizer = character_tokenizer(alphabet)
    with torch.random.fork_rng(devices=[]), _loading("the small model", config):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(small_architecture(config, tokenizer))
    return Policy(_place(model, config), tokenizer, config.context_length)


def load_policy(name: str, config: ModelConfig) -> Policy:
    """Any causal LM that transformers loads, from a folder or a hub id; its weights are never unpickled, and
    a program that comes with it is never run.

    The context is ``config.context_length``, or what the model supports if that is less. Raises ModelError.
    """
    architecture, tokenizer = load_architecture(name)
    attention = _attention(architecture, config)
    if attention != config.attention:
        log.info("%s: %s cannot compute its attention; %s does", name, config.attention, attention)
    with _loading(name, config):
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            name,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"cannot load the model {name!r}: its weights lack {missing[0]} ({len(missing)} missing); "
            "is it a causal language model?"
        )
    _check_vocabulary(name, model, tokenizer)
    placed = _place(model, config)
    if _sees_the_future(placed):
        raise ModelError(
            f"cannot use the model {name!r}: {type(model).__name__} sees the tokens to come, as encoders do; "
            "give a causal language model"
        )
    return Policy(placed, tokenizer, supported_context(architecture, config), name)


def load_architecture(name: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a causal language model, without its weights."""
    with _loading(name):
        architecture = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if architecture.get_text_config() is not architecture:
        problem = "is of more than text: give the variant for text only"
    elif type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = f"is of the kind {architecture.model_type}: give a causal language model"
    else:
        with _loading(name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        TokenizerCodec(tokenizer, name)  # refuses a tokenizer without an end
        return architecture, tokenizer
    raise ModelError(f"cannot load the model {name!r}: it {problem}")


def is_hub_id(name: str) -> bool:
    """Whether this is a name on a hub: no folder, nor the path of one that is missing."""
    folder = Path(name)
    missing = folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir())
    return bool(name) and not folder.exists() and not missing


def shapes_alone(architecture: PreTrainedConfig, config: ModelConfig) -> PreTrainedModel:
    """The model on torch's meta device: shapes without storage."""
    with torch.device("meta"), _loading(config.name or "the small model", config):
        return AutoModelForCausalLM.from_config(architecture)


def supported_context(architecture: PreTrainedConfig, config: ModelConfig) -> int:
    """The context a model is used with: as the config says, at most what the model supports."""
    supported = getattr(architecture, "max_position_embeddings", None)
    return min(config.context_length, supported) if supported else config.context_length


def for_sampling(config: ModelConfig) -> ModelConfig:
    """The settings of the local sampler's replica: it masks attention itself, and keeps no activations."""
    return config.model_copy(update={"attention": "sdpa", "activation_checkpointing": False})


def _attention(architecture: PreTrainedConfig, config: ModelConfig) -> str:
    """As the config says; eager where a model says that sdpa cannot: Gemma 2 caps its attention logits."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]
    return "eager" if config.attention == "sdpa" and not kind._supports_sdpa else config.attention


@contextlib.contextmanager
def _loading(name: str, config: ModelConfig | None = None) -> Generator[None]:
    """Turns what goes wrong in transformers into one line that names the model."""
    folder = Path(name)
    if not folder.exists() and (folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir())):
        raise ModelError(f"cannot load the model {name!r}: there is no such folder")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"cannot load the model {name!r}: it is an adapter; give the model it was merged into"
        )
    if config is not None and config.attention == "flash_attention_2":
        _check_flash(config)
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"cannot load the model {name!r}: it needs a program of its own, which vcpo never runs; give "
                "a model that transformers knows"
            ) from error
        what = (" ".join(str(error).split()) or type(error).__name__).split(". ")[0][:200]
        raise ModelError(
            f"cannot load the model {name!r}: {what} (give a folder with config.json, "
            "model.safetensors and tokenizer files, or a hub id that this machine can reach)"
        ) from error


def _check_flash(config: ModelConfig) -> None:
    problem = None
    if not is_flash_attn_2_available():
        problem = (
            "needs the package flash-attn and a CUDA device: pip install flash-attn --no-build-isolation"
        )
    elif config.dtype == "float32":
        problem = 'does not compute in float32: set model.dtype = "bfloat16"'
    if problem:
        raise ModelError(f'model.attention = "flash_attention_2" {problem}; or leave it at "sdpa"')


def _check_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.weight.shape[0]:
        raise ModelError(
            f"cannot use the model {name!r}: its tokenizer has {len(tokenizer):,} tokens, its embedding "
            f"{embedding.weight.shape[0]:,}; is it the tokenizer of another model?"
        )


def _sees_the_future(model: PreTrainedModel) -> bool:
    """Whether what the model says of earlier tokens depends on the last one: a causal mask makes that
    derivative exactly zero, in any number type."""
    embedding: Any = model.get_input_embeddings()
    inputs = embedding(torch.arange(4, device=model.device)[None]).detach().requires_grad_()
    earlier = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1]
    (gradient,) = torch.autograd.grad(earlier.float().square().sum(), inputs)
    return bool(gradient[:, -1].nan_to_num(0.0).any())  # NaN weights tell nothing; sampling refuses them


def hide_loading_bars() -> None:
    """No bars of transformers for reading and writing weights: a run has one bar, and it is ours."""
    transformers_logging.disable_progress_bar()


def _place(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Dropout off (the behaviour policy has none), on the device, parameters in the number type.

    Buffers keep theirs: frequencies of rotary embeddings in bfloat16 are off by up to one part in 512, which
    turns tokens a thousand places apart by radians.
    """
    model.eval()
    try:
        model.to(device=config.device)  # pyright: ignore[reportCallIssue]
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"cannot use device {config.device!r}: {str(error).splitlines()[0]}; set model.device"
        ) from error
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    return model


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Each decoder layer computes its activations again in the backward pass.

    transformers does so in training mode only, which also turns dropout on: so the mode is set on the layers
    themselves, and what is inside them, where dropout is, stays in evaluation mode. ``model.eval()`` ends it.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers for model.activation_checkpointing: unset it")
    if any(rate for layer in layers for key, rate in vars(layer).items() if "drop" in key):
        raise ModelError(
            f"{type(model).__name__} drops activations in its layers: set no activation_checkpointing"
        )
    for layer in layers:
        # Not reentrant: the score tape needs it so, and so do adapters behind a frozen embedding.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = True
