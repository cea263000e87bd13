"""What vLLM samples, and what it says of it: against transformers in float32, and against arithmetic."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from playing import NEVER, assert_stamped_right, config_of, count, sampling, tokens_given, until
from torch import Tensor

from vcpo.errors import ContextOverflowError, EnvironmentFailure
from vcpo.samplers.protocol import Completion
from vcpo.weights import weight_tensors

pytestmark = pytest.mark.xdist_group("served")


def play(served: str, model: Path, requests: list[dict[str, Any]], **settings: Any) -> list[Completion]:
    """Serve the model itself as version 1, then all requests at once."""

    async def run() -> list[Completion]:
        async with sampling(config_of(model, urls=[served], **settings)) as sampler:
            await sampler.update(1, weight_tensors(tiny.llama(0)))
            common = {"max_tokens": 24, "stop": NEVER, "seed": 0}
            return await asyncio.gather(*(sampler.generate(**(common | r)) for r in requests))

    return asyncio.run(run())


def test_log_probs_are_those_of_the_learner(served: str, model: Path) -> None:
    prompts = [tiny.random_tokens(length, length) for length in (1, 2, 7, 40, 200)]
    done = play(served, model, [{"tokens": p, "seed": i, "max_tokens": 60} for i, p in enumerate(prompts)])
    for prompt, completion in zip(prompts, done, strict=True):
        assert (len(completion.tokens), completion.finish) == (60, "length")
        assert set(completion.versions) == {1}
        assert_stamped_right({1: tiny.llama(0)}, prompt, completion)


def processed(log_probs: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """[V] log π of what is sampled, the slow way: sort, keep the first that reach top_p, renormalise."""
    scaled = (log_probs / temperature).log_softmax(-1)
    order = scaled.argsort(descending=True).tolist()
    kept = order[: top_k or len(order)]
    within = scaled[kept].softmax(-1).tolist()
    nucleus = [t for i, t in enumerate(kept) if sum(within[:i]) < top_p]
    shaped = torch.full_like(scaled, -torch.inf)
    shaped[nucleus] = scaled[nucleus].log_softmax(-1)
    return shaped


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(0.7, 1.0, 0), (1.6, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 4), (0.8, 0.7, 9)],
)
def test_shaped_sampling_records_the_distribution_that_is_sampled(
    served: str, model: Path, temperature: float, top_p: float, top_k: int
) -> None:
    prompt = tiny.random_tokens(9, 0)
    shape = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    requests = [{"tokens": prompt, "seed": seed} for seed in range(6)]
    for done in play(served, model, requests, **shape):
        places = tiny.all_log_probs(tiny.llama(0), [*prompt, *done.tokens])[len(prompt) - 1 :]
        right = [
            float(processed(place, temperature, top_p, top_k)[token])
            for place, token in zip(places, done.tokens, strict=True)
        ]
        torch.testing.assert_close(done.log_probs, right, rtol=0, atol=1e-5)


def test_frequencies_are_the_probabilities(served: str, model: Path) -> None:
    """χ² of 2,000 first tokens against transformers' distribution, at a level of 1 in 10,000."""
    prompt, draws = tiny.random_tokens(5, 3), 2000
    done = play(served, model, [{"tokens": prompt, "seed": s, "max_tokens": 1} for s in range(draws)])
    seen = Counter(c.tokens[0] for c in done)
    wanted = tiny.all_log_probs(tiny.llama(0), [*prompt, 0])[-1].exp() * draws
    common = [t for t in range(tiny.VOCABULARY) if wanted[t] >= 5]
    rare = draws - float(wanted[common].sum()), draws - sum(seen[t] for t in common)
    terms = [(seen[t] - float(wanted[t])) ** 2 / float(wanted[t]) for t in common]
    statistic = sum(terms) + (rare[1] - rare[0]) ** 2 / max(rare[0], 1.0)
    # Wilson and Hilferty's approximation of the quantile of χ² at 3.72 deviations.
    degrees = len(common)
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees > 10


def test_stop_tokens_end_a_completion_and_belong_to_it(served: str, model: Path) -> None:
    prompt, stop = tiny.random_tokens(6, 1), frozenset(range(3, 11))
    requests = [{"tokens": prompt, "seed": seed, "stop": stop, "max_tokens": 40} for seed in range(8)]
    for done in play(served, model, requests):
        assert done.finish == "stop"
        assert done.tokens[-1] in stop
        assert not stop & set(done.tokens[:-1])
        assert len(done.log_probs) == len(done.versions) == len(done.tokens)
        assert_stamped_right({1: tiny.llama(0)}, prompt, done)


def test_the_models_own_end_is_a_token_like_others_unless_named(served: str, model: Path) -> None:
    """Stop tokens are the caller's alone: an environment may act beyond the end token."""
    requests = [{"tokens": tiny.random_tokens(4, s), "seed": s, "max_tokens": 200} for s in range(4)]
    done = play(served, model, requests)
    assert {len(c.tokens) for c in done} == {200}
    assert any(tiny.END in c.tokens for c in done)


def test_a_seed_fixes_a_completion_wherever_it_lands(served: str, model: Path) -> None:
    request = {"tokens": tiny.random_tokens(6, 2), "max_tokens": 30, "seed": 5}
    (alone,) = play(served, model, [request])
    crowd = [{"tokens": tiny.random_tokens(3 + i, i), "seed": 50 + i, "max_tokens": 30} for i in range(9)]
    among = play(served, model, [*crowd[:4], request, *crowd[4:]])[4]
    assert among.tokens == alone.tokens
    others = play(served, model, [request | {"seed": seed} for seed in (6, 7, 2**63 + 5)])
    assert len({tuple(c.tokens) for c in [alone, *others[:2]]}) == 3


def test_greedy_takes_the_most_probable(served: str, model: Path) -> None:
    prompt = tiny.random_tokens(6, 4)
    done = play(served, model, [{"tokens": prompt, "greedy": True, "seed": s} for s in (1, 2)])
    assert done[0].tokens == done[1].tokens
    best = tiny.all_log_probs(tiny.llama(0), [*prompt, *done[0].tokens])[len(prompt) - 1 :].argmax(-1)
    assert done[0].tokens == best.tolist()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"tokens": []}, EnvironmentFailure),
        ({"tokens": [3], "max_tokens": 0}, EnvironmentFailure),
        ({"tokens": [3, tiny.VOCABULARY]}, EnvironmentFailure),
        ({"tokens": [3] * (tiny.CONTEXT - 4), "max_tokens": 5}, ContextOverflowError),
    ],
)
def test_impossible_requests_cost_their_episode(
    served: str, model: Path, request_: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        play(served, model, [request_])


def test_the_whole_context_can_be_used(served: str, model: Path) -> None:
    prompt = [3 + i % 20 for i in range(tiny.CONTEXT - 4)]
    (done,) = play(served, model, [{"tokens": prompt, "max_tokens": 4}])
    assert_stamped_right({1: tiny.llama(0)}, prompt, done)
    assert len(done.tokens) == 4


def test_a_cancelled_call_frees_the_server(served: str, model: Path) -> None:
    async def run() -> float:
        async with sampling(config_of(model, urls=[served])) as sampler:
            before = tokens_given(served)
            call = asyncio.ensure_future(
                sampler.generate(tiny.random_tokens(4, 0), max_tokens=500, stop=NEVER, seed=0)
            )
            await until(lambda: tokens_given(served) > before)
            call.cancel()
            await until(lambda: count(served, "num_requests_running") == 0)
            assert sampler.servers[0].outstanding == 0
            return tokens_given(served) - before

    assert asyncio.run(run()) < 500
