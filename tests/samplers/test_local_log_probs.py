"""The local sampler's behaviour log-probs are those of a plain forward and of the learner's packed rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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

from vcpo.config import SamplerConfig
from vcpo.environments.protocol import Episode
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.packing import pack
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Trajectory

torch.set_num_threads(1)

VOCABULARY = 17
CONTEXT = 96
NEVER = frozenset[int]()
TOLERANCE = 2e-5
"""float32 noise on log-probs of size 1 to 10; the wrong mask or position costs 1e-2 and more."""

Turn = tuple[int, list[int]]
"""How many tokens to sample, then what to observe."""


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Far from the initial near-uniform policy, norms and biases included, so that mistakes show."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter += scale * torch.randn_like(parameter)
    return model.eval()


def build(
    kind: Callable[..., PreTrainedModel], config: Callable[..., Any], **changes: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
    }
    return disturbed(kind(config(**(common | changes))))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
    }
    return disturbed(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))


def llama(**changes: Any) -> PreTrainedModel:
    return build(LlamaForCausalLM, LlamaConfig, **changes)


MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-grouped-queries": lambda: llama(num_key_value_heads=2),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config),
    "qwen2-mixed": lambda: build(
        Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=5, layer_types=MIXED
    ),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config, num_key_value_heads=2),
    "gemma3-mixed": lambda: build(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=5, layer_types=MIXED),
    "gemma3-full": lambda: build(Gemma3ForCausalLM, Gemma3TextConfig, layer_types=["full_attention"] * 3),
    "mistral-sliding": lambda: build(MistralForCausalLM, MistralConfig, sliding_window=6),
    "gpt2": gpt2,
}


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def ragged_scripts(episodes: int) -> list[tuple[list[int], list[Turn]]]:
    """Prompts of 1 to 13 tokens, up to 5 turns of 1 to 4 tokens, observations of 0 to 3 tokens."""
    random = np.random.default_rng(5)
    return [
        (
            random_tokens(int(random.integers(1, 14)), seed),
            [
                (int(random.integers(1, 5)), random_tokens(int(random.integers(0, 4)), 100 * seed + turn))
                for turn in range(int(random.integers(1, 6)))
            ],
        )
        for seed in range(episodes)
    ]


async def play(
    sampler: LocalSampler, number: int, prompt: Sequence[int], turns: Sequence[Turn]
) -> Trajectory:
    episode = Episode(sampler, seed=number, session=number, stop=frozenset((2,)))
    episode.observe(prompt)
    for max_tokens, observation in turns:
        await episode.act(max_tokens, NEVER)
        episode.observe(observation)
    sampler.release(number)
    return episode.trajectory(0.0)


def play_all(sampler: LocalSampler, scripts: Sequence[tuple[list[int], list[Turn]]]) -> list[Trajectory]:
    async def together() -> list[Trajectory]:
        episodes = (play(sampler, i, prompt, turns) for i, (prompt, turns) in enumerate(scripts))
        return await asyncio.gather(*episodes)

    return asyncio.run(together())


@torch.no_grad()
def plain_log_probs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """log π of tokens 1.. of one sequence by one forward without cache."""
    ids = torch.tensor([list(tokens)])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def recorded_log_probs(trajectories: Sequence[Trajectory]) -> Tensor:
    return torch.cat([torch.from_numpy(t.log_probs[t.action_mask]) for t in trajectories])


def assert_exact(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> None:
    """Behaviour log-probs against one plain forward each, and against the learner's packed rows."""
    recorded = [torch.from_numpy(t.log_probs)[torch.from_numpy(t.action_mask)] for t in trajectories]
    alone = [
        plain_log_probs(model, t.tokens.tolist())[torch.from_numpy(t.action_mask)[1:]] for t in trajectories
    ]
    with torch.no_grad():
        learner = sampled_log_probs(model, pack(trajectories))
    torch.testing.assert_close(torch.cat(recorded), torch.cat(alone), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(torch.cat(recorded), learner, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_behaviour_log_probs_of_multi_turn_episodes_are_the_learners(name: str) -> None:
    model = MODELS[name]()
    trajectories = play_all(LocalSampler(model, CONTEXT), ragged_scripts(12))
    assert max(len(t.tokens) for t in trajectories) > 20  # beyond every sliding window
    assert_exact(model, trajectories)


@pytest.mark.parametrize("name", ["llama", "gemma3-mixed", "mistral-sliding"])
def test_sessions_that_lose_their_slot_come_back_right(name: str) -> None:
    model = MODELS[name]()
    sampler = LocalSampler(model, CONTEXT, SamplerConfig(slots=3))
    trajectories = play_all(sampler, ragged_scripts(11))
    assert_exact(model, trajectories)
    roomy = play_all(LocalSampler(model, CONTEXT), ragged_scripts(11))
    assert [t.tokens.tolist() for t in trajectories] == [t.tokens.tolist() for t in roomy]


def test_an_idle_session_is_evicted_and_fed_again() -> None:
    model = llama()
    sampler = LocalSampler(model, CONTEXT, SamplerConfig(slots=2))

    async def in_turn() -> list[Trajectory]:
        episodes = [Episode(sampler, seed=i, session=i, stop=frozenset((2,))) for i in range(5)]
        for i, episode in enumerate(episodes):
            episode.observe(random_tokens(3 + i, i))
        for turn in range(3):
            for i, episode in enumerate(episodes):  # five sessions, one after the other, in two slots
                await episode.act(2, NEVER)
                episode.observe(random_tokens(1 + turn, 10 * i + turn))
        return [episode.trajectory(0.0) for episode in episodes]

    assert_exact(model, asyncio.run(in_turn()))


@pytest.mark.parametrize("name", ["llama-grouped-queries", "gemma3-mixed", "mistral-sliding", "gpt2"])
@pytest.mark.parametrize("prefill_tokens", [1, 7])
def test_prompts_longer_than_the_prefill_budget_are_fed_in_pieces(name: str, prefill_tokens: int) -> None:
    model = MODELS[name]()
    sampler = LocalSampler(model, CONTEXT, SamplerConfig(prefill_tokens=prefill_tokens))
    scripts = [(random_tokens(n, n), [(3, random_tokens(9, 50 + n)), (2, [])]) for n in (40, 8, 41, 15)]
    assert_exact(model, play_all(sampler, scripts))


@pytest.mark.parametrize("prefill_tokens", [4, 8192])
def test_the_members_of_a_group_share_their_prompt(prefill_tokens: int) -> None:
    """Two groups of six, one prompt a prefix of the other, and a lone episode beside them."""
    model = llama()
    sampler = LocalSampler(model, CONTEXT, SamplerConfig(prefill_tokens=prefill_tokens))
    prompt, turns = random_tokens(9, 0), [(2, [4, 5]), (3, [6]), (1, [])]
    scripts = [(prompt, turns)] * 6 + [(prompt[:8], turns)] * 6 + [(random_tokens(9, 1), turns)]
    trajectories = play_all(sampler, scripts)
    assert_exact(model, trajectories)
    assert len({tuple(t.tokens) for t in trajectories[:6]}) > 1  # shared prompt, own random numbers


def test_a_shared_prompt_reaches_slots_that_hold_other_conversations() -> None:
    """Slots used before by longer sequences are overwritten, whichever member of the group leads."""
    model = llama()
    sampler = LocalSampler(model, CONTEXT, SamplerConfig(slots=4))
    play_all(sampler, [(random_tokens(30, i), [(5, [])]) for i in range(4)])
    assert_exact(model, play_all(sampler, [(random_tokens(6, 9), [(4, [3, 3]), (4, [])])] * 7))


def test_log_probs_of_a_bfloat16_policy_are_near_its_learners() -> None:
    """bfloat16 rounds logits of size 1 to 4 by 2^-9 to 2^-8 and every layer adds to it: 0.008 on average."""
    model = llama().bfloat16()
    trajectories = play_all(LocalSampler(model, CONTEXT), ragged_scripts(6))
    with torch.no_grad():
        learner = sampled_log_probs(model, pack(trajectories))
    assert learner.dtype == torch.float32
    assert float((recorded_log_probs(trajectories) - learner).abs().mean()) < 0.02
