"""New weights: between tokens (keep) or between episodes (drain), no token stamped with another's version."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vcpo.config import SamplerConfig
from vcpo.errors import ModelError
from vcpo.samplers.local import LocalSampler
from vcpo.samplers.protocol import Completion
from vcpo.weights import checksum, weight_tensors

torch.set_num_threads(1)

VOCABULARY = 13
CONTEXT = 64
NEVER = frozenset[int]()
DRAIN = SamplerConfig(update="drain")


def llama(seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**(common | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


@torch.no_grad()
def plain_log_probs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[T-1] log π of tokens 1.. by one forward without cache."""
    ids = torch.tensor([list(tokens)])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def assert_stamped_right(models: Sequence[PreTrainedModel], prompt: Sequence[int], done: Completion) -> None:
    """Every log-prob is that of the version it is stamped with; the other version's differs widely."""
    by_version = torch.stack([plain_log_probs(m, [*prompt, *done.tokens])[len(prompt) - 1 :] for m in models])
    stamped = by_version[torch.tensor(done.versions), torch.arange(len(done.tokens))]
    torch.testing.assert_close(torch.tensor(done.log_probs), stamped, rtol=0, atol=2e-5)
    assert float((by_version[0] - by_version[-1]).abs().mean()) > 0.1


async def until(sampler: LocalSampler, sampled_tokens: int) -> None:
    while sampler.sampled_tokens < sampled_tokens:
        await asyncio.sleep(0)


async def settle() -> None:
    """Give the engine many more ticks than anything needs that is not held back."""
    for _ in range(200):
        await asyncio.sleep(0)


def test_keep_swaps_between_two_tokens_and_leaves_no_stale_keys() -> None:
    models = [llama(0), llama(1), llama(2)]
    prompts = [random_tokens(5, 0)] * 3 + [random_tokens(n, n) for n in (1, 8, 13)]

    async def run() -> list[Completion]:
        sampler = LocalSampler(llama(0), CONTEXT, SamplerConfig(slots=5))  # one request waits for a slot
        calls = [
            asyncio.ensure_future(sampler.generate(p, max_tokens=12 + i, stop=NEVER, seed=i))
            for i, p in enumerate(prompts)
        ]
        for version in (1, 2):
            await until(sampler, 20 * version)
            assert await sampler.update(version, weight_tensors(models[version])) == checksum(
                weight_tensors(models[version])
            )
            assert sampler.version == version
        return await asyncio.gather(*calls)

    completions = asyncio.run(run())
    for prompt, completion in zip(prompts, completions, strict=True):
        assert_stamped_right(models, prompt, completion)
        assert completion.versions == sorted(completion.versions)
    assert completions[0].versions[0] == 0
    assert set(completions[0].versions) == {0, 1, 2}


def test_keep_refeeds_a_session_that_was_idle_during_the_update() -> None:
    models, prompt = [llama(0), llama(1)], random_tokens(9, 0)

    async def run() -> tuple[Completion, Completion]:
        sampler = LocalSampler(llama(0), CONTEXT)
        first = await sampler.generate(prompt, max_tokens=4, stop=NEVER, seed=0, session=0)
        await sampler.update(1, weight_tensors(models[1]))
        longer = [*prompt, *first.tokens, 5]
        return first, await sampler.generate(longer, max_tokens=4, stop=NEVER, seed=0, session=0)

    first, second = asyncio.run(run())
    assert_stamped_right(models, prompt, first)
    assert_stamped_right(models, [*prompt, *first.tokens, 5], second)
    assert (first.versions, second.versions) == ([0] * 4, [1] * 4)


def test_keep_during_a_prompt_fed_in_pieces_feeds_it_anew() -> None:
    models, prompt = [llama(0), llama(1)], random_tokens(40, 0)

    async def run() -> Completion:
        sampler = LocalSampler(llama(0), CONTEXT, SamplerConfig(prefill_tokens=6))
        call = asyncio.ensure_future(sampler.generate(prompt, max_tokens=5, stop=NEVER, seed=0))
        for _ in range(4):  # some pieces fed, the last not yet
            await asyncio.sleep(0)
        assert sampler.sampled_tokens == 0
        await sampler.update(1, weight_tensors(models[1]))
        return await call

    completion = asyncio.run(run())
    assert completion.versions == [1] * 5
    assert_stamped_right(models, prompt, completion)


