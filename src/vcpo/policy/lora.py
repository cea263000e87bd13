"""LoRA (arXiv 2106.09685) through PEFT: small trainable matrices beside the frozen ones of a model.

y = W x + (α / rank) B A x, with A drawn and B zero at first, so that the adapted model begins as it was.
PEFT's layers are put into the model, which stays the transformers model it is: packing, score norms, the
local sampler and checkpoints meet a model of which few parameters are trainable.

Adapters are float32 or better even where the model is bfloat16: there, a step of a usual learning rate would
round to nothing, and the optimizer would keep a float32 copy of each beside it anyway. So no memory is lost,
and what is sampled and published is what is stepped.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vcpo.config import LoraConfig
from vcpo.errors import ConfigError, ModelError
from vcpo.policy.loading import Policy
from vcpo.weights import ADAPTER

ALL_LINEAR = "all-linear"


def with_adapters(policy: Policy, config: LoraConfig, seed: int) -> Policy:
    """The policy with adapters in its model, which alone are trainable; unchanged if the rank is 0.

    The same seed gives the same adapters in every process. Raises ConfigError without PEFT, ModelError if a
    target names no linear module.
    """
    if not config.rank:
        return policy
    peft = import_peft(config)
    targets = target_modules(policy.model, config, policy.name)
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(targets))  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT says that it sets it for Conv1D
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, policy.model, ADAPTER)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return policy


def import_peft(config: LoraConfig) -> Any:
    """PEFT, or a ConfigError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora.rank = {config.rank} needs PEFT: pip install 'vcpo[lora]'") from error
    return peft


def target_modules(
    model: PreTrainedModel, config: LoraConfig, name: str = "the model"
) -> dict[str, nn.Module]:
    """The linear modules that get adapters, by name; none if the rank is 0. ``all-linear`` leaves the head
    out. Raises ModelError if a target matches nothing."""
    if not config.rank:
        return {}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    chosen: dict[str, nn.Module] = {}
    for target in config.targets:
        found = {
            n: m
            for n, m in linear.items()
            if _is_target(n, target) or (target == ALL_LINEAR and m is not head)
        }
        if not found:
            raise ModelError(
                f"lora.targets: no linear module of {name} ends in {target!r}; {_nearest(target, linear)}"
            )
        chosen |= found
    if head in chosen.values() and model.config.tie_word_embeddings:
        raise ModelError(
            f"lora.targets: the head of {name} is its embedding too, and an adapter would change one of them "
            "only: leave the head out"
        )
    return chosen


def adapter_size(targets: dict[str, Any], config: LoraConfig) -> int:
    """Parameters of the adapters: rank · (inputs + outputs) of every target."""
    return config.rank * sum(sum(module.weight.shape) for module in targets.values())


def merged(policy: Policy) -> Policy:
    """The policy as a plain model: W + (α / rank) B A in the place of W and its adapter, in W's number type.

    Everything without an adapter is shared with ``policy``; the rest is a copy. Unchanged without adapters.
    """
    adapted = [n for n, m in policy.model.named_modules() if hasattr(m, "get_delta_weight")]
    if not adapted:
        return policy
    shared = {id(t): t for t in (*policy.model.parameters(), *policy.model.buffers())}
    plain: PreTrainedModel = copy.deepcopy(policy.model, shared)  # pyright: ignore[reportArgumentType]
    del plain.peft_config
    for name in adapted:
        layer: Any = plain.get_submodule(name)
        base = layer.get_base_layer()
        with torch.no_grad():
            weight = (base.weight + layer.get_delta_weight(ADAPTER)).to(base.weight.dtype)
        base.weight = nn.Parameter(weight, requires_grad=False)
        plain.set_submodule(name, base)
    return replace(policy, model=plain)


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _nearest(target: str, names: Any) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.3) or ends[:8]
    return f"the nearest are {', '.join(near)}, or {ALL_LINEAR}"
