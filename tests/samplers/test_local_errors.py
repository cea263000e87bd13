"""What goes wrong at the local sampler, and that it can be used afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from vcpo.config import SamplerConfig
from vcpo.errors import EnvironmentFailure, ModelError, NonFiniteError, VcpoError, WorkerError
from vcpo.samplers.local import LocalSampler
from vcpo.samplers.protocol import Completion
from vcpo.weights import weight_tensors

torch.set_num_threads(1)

VOCABULARY = 13
CONTEXT = 32
NEVER = frozenset[int]()


def llama(seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


@torch.no_grad()
def assert_exact(model: PreTrainedModel, prompt: Sequence[int], completion: Completion) -> None:
    ids = torch.tensor([[*prompt, *completion.tokens]])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=2e-5)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_broken_policy_fails_every_waiting_call_and_a_good_one_serves_again() -> None:
    """NaN keys and values must not outlive it: a mask hides them from the softmax, but 0 · NaN is NaN."""
    good = llama()
    broken = {name: torch.full_like(t, torch.nan) for name, t in weight_tensors(good).items()}
    repaired = {name: t.clone() for name, t in weight_tensors(good).items()}
    longer, shorter = (
        [random_tokens(n, n) for n in lengths] for lengths in [(17, 20, 19, 18), (9, 16, 10, 12)]
    )

    async def run() -> list[Completion]:
        sampler = LocalSampler(llama(1), CONTEXT, SamplerConfig(slots=3))

        def calls(prompts: list[list[int]]) -> list[Coroutine[Any, Any, Completion]]:
            numbered = enumerate(prompts)
            return [sampler.generate(p, max_tokens=6, stop=NEVER, seed=i, session=i) for i, p in numbered]

        await asyncio.gather(*calls(longer))
        await sampler.update(3, broken)
        for outcome in await asyncio.gather(*calls(longer), return_exceptions=True):
            assert isinstance(outcome, NonFiniteError)
            assert "policy version 3" in str(outcome)
        await sampler.update(4, repaired)
        return await asyncio.gather(*calls(shorter))

    for prompt, completion in zip(shorter, asyncio.run(run()), strict=True):
        assert_exact(good, prompt, completion)
        assert completion.versions == [4] * 6


def test_a_forward_that_raises_leaves_no_trust_in_what_it_should_have_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompt = llama(), random_tokens(9, 0)

    async def run() -> Completion:
        sampler = LocalSampler(model, CONTEXT)
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(WorkerError, match="the local sampler failed: MemoryError: no room"):
                await sampler.generate(prompt, max_tokens=3, stop=NEVER, seed=0, session=0)
        return await sampler.generate(prompt, max_tokens=3, stop=NEVER, seed=0, session=0)

    assert_exact(model, prompt, asyncio.run(run()))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "empty sequence"),
        ([3] * 30, 3, r"30 \+ 3 tokens do not fit in the context of 32"),
        ([3] * 33, 1, "do not fit"),
        ([3], 0, "at least one token"),
        ([3, VOCABULARY], 4, "token 13 is not in the model's vocabulary of 13"),
        ([-1, 3], 4, "token -1 is not in"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], max_tokens: int, message: str) -> None:
    sampler = LocalSampler(llama(), CONTEXT)
    with pytest.raises(EnvironmentFailure, match=message):
        asyncio.run(sampler.generate(prompt, max_tokens=max_tokens, stop=NEVER, seed=0))


def test_a_context_filled_to_the_last_token_is_exact() -> None:
    model, prompt = llama(), random_tokens(20, 0)
    sampler = LocalSampler(model, CONTEXT)
    completion = asyncio.run(sampler.generate(prompt, max_tokens=CONTEXT - 20, stop=NEVER, seed=0))
    assert len(completion.tokens) == CONTEXT - 20
    assert_exact(model, prompt, completion)


def test_a_session_takes_one_call_at_a_time() -> None:
    model, prompt = llama(), random_tokens(4, 0)

    async def run() -> Completion:
        sampler = LocalSampler(model, CONTEXT)
        first = asyncio.ensure_future(sampler.generate(prompt, max_tokens=6, stop=NEVER, seed=0, session=7))
        await asyncio.sleep(0)
        with pytest.raises(VcpoError, match="session 7 is already generating"):
            await sampler.generate(prompt, max_tokens=6, stop=NEVER, seed=0, session=7)
        return await first

    assert_exact(model, prompt, asyncio.run(run()))


@pytest.mark.parametrize("started", [True, False])
def test_a_cancelled_call_frees_its_place(started: bool) -> None:
    """With one slot: were it lost, or the queue blocked, the call after would wait for ever."""
    model, prompt = llama(), random_tokens(4, 0)

    async def run() -> Completion:
        sampler = LocalSampler(model, CONTEXT, SamplerConfig(slots=1))
        running = asyncio.ensure_future(sampler.generate([3], max_tokens=31, stop=NEVER, seed=0))
        waiting = asyncio.ensure_future(sampler.generate([4], max_tokens=31, stop=NEVER, seed=0, session=1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        (running if started else waiting).cancel()
        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [isinstance(o, asyncio.CancelledError) for o in outcomes] == [started, not started]
        return await asyncio.wait_for(
            sampler.generate(prompt, max_tokens=6, stop=NEVER, seed=0, session=1), timeout=30
        )

    assert_exact(model, prompt, asyncio.run(run()))


def test_a_session_cancelled_in_mid_turn_goes_on_right() -> None:
    model, prompt = llama(), random_tokens(6, 0)

    async def run() -> Completion:
        sampler = LocalSampler(model, CONTEXT)
        call = asyncio.ensure_future(sampler.generate(prompt, max_tokens=20, stop=NEVER, seed=0, session=0))
        while sampler.sampled_tokens < 5:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return await sampler.generate([*prompt, 5], max_tokens=8, stop=NEVER, seed=3, session=0)

    assert_exact(model, [*prompt, 5], asyncio.run(run()))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda t: [*t[:2], 3 + t[2] % 9, *t[3:], 5], id="one-token"),
        pytest.param(lambda t: t[:5], id="cut"),
        pytest.param(lambda t: t, id="same"),
        pytest.param(lambda t: [*t[4:], 5, 6], id="shifted"),
        pytest.param(lambda t: [3], id="another"),
    ],
)
def test_a_session_whose_history_was_changed_is_still_exact(changed: Any) -> None:
    model, prompt = llama(), random_tokens(8, 0)

    async def run() -> tuple[list[int], Completion]:
        sampler = LocalSampler(model, CONTEXT)
        first = await sampler.generate(prompt, max_tokens=4, stop=NEVER, seed=0, session=0)
        history = changed([*prompt, *first.tokens])
        return history, await sampler.generate(history, max_tokens=6, stop=NEVER, seed=1, session=0)

    assert_exact(model, *asyncio.run(run()))


def test_a_released_session_begins_anew_and_unknown_ones_are_ignored() -> None:
    model, prompt = llama(), random_tokens(8, 0)

    async def run() -> Completion:
        sampler = LocalSampler(model, CONTEXT, SamplerConfig(slots=1))
        running = asyncio.ensure_future(sampler.generate([3, 4], max_tokens=9, stop=NEVER, seed=0, session=0))
        await settle()
        sampler.release(0)  # while it generates: the call ends in peace, the name is free
        sampler.release(99)
        again = await sampler.generate(prompt, max_tokens=6, stop=NEVER, seed=0, session=0)
        assert len((await running).tokens) == 9
        return again

    assert_exact(model, prompt, asyncio.run(run()))


def test_closing_cancels_the_calls_still_waiting() -> None:
    async def run() -> list[Any]:
        sampler = LocalSampler(llama(), CONTEXT, SamplerConfig(slots=1))
        calls = [
            asyncio.ensure_future(sampler.generate([3], max_tokens=31, stop=NEVER, seed=i)) for i in range(3)
        ]
        await settle()
        await sampler.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(outcome) for outcome in asyncio.run(run())] == [asyncio.CancelledError] * 3


def test_one_sampler_serves_one_event_loop_after_another() -> None:
    model, prompt = llama(), random_tokens(5, 0)
    sampler = LocalSampler(model, CONTEXT)
    for seed in range(3):
        completion = asyncio.run(sampler.generate(prompt, max_tokens=4, stop=NEVER, seed=seed, session=0))
        assert_exact(model, prompt, completion)


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(
            lambda: tiny(MambaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=1, state_size=4)),
            "MambaForCausalLM.*linear_attention",
            id="recurrent",
        ),
        pytest.param(
            lambda: tiny(BloomConfig(vocab_size=13, hidden_size=16, n_layer=1, n_head=2)),
            "BloomForCausalLM.*position_ids",
            id="positions-from-the-mask",
        ),
        pytest.param(lambda: llama(attention="flex_attention"), "LlamaForCausalLM.*flex.*sdpa", id="flex"),
    ],
)
def test_a_model_that_cannot_be_decoded_right_is_refused_at_once(build: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LocalSampler(build(), CONTEXT)
