"""What the local sampler draws: the right distribution, the same tokens whatever else is in the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vcpo.config import SamplerConfig
from vcpo.samplers.local import LocalSampler
from vcpo.samplers.protocol import Completion
from vcpo.samplers.random import uniforms

torch.set_num_threads(1)

VOCABULARY = 11
CONTEXT = 64
NEVER = frozenset[int]()
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def disturbed(model: PreTrainedModel, scale: float = 0.3) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model.eval()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return disturbed(LlamaForCausalLM(LlamaConfig(**COMMON)))


def gemma() -> PreTrainedModel:
    torch.manual_seed(1)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**COMMON, layer_types=kinds, sliding_window=4, query_pre_attn_scalar=8)
    return disturbed(Gemma3ForCausalLM(config))


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def generate_all(
    sampler: LocalSampler,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int,
    stop: frozenset[int] = NEVER,
    greedy: bool = False,
) -> list[Completion]:
    async def together() -> list[Completion]:
        calls = (
            sampler.generate(p, max_tokens=max_tokens, stop=stop, seed=s, greedy=greedy)
            for p, s in zip(prompts, seeds, strict=True)
        )
        return await asyncio.gather(*calls)

    return asyncio.run(together())


@torch.no_grad()
def next_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]


def test_tokens_do_not_depend_on_the_rest_of_the_batch() -> None:
    model, prompt = llama(), random_tokens(5, 0)
    (alone,) = generate_all(LocalSampler(model, CONTEXT), [prompt], [77], max_tokens=30)
    others = [random_tokens(1 + i, i) for i in range(20)]
    for slots in (256, 3):
        sampler = LocalSampler(model, CONTEXT, SamplerConfig(slots=slots, prefill_tokens=32))
        crowd = generate_all(sampler, [*others, prompt], [*range(20), 77], max_tokens=30)
        assert crowd[-1].tokens == alone.tokens


def test_a_turn_continues_the_random_numbers_of_its_position() -> None:
    """Ten tokens at once, or one a turn in a session: the same ten."""
    model, prompt = llama(), random_tokens(4, 1)
    (whole,) = generate_all(LocalSampler(model, CONTEXT), [prompt], [5], max_tokens=10)

    async def one_at_a_time() -> list[int]:
        sampler, tokens = LocalSampler(model, CONTEXT), list(prompt)
        for _ in range(10):
            step = await sampler.generate(tokens, max_tokens=1, stop=NEVER, seed=5, session=0)
            tokens += step.tokens
        return tokens[len(prompt) :]

    assert asyncio.run(one_at_a_time()) == whole.tokens


def test_each_token_is_the_inverse_of_the_cumulative_distribution_at_its_uniform() -> None:
    """Twin in float64: the first token whose cumulative probability exceeds u(seed, position)."""
    model, prompt, seed = llama(), random_tokens(3, 2), 123456789012345678
    (completion,) = generate_all(LocalSampler(model, CONTEXT), [prompt], [seed], max_tokens=40)
    tokens = list(prompt)
    for token in completion.tokens:
        (u,) = uniforms(np.array([seed], np.uint64), np.array([len(tokens)], np.uint64))
        cumulative = next_logits(model, tokens).double().softmax(-1).cumsum(-1)
        assert token == int((cumulative <= u).sum())
        tokens.append(token)


@pytest.mark.parametrize("prompt_seed", [0, 1])
def test_frequencies_are_the_softmax_probabilities(prompt_seed: int) -> None:
    """Pearson's χ² of 4000 draws, 10 degrees of freedom: 29.6 is passed once in a thousand."""
    model, prompt, draws = llama(), random_tokens(6, prompt_seed), 4000
    completions = generate_all(LocalSampler(model, CONTEXT), [prompt] * draws, range(draws), max_tokens=1)
    counts = np.bincount([c.tokens[0] for c in completions], minlength=VOCABULARY)
    expected = draws * next_logits(model, prompt).double().softmax(-1).numpy()
    assert expected.min() > 5  # or χ² would not be χ²
    assert float(((counts - expected) ** 2 / expected).sum()) < 29.6


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """This seed draws u = 1 - 1.2e-9 at position 4, which is 1 in float32."""
    seed = 74720863
    (u,) = uniforms(np.array([seed], np.uint64), np.array([4], np.uint64))
    assert np.float32(u) == 1.0
    assert u < 1.0
    model = llama()
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    with torch.no_grad():
        head.bias[-3:] = -torch.inf
    (completion,) = generate_all(LocalSampler(model, CONTEXT), [random_tokens(4, 0)], [seed], max_tokens=1)
    assert completion.tokens == [VOCABULARY - 4]
    assert np.isfinite(completion.log_probs[0])


@pytest.mark.parametrize("build", [llama, gemma])
def test_greedy_is_the_argmax_of_a_plain_forward_and_plain_generate(
    build: Callable[[], PreTrainedModel],
) -> None:
    model, prompts = build(), [random_tokens(n, n) for n in (1, 4, 9)]
    completions = generate_all(LocalSampler(model, CONTEXT), prompts, [0, 1, 2], max_tokens=25, greedy=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(prompt)
        for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
            log_probs = next_logits(model, tokens).log_softmax(-1)
            assert token == int(log_probs.argmax())
            assert log_prob == pytest.approx(
                float(log_probs[token]), abs=2e-5
            )  # at temperature 1 all the same
            tokens.append(token)
        ids = torch.tensor([prompt])
        plain = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25
        )
        assert plain[0].tolist() == tokens


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    model, prompt = llama(), random_tokens(5, 3)

    async def both() -> tuple[Completion, Completion]:
        sampler = LocalSampler(model, CONTEXT)
        return await asyncio.gather(
            sampler.generate(prompt, max_tokens=12, stop=NEVER, seed=1, greedy=True),
            sampler.generate(prompt, max_tokens=12, stop=NEVER, seed=1),
        )

    greedy, sampled = asyncio.run(both())
    (greedy_alone,) = generate_all(LocalSampler(model, CONTEXT), [prompt], [1], max_tokens=12, greedy=True)
    (sampled_alone,) = generate_all(LocalSampler(model, CONTEXT), [prompt], [1], max_tokens=12)
    assert (greedy.tokens, sampled.tokens) == (greedy_alone.tokens, sampled_alone.tokens)
    assert greedy.tokens != sampled.tokens


def test_a_stop_token_ends_the_completion_and_belongs_to_it() -> None:
    model, prompt = llama(), random_tokens(5, 4)
    (free,) = generate_all(LocalSampler(model, CONTEXT), [prompt], [8], max_tokens=20)
    stop = free.tokens[6]
    end = free.tokens.index(stop) + 1
    (stopped,) = generate_all(
        LocalSampler(model, CONTEXT), [prompt], [8], max_tokens=20, stop=frozenset({stop})
    )
    assert stopped.tokens == free.tokens[:end]
    assert (stopped.finish, free.finish, len(free.tokens)) == ("stop", "length", 20)
    assert len(stopped.log_probs) == len(stopped.versions) == end