def test_drain_ends_started_episodes_under_their_version_and_holds_new_ones() -> None:
    models, prompt, other = [llama(0), llama(1)], random_tokens(6, 0), random_tokens(3, 1)

    async def run() -> None:
        sampler = LocalSampler(llama(0), CONTEXT, DRAIN)
        first = await sampler.generate(prompt, max_tokens=3, stop=NEVER, seed=0, session=0)
        update = asyncio.ensure_future(sampler.update(1, weight_tensors(models[1])))
        await settle()
        newcomer = asyncio.ensure_future(sampler.generate(other, max_tokens=4, stop=NEVER, seed=1, session=1))
        anonymous = asyncio.ensure_future(sampler.generate(other, max_tokens=4, stop=NEVER, seed=2))
        longer = [*prompt, *first.tokens, 4]
        second = await sampler.generate(longer, max_tokens=3, stop=NEVER, seed=0, session=0)
        await settle()
        assert not (update.done() or newcomer.done() or anonymous.done())
        assert sampler.version == 0
        sampler.release(0)
        assert await update == checksum(weight_tensors(models[1]))
        assert (first.versions, second.versions) == ([0] * 3, [0] * 3)
        assert_stamped_right(models, longer, second)
        for late in (await newcomer, await anonymous):
            assert late.versions == [1] * 4
            assert_stamped_right(models, other, late)

    asyncio.run(run())


def test_a_session_released_before_its_call_was_admitted_is_fed_anew_after_an_update() -> None:
    models, prompt = [llama(0), llama(1)], random_tokens(9, 0)

    async def run() -> Completion:
        sampler = LocalSampler(llama(0), CONTEXT)
        await sampler.generate(prompt, max_tokens=1, stop=NEVER, seed=0, session=0)
        call = asyncio.ensure_future(sampler.generate(prompt, max_tokens=5, stop=NEVER, seed=0, session=0))
        await asyncio.sleep(0)  # the call is in the queue, the engine has not seen it
        sampler.release(0)
        await sampler.update(1, weight_tensors(models[1]))
        return await call

    completion = asyncio.run(run())
    assert completion.versions == [1] * 5
    assert_stamped_right(models, prompt, completion)


def test_drain_waits_for_a_request_without_session_and_not_for_idle_engines() -> None:
    models, prompt = [llama(0), llama(1), llama(2)], random_tokens(6, 0)

    async def run() -> None:
        sampler = LocalSampler(llama(0), CONTEXT, DRAIN)
        await sampler.update(1, weight_tensors(models[1]))  # nothing runs: at once
        call = asyncio.ensure_future(sampler.generate(prompt, max_tokens=20, stop=NEVER, seed=0))
        await until(sampler, 5)
        await sampler.update(2, weight_tensors(models[2]))
        completion = await call
        assert completion.versions == [1] * 20
        assert_stamped_right(models, prompt, completion)

    asyncio.run(run())


def test_an_update_that_is_given_up_while_draining_lets_new_sessions_in_again() -> None:
    model, prompt = llama(0), random_tokens(6, 0)

    async def run() -> Completion:
        sampler = LocalSampler(model, CONTEXT, DRAIN)
        await sampler.generate(prompt, max_tokens=2, stop=NEVER, seed=0, session=0)
        update = asyncio.ensure_future(sampler.update(1, weight_tensors(llama(1))))
        newcomer = asyncio.ensure_future(
            sampler.generate(prompt, max_tokens=2, stop=NEVER, seed=0, session=1)
        )
        await settle()
        assert not newcomer.done()
        update.cancel()
        return await asyncio.wait_for(newcomer, 10)

    completion = asyncio.run(run())
    assert completion.versions == [0, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_an_update_reaches_embedding_and_head(tied: bool) -> None:
    new, served = llama(1, tie_word_embeddings=tied), llama(0, tie_word_embeddings=tied)
    names = weight_tensors(new).keys()
    assert ("lm_head.weight" in names) == (not tied)
    prompt = random_tokens(7, 0)

    async def run() -> Completion:
        sampler = LocalSampler(served, CONTEXT)
        assert await sampler.update(4, weight_tensors(new)) == checksum(weight_tensors(new))
        return await sampler.generate(prompt, max_tokens=10, stop=NEVER, seed=0)

    completion = asyncio.run(run())
    expected = plain_log_probs(new, [*prompt, *completion.tokens])[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=2e-5)
    assert completion.versions == [4] * 10


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
        ({"vocab_size": VOCABULARY + 1}, "embed_tokens.weight has shape"),
        ({"intermediate_size": 32}, "mlp.*has shape"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(
    other: dict[str, object], named: str
) -> None:
    model = llama(0)
    before = checksum(weight_tensors(model))
    sampler = LocalSampler(model, CONTEXT)
    with pytest.raises(ModelError, match=named):
        asyncio.run(sampler.update(1, weight_tensors(llama(1, **other))))
    assert sampler.version == 0
    assert checksum(weight_tensors(model)) == before
