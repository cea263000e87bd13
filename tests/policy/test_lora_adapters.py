"""Adapters: which modules get them, what is trainable and published, and what they are merged into."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONTEXT, FAMILIES, save_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from vcpo.config import LoraConfig, ModelConfig
from vcpo.errors import ConfigError, ModelError
from vcpo.policy.loading import Policy, load_policy
from vcpo.policy.lora import adapter_size, merged, target_modules, with_adapters
from vcpo.weights import (
    adapter_config,
    adapter_tensors,
    checksum,
    load_weights,
    weight_tensors,
    write_adapter,
)

torch.set_num_threads(1)

LORA = LoraConfig(rank=3, alpha=6.0)
IDS = torch.tensor([[3, 9, 4, 4, 17, 25, 8, 30]])


def load(folder: Path, **settings: Any) -> Policy:
    return load_policy(str(folder), ModelConfig(context_length=CONTEXT, **settings))


def adapted(folder: Path, config: LoraConfig = LORA, seed: int = 0, **settings: Any) -> Policy:
    return with_adapters(load(folder, **settings), config, seed)


def disturb(policy: Policy) -> None:
    """Adapters as after training: their second matrix is not zero."""
    torch.manual_seed(9)
    for tensor in weight_tensors(policy.model).values():
        tensor += 0.2 * torch.randn_like(tensor)


@torch.no_grad()
def log_probs(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)


def test_rank_0_changes_nothing(tmp_path: Path) -> None:
    policy = load(save_model("llama3", tmp_path))
    assert with_adapters(policy, LoraConfig(), 0) is policy
    assert merged(policy) is policy
    assert len(weight_tensors(policy.model)) == len(list(policy.model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_model_begins_as_it_was_and_only_adapters_are_trainable(
    family: str, tmp_path: Path
) -> None:
    policy = load(save_model(family, tmp_path))
    before = log_probs(policy.model)
    policy = with_adapters(policy, LORA, 0)
    assert torch.equal(log_probs(policy.model), before)
    assert isinstance(policy.model, PreTrainedModel)
    trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable == weight_tensors(policy.model).keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_the_size_of_adapters_by_hand(tmp_path: Path) -> None:
    """Llama, width 16, 4 query and 2 key heads of 4, MLP 24, two layers: inputs + outputs of each matrix."""
    folder = save_model("llama3", tmp_path)
    widths = (16 + 16) + (16 + 8) + (16 + 8) + (16 + 16) + 3 * (16 + 24)
    plain = load(folder).model
    assert adapter_size(target_modules(plain, LORA), LORA) == 3 * 2 * widths
    assert sum(t.numel() for t in weight_tensors(adapted(folder).model).values()) == 3 * 2 * widths


def test_the_seed_alone_decides_the_adapters(tmp_path: Path) -> None:
    folder = save_model("llama3", tmp_path)
    torch.manual_seed(1)
    first = checksum(weight_tensors(adapted(folder, seed=5).model))
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after  # the global generator was left as it was
    assert checksum(weight_tensors(adapted(folder, seed=5).model)) == first
    assert checksum(weight_tensors(adapted(folder, seed=6).model)) != first


def targets_of(folder: Path, *targets: str) -> set[str]:
    return set(target_modules(load(folder).model, LoraConfig(rank=2, targets=list(targets))))


def test_targets_are_ends_of_names(tmp_path: Path) -> None:
    folder = save_model("llama3", tmp_path)
    assert targets_of(folder, "q_proj", "1.mlp.up_proj") == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    every = targets_of(folder, "all-linear")
    assert len(every) == 14
    assert "lm_head" not in every
    assert targets_of(folder, "all-linear", "lm_head") == every | {"lm_head"}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama3", ["q_proj", "k_porj"], "ends in 'k_porj'; the nearest are k_proj, .*or all-linear"),
        ("llama3", ["proj"], "ends in 'proj'; the nearest are"),
        ("llama3", ["embed_tokens"], "no linear module of .* ends in 'embed_tokens'"),
        ("gpt2", ["q_proj"], "ends in 'q_proj'; the nearest are c_proj"),
        ("qwen3", ["lm_head"], "the head of .* is its embedding too.*leave the head out"),
    ],
)
def test_targets_that_match_nothing_or_cannot_be_merged(
    family: str, targets: list[str], message: str, tmp_path: Path
) -> None:
    policy = load(save_model(family, tmp_path))
    with pytest.raises(ModelError, match=message):
        with_adapters(policy, LoraConfig(rank=2, targets=targets), 0)
    assert all(p.requires_grad for p in policy.model.parameters())


def test_without_peft_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(save_model("llama3", tmp_path))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora.rank = 3 needs PEFT: pip install 'vcpo\[lora\]'"):
        with_adapters(policy, LORA, 0)
    assert with_adapters(policy, LoraConfig(), 0) is policy


def test_published_adapters_make_a_replica_the_same_policy(tmp_path: Path) -> None:
    folder = save_model("qwen2.5", tmp_path)
    learner, replica = adapted(folder), adapted(folder)
    disturb(learner)
    assert not torch.equal(log_probs(learner.model), log_probs(replica.model))
    load_weights(replica.model, weight_tensors(learner.model))
    assert torch.equal(log_probs(learner.model), log_probs(replica.model))
    with pytest.raises(ModelError, match="another model"):
        load_weights(adapted(folder, LoraConfig(rank=2)).model, weight_tensors(learner.model))
    with pytest.raises(ModelError, match="another model"):
        load_weights(load(folder).model, weight_tensors(learner.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_a_plain_one_that_says_the_same(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "base")
    policy = adapted(folder)
    disturb(policy)
    expected = log_probs(policy.model)
    merged(policy).save(tmp_path / "merged")
    assert torch.equal(log_probs(policy.model), expected)  # the policy itself is as it was
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    base, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert plain.keys() == base.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(loaded), expected, rtol=0, atol=1e-5)
    assert float((log_probs(load(folder).model) - expected).abs().max()) > 0.1


def test_a_merged_weight_by_hand(tmp_path: Path) -> None:
    policy = adapted(save_model("llama3", tmp_path))
    disturb(policy)
    name = "model.layers.1.mlp.down_proj"
    tensors = policy.model.state_dict()
    a, b = (tensors[f"{name}.lora_{x}.default.weight"] for x in "AB")
    expected = tensors[f"{name}.base_layer.weight"] + 6.0 / 3 * (b @ a)
    torch.testing.assert_close(merged(policy).model.state_dict()[f"{name}.weight"], expected)


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma3"])
def test_the_adapter_folder_is_pefts_own(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "base")
    policy = adapted(folder)
    disturb(policy)
    tensors = weight_tensors(policy.model)
    write_adapter(tmp_path / "adapter", LORA, tensors, str(folder))
    own: Any = policy.model
    expected = {f"base_model.model.{n}": t for n, t in get_peft_model_state_dict(own).items()}
    assert checksum(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == checksum(expected)
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(log_probs(loaded), log_probs(policy.model), rtol=0, atol=1e-5)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder)


def test_names_and_config_of_an_adapter_file() -> None:
    name = "model.layers.0.self_attn.q_proj"
    published = {f"{name}.lora_{x}.default.weight": torch.zeros(2, 2) for x in "AB"}
    assert set(adapter_tensors(published)) == {f"base_model.model.{name}.lora_{x}.weight" for x in "AB"}
    config = adapter_config(LoraConfig(rank=2, alpha=8.0), published)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 8.0, [name])


def test_adapters_of_a_bfloat16_model_are_float32(tmp_path: Path) -> None:
    policy = adapted(save_model("llama3", tmp_path / "base"), dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    disturb(policy)
    expected = log_probs(policy.model)
    merged(policy).save(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert float((log_probs(loaded) - expected).abs().mean()) < 0.04  # the merged weights are rounded
