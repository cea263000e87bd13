"""Temperature, top-k and top-p in the local sampler: what is drawn and recorded, against float64 numpy."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vcpo.config import SamplerConfig
from vcpo.samplers.local import LocalSampler
from vcpo.samplers.protocol import Completion
from vcpo.samplers.random import uniforms
from vcpo.samplers.shaping import draw, sampled_log_probs

torch.set_num_threads(1)

VOCABULARY, CONTEXT, NEVER = 13, 64, frozenset[int]()
SHAPES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 4},
    {"top_p": 0.8},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"top_k": 1},
    {"top_p": 1e-9},
]


def oracle(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """The distribution of one row, [V]: vLLM's definition, from the least probable token upwards."""
    z = logits.astype(np.float64) / temperature
    if top_k:
        z[z < np.sort(z)[-top_k]] = -np.inf
    order = np.argsort(z)
    probabilities = np.exp(z - z.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        dropped = order[np.cumsum(probabilities[order]) <= 1 - top_p]
        probabilities[dropped[dropped != order[-1]]] = 0
    return probabilities / probabilities.sum()


def fractions(*parts: float) -> torch.Tensor:
    return torch.tensor([parts], dtype=torch.float64)


HALVES = fractions(8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16).log()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({}, (8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16)),
        ({"temperature": 0.5}, (64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86)),
        ({"top_k": 2}, (2 / 3, 1 / 3, 0, 0, 0)),
        ({"top_k": 4}, (8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16)),  # the fifth ties with the fourth
        ({"top_k": 9}, (8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16)),
        ({"top_p": 0.4}, (1, 0, 0, 0, 0)),
        ({"top_p": 0.51}, (2 / 3, 1 / 3, 0, 0, 0)),
        ({"top_p": 0.9}, (8 / 15, 4 / 15, 2 / 15, 1 / 15, 0)),  # of a tie, the smaller number
        ({"top_k": 3, "top_p": 0.8}, (2 / 3, 1 / 3, 0, 0, 0)),  # two have 12/14 of what top-k leaves
        ({"top_k": 3, "top_p": 0.87}, (4 / 7, 2 / 7, 1 / 7, 0, 0)),  # 12/14 is less, though 14/16 is more
        ({"temperature": 0.5, "top_p": 0.74}, (1, 0, 0, 0, 0)),  # 64/86 is .744: temperature comes first
    ],
)
def test_a_distribution_worked_by_hand(shape: dict[str, Any], expected: tuple[float, ...]) -> None:
    found = sampled_log_probs(HALVES, **shape)
    torch.testing.assert_close(found.exp(), fractions(*expected), rtol=1e-12, atol=0)
    assert ((found == -torch.inf) == (fractions(*expected) == 0)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_distributions_equal_the_oracles(shape: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 40)).astype(np.float32)
    found = sampled_log_probs(torch.from_numpy(logits), **shape)
    assert found.dtype == torch.float32
    for row, log_probs in zip(logits, found.double().numpy(), strict=True):
        expected = oracle(row, **shape)
        np.testing.assert_array_equal(log_probs == -np.inf, expected == 0)
        kept = expected > 0
        np.testing.assert_allclose(log_probs[kept], np.log(expected[kept]), rtol=0, atol=5e-6)


def test_half_precision_logits_are_shaped_in_single_precision() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = sampled_log_probs(logits.double(), 0.7, 9, 0.8)
    found = sampled_log_probs(logits, 0.7, 9, 0.8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_draws_invert_the_cumulative_distribution() -> None:
    """All of 4096 evenly spaced numbers: each token is drawn as often as its share, to the one."""
    log_probs = sampled_log_probs(HALVES, top_k=3).expand(4096, -1)  # 4/7, 2/7, 1/7
    tokens = draw(log_probs, (torch.arange(4096) + 0.5) / 4096)[:, 0]
    # 4096 · 4/7 = 2340.57 and 4096 · 6/7 = 3510.86: the numbers below them are counted.
    assert tokens.tolist() == [0] * 2341 + [1] * (3511 - 2341) + [2] * (4096 - 3511)


def test_a_token_that_is_cut_is_never_drawn() -> None:
    """Not by the smallest and the largest number either, whatever the probabilities sum up to."""
    random = np.random.default_rng(1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for _ in range(300):
        logits = torch.from_numpy(random.normal(0, 2, (1, 60))).float()
        log_probs = sampled_log_probs(logits, top_k=7).expand(2, -1)
        tokens = draw(log_probs, ends)
        kept = (log_probs[0] > -torch.inf).nonzero()[:, 0]
        assert tokens[:, 0].tolist() == [int(kept[0]), int(kept[-1])]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits_after(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double().numpy()


def sample(shape: dict[str, Any], prompts: list[list[int]], greedy: list[bool]) -> list[Completion]:
    async def run() -> list[Completion]:
        sampler = LocalSampler(llama(), CONTEXT, SamplerConfig(**shape))
        calls = (
            sampler.generate(p, max_tokens=12, stop=NEVER, seed=7 + i, greedy=g)
            for i, (p, g) in enumerate(zip(prompts, greedy, strict=True))
        )
        return await asyncio.gather(*calls)

    return asyncio.run(run())


PROMPTS = [[3, 4, 5], [6], [7, 8, 3, 9], [3, 4, 5]]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_is_the_oracles_and_has_its_log_prob(shape: dict[str, Any]) -> None:
    """Replayed token by token, from the logits of a float64 forward of the whole prefix."""
    exact = llama().double()
    for i, (prompt, done) in enumerate(zip(PROMPTS, sample(shape, PROMPTS, [False] * 4), strict=True)):
        tokens = list(prompt)
        for token, log_prob in zip(done.tokens, done.log_probs, strict=True):
            distribution = oracle(logits_after(exact, tokens), **shape)
            number = uniforms(np.array([7 + i], np.uint64), np.array([len(tokens)], np.uint64))[0]
            assert token == np.searchsorted(np.cumsum(distribution), number, side="right")
            assert log_prob == pytest.approx(np.log(distribution[token]), abs=2e-5)
            tokens.append(token)


def test_greedy_takes_the_most_probable_and_records_the_plain_softmax() -> None:
    """Beside sampled requests in the same batch, whatever shapes those."""
    exact, shape = llama().double(), {"temperature": 1.7, "top_k": 2}
    done = sample(shape, PROMPTS, [True, False, True, False])
    for i in (0, 2):
        tokens = list(PROMPTS[i])
        for token, log_prob in zip(done[i].tokens, done[i].log_probs, strict=True):
            logits = logits_after(exact, tokens)
            assert token == logits.argmax()
            assert log_prob == pytest.approx(np.log(oracle(logits)[token]), abs=2e-5)
            tokens.append(token)
    alone = sample(shape, PROMPTS, [False] * 4)
    assert (done[1], done[3]) == (alone[1], alone[3])
