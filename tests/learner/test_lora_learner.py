"""A learner with adapters: its gradients, its steps, its checkpoints, and a local sampler that follows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONTEXT, VOCABULARY, save_model
from safetensors.torch import load_file
from torch import Tensor

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import LearnerConfig, LoraConfig, ModelConfig
from vcpo.environments.protocol import Episode
from vcpo.learner.checkpoint import load_checkpoint, save_checkpoint
from vcpo.learner.learner import Learner
from vcpo.policy.loading import for_sampling, load_policy
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.lora import merged, with_adapters
from vcpo.policy.packing import pack
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Group, Trajectory
from vcpo.weights import checksum, weight_tensors

torch.set_num_threads(1)

LORA = LoraConfig(rank=2, alpha=8.0)


def groups(seed: int) -> list[Group]:
    random = np.random.default_rng(seed)

    def member(i: int) -> Trajectory:
        length = int(random.integers(6, 16))
        mask = np.arange(length) > 2
        return Trajectory(
            tokens=random.integers(3, VOCABULARY, length).astype(np.int32),
            action_mask=mask,
            log_probs=np.where(mask, -3.4, 0).astype(np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
            reward=float(i % 2),
        )

    return [Group(g, g, tuple(member(i) for i in range(4))) for g in range(2)]


def model_config(**settings: Any) -> ModelConfig:
    return ModelConfig(context_length=CONTEXT, **settings)


def learner_of(folder: Path, algorithm: str = "vcpo", lora: LoraConfig = LORA, **settings: Any) -> Learner:
    policy = with_adapters(load_policy(str(folder), model_config(**settings)), lora, seed=1)
    config = LearnerConfig.model_validate({"learning_rate": 0.02, "max_grad_norm": 1e9})
    return Learner(policy, get_algorithm(algorithm), config)


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {n: p.grad for n, p in learner.policy.model.named_parameters() if p.grad is not None}


def frozen_bytes(learner: Learner) -> str:
    return checksum({n: p for n, p in learner.policy.model.named_parameters() if not p.requires_grad})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama3", {}),
    "tied": ("qwen2.5", {}),
    "Conv1D, tied": ("gpt2", {}),
    "capped": ("gemma2", {}),
    "bfloat16": ("qwen3", {"dtype": "bfloat16"}),
    "checkpointing, tied": ("smollm2", {"activation_checkpointing": True}),
    "checkpointing, bfloat16": ("llama3", {"activation_checkpointing": True, "dtype": "bfloat16"}),
    "eager": ("mistral", {"attention": "eager"}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_move_the_adapters_alone_and_a_local_sampler_follows(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    folder = save_model(family, tmp_path)
    learner = learner_of(folder, **settings)
    model = learner.policy.model
    frozen, adapters = frozen_bytes(learner), checksum(weight_tensors(model))
    for seed in range(2):
        metrics = learner.step(groups(seed))
        assert metrics["score_norm_mean"] > 0
    assert frozen_bytes(learner) == frozen
    assert checksum(weight_tensors(model)) != adapters

    replica = load_policy(str(folder), for_sampling(model_config(**settings)))
    replica = with_adapters(replica, LORA, seed=1)
    assert checksum(weight_tensors(replica.model)) == adapters  # as the learner began, before any publication
    sampler = LocalSampler(replica.model, CONTEXT)

    async def play() -> list[Trajectory]:
        assert await sampler.update(2, weight_tensors(model)) == checksum(weight_tensors(model))
        episodes = [Episode(sampler, seed=i, session=i, stop=frozenset()) for i in range(4)]
        for i, episode in enumerate(episodes):
            episode.observe(list(range(3, 6 + i)))
        for _ in range(2):
            await asyncio.gather(*(episode.act(6) for episode in episodes))
        return [episode.trajectory(0.0) for episode in episodes]

    played = asyncio.run(play())
    with torch.no_grad():
        expected = sampled_log_probs(model, pack(played))
    recorded = torch.cat([torch.from_numpy(t.log_probs[t.action_mask]) for t in played])
    difference = (recorded - expected).abs()
    if settings.get("dtype") == "bfloat16":
        assert float(difference.mean()) < 0.03
    else:
        assert float(difference.max()) < 2e-5


@pytest.mark.parametrize("family", ["llama3", "qwen2.5", "gpt2"])
def test_adapter_gradients_by_the_chain_rule_from_a_dense_model(family: str, tmp_path: Path) -> None:
    """W' = W + s B A with s = alpha / rank = 4: dB = s dW' Aᵀ, dA = s Bᵀ dW', where dW' is the gradient that
    a learner of the merged model finds (reinforce: no norms, so both have the same coefficients)."""
    folder = save_model(family, tmp_path / "base")
    adapted = learner_of(folder, "rloo")
    torch.manual_seed(4)
    for tensor in weight_tensors(adapted.policy.model).values():
        tensor += 0.2 * torch.randn_like(tensor)
    merged(adapted.policy).save(tmp_path / "merged")
    dense = learner_of(tmp_path / "merged", "rloo", LoraConfig())
    values = {n: t.clone() for n, t in weight_tensors(adapted.policy.model).items()}
    adapted.step(groups(1))
    dense.step(groups(1))
    found, whole = gradients(adapted), gradients(dense)
    assert found.keys() == values.keys()
    for name in {n.partition(".lora_")[0] for n in found}:
        dw = whole[f"{name}.weight"] if family != "gpt2" else whole[f"{name}.weight"].t()
        a, b = (f"{name}.lora_{x}.default.weight" for x in "AB")
        torch.testing.assert_close(found[b], 4.0 * dw @ values[a].t(), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found[a], 4.0 * values[b].t() @ dw, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_holds_the_adapters_and_resumes_to_the_bit(dtype: str, tmp_path: Path) -> None:
    folder = save_model("qwen2.5", tmp_path / "base")
    straight, interrupted = learner_of(folder, dtype=dtype), learner_of(folder, dtype=dtype)
    for seed in range(2):
        straight.step(groups(seed))
        interrupted.step(groups(seed))
    saved = save_checkpoint(tmp_path, interrupted, {})
    weights = load_file(saved / "weights.safetensors")
    assert weights.keys() == weight_tensors(straight.policy.model).keys()
    assert all(
        ".lora_" in name for name in load_file(saved / "optimizer.safetensors") if "torch_" not in name
    )
    resumed = learner_of(folder, dtype=dtype)
    load_checkpoint(saved, resumed)
    assert resumed.version == 2
    for learner in (straight, resumed):
        learner.step(groups(7))
    tensors = (weight_tensors(learner.policy.model) for learner in (straight, resumed))
    assert checksum(next(tensors)) == checksum(next(tensors))
