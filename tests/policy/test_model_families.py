"""Every family: loaded, packed, trained, sampled, saved and loaded again, its log-probs are those of
transformers in float64, one trajectory at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONTEXT, FAMILIES, VOCABULARY, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import LearnerConfig, ModelConfig
from vcpo.environments.protocol import Episode
from vcpo.learner.learner import Learner
from vcpo.policy.loading import Policy, for_sampling, load_policy
from vcpo.policy.log_probs import keeps_packed_apart, sampled_log_probs
from vcpo.policy.packing import pack
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Group, Trajectory
from vcpo.weights import checksum, weight_tensors

torch.set_num_threads(1)

TOLERANCE = 2e-5
"""float32 noise on log-probs of size 1 to 10; a wrong mask, position or cap costs 1e-2 and more."""
CONFIG = ModelConfig(context_length=CONTEXT)


def random_groups(seed: int, sizes: Sequence[int] = (3, 3)) -> list[Group]:
    random = np.random.default_rng(seed)
    groups = []
    for index, size in enumerate(sizes):
        members = []
        for member in range(size):
            length = int(random.integers(6, 20))
            mask = random.random(length) < 0.6
            mask[0], mask[-1] = False, True
            members.append(
                Trajectory(
                    tokens=random.integers(3, VOCABULARY, length).astype(np.int32),
                    action_mask=mask,
                    log_probs=np.where(mask, -3.4, 0).astype(np.float32),
                    versions=np.where(mask, 0, -1).astype(np.int32),
                    reward=float(member % 2),
                )
            )
        groups.append(Group(index, index, tuple(members)))
    return groups


def play(policy: Policy, sampler: LocalSampler, count: int = 6) -> list[Trajectory]:
    """Two turns of up to eight tokens: longer than every sliding window."""

    async def one(number: int) -> Trajectory:
        episode = Episode(sampler, seed=number, session=number, stop=policy.stop)
        episode.observe(policy.codec.encode_prompt("ab[cd] efg"[: 3 + number]))
        for _ in range(2):
            await episode.act(8)
            episode.observe(policy.codec.encode(" go on"))
        sampler.release(number)
        return episode.trajectory(0.0)

    async def together() -> list[Trajectory]:
        return await asyncio.gather(*map(one, range(count)))

    return asyncio.run(together())


def learner_log_probs(policy: Policy, trajectories: Sequence[Trajectory], *, packed: bool = True) -> Tensor:
    with torch.no_grad():
        return sampled_log_probs(policy.model, pack(trajectories, packed=packed))


@torch.no_grad()
def oracle_log_probs(folder: Path, trajectories: Sequence[Trajectory]) -> Tensor:
    """float64, eager attention, each trajectory alone, without position ids, log-softmax written out."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    results = []
    for t in trajectories:
        ids = torch.from_numpy(t.tokens.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        places = np.flatnonzero(t.action_mask)
        results += [logits[p - 1, ids[p]] - logits[p - 1].logsumexp(-1) for p in places]
    return torch.stack(results).float()


def learner_of(policy: Policy) -> Learner:
    settings = LearnerConfig.model_validate({"learning_rate": 0.01, "score_norms": "exact"})
    return Learner(policy, get_algorithm("vcpo"), settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_folder_through_a_step_to_the_folder(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "first")
    policy = load_policy(str(folder), CONFIG)
    trajectories = [t for group in random_groups(1) for t in group.trajectories]
    assert keeps_packed_apart(policy.model)
    for packed in (True, False):
        torch.testing.assert_close(
            learner_log_probs(policy, trajectories, packed=packed),
            oracle_log_probs(folder, trajectories),
            rtol=0,
            atol=TOLERANCE,
        )

    learner, before = learner_of(policy), checksum(weight_tensors(policy.model))
    learner.step(random_groups(2))
    replica = load_policy(str(folder), for_sampling(CONFIG))
    sampler = LocalSampler(replica.model, replica.context_length)
    served = asyncio.run(sampler.update(1, weight_tensors(policy.model)))
    assert served == checksum(weight_tensors(policy.model)) != before

    played = play(policy, sampler)
    recorded = torch.cat([torch.from_numpy(t.log_probs[t.action_mask]) for t in played])
    torch.testing.assert_close(recorded, learner_log_probs(policy, played), rtol=0, atol=TOLERANCE)

    policy.save(tmp_path / "second")
    again = load_policy(str(tmp_path / "second"), CONFIG)
    assert checksum(weight_tensors(again.model)) == served
    torch.testing.assert_close(
        recorded, oracle_log_probs(tmp_path / "second", played), rtol=0, atol=TOLERANCE
    )
    assert (again.stop, again.context_length) == (policy.stop, CONTEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_policy_is_near_the_oracle(family: str, tmp_path: Path) -> None:
    """Rounding to 8 bits moves logits of size 1 to 4 by 2^-8 of themselves, and every layer adds to it."""
    folder = save_model(family, tmp_path)
    policy = load_policy(str(folder), replace_settings(dtype="bfloat16"))
    trajectories = [t for group in random_groups(1) for t in group.trajectories]
    log_probs = learner_log_probs(policy, trajectories)
    assert log_probs.dtype == torch.float32
    assert float((log_probs - oracle_log_probs(folder, trajectories)).abs().mean()) < 0.04


def replace_settings(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate(CONFIG.model_dump() | changes)


def gradients_of_a_step(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    learner = learner_of(load_policy(str(folder), config))
    learner.step(random_groups(2))
    return {n: p.grad for n, p in learner.policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2.5", "gemma3", "gpt2"])
@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, {"attention": "eager"}])
def test_a_step_is_the_same_with(change: dict[str, object], family: str, tmp_path: Path) -> None:
    """GPT-2 has dropout, which must stay off while its layers are computed again."""
    folder = save_model(family, tmp_path)
    plain, changed = (gradients_of_a_step(folder, c) for c in (CONFIG, replace_settings(**change)))
    assert plain.keys() == changed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(changed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointed_layers_run_again_in_the_backward_pass_and_nowhere_else(tmp_path: Path) -> None:
    policy = load_policy(str(save_model("llama3", tmp_path)), replace_settings(activation_checkpointing=True))
    calls: list[bool] = []
    model: torch.nn.Module = policy.model
    first = model.get_submodule("model.layers.0.mlp")
    first.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trajectories = list(random_groups(1)[0].trajectories)
    sampled_log_probs(policy.model, pack(trajectories)).sum().backward()
    assert calls == [True, True]
    learner_log_probs(policy, trajectories)
    assert calls == [True, True, False]
    assert not first.training


def test_gemma_2_caps_attention_in_the_learner_and_in_the_sampler(tmp_path: Path) -> None:
    """sdpa cannot: transformers would drop the cap there; without it log-probs are others."""
    folder = save_model("gemma2", tmp_path)
    policy = load_policy(str(folder), CONFIG)
    assert policy.model.config._attn_implementation == "eager"
    trajectories = list(random_groups(1)[0].trajectories)
    uncapped = replace(policy, model=load_policy(str(folder), CONFIG).model)
    for module in uncapped.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            setattr(module, "attn_logit_softcapping", None)  # noqa: B010
    difference = learner_log_probs(policy, trajectories) - learner_log_probs(uncapped, trajectories)
    assert float(difference.abs().max()) > 0.01
