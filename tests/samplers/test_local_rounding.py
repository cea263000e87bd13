"""Weights of fewer bits in the local sampler: their values, what they leave alone, what is proven."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from vcpo.config import SamplerConfig
from vcpo.errors import ModelError
from vcpo.samplers.local import LocalSampler
from vcpo.samplers.protocol import Completion
from vcpo.samplers.rounding import Rounding, to_fp8, to_int4, to_int8
from vcpo.weights import Weights, checksum, weight_tensors

torch.set_num_threads(1)

VOCABULARY, CONTEXT = 13, 64
FORMATS = ("fp8", "int8", "int4")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,  # an int4 group and a half
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return disturbed(LlamaForCausalLM(LlamaConfig(**(SIZES | changes))))


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 2}
    return disturbed(GPT2LMHeadModel(GPT2Config(**sizes, n_positions=CONTEXT)))


def adapted(seed: int) -> PreTrainedModel:
    """The same frozen base for every seed, with adapters that do something."""
    model = llama(0)
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    inject_adapter_in_model(settings, model, "default")
    return model.eval()


# Values


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_int8_rows_worked_by_hand() -> None:
    """A row whose largest is 127 has the scale 1; ties go to the even number."""
    rows = torch.cat([row(127, 0.4, 0.5, 1.5, 2.5, -3.6), row(0, -0.25, 31.75, 0.05, 8.125, 0.125)])
    expected = [[127, 0, 0, 2, 2, -4], [0, -0.25, 31.75, 0, 8, 0]]  # the second in quarters
    assert to_int8(rows).tolist() == expected
    assert to_int8(torch.zeros(2, 3)).tolist() == [[0] * 3] * 2


def test_int4_groups_worked_by_hand() -> None:
    """Each 32 inputs of a row have a scale; the last group is shorter."""
    first = [7, 0.5, 1.5, -6.6, 2.4] + [0.0] * 27
    second = [-1.75, 0.5, 0.12, 0.13, 0.375]  # in quarters
    found = to_int4(row(*first, *second))
    assert found.tolist() == [[7, 0, 2, -7, 2] + [0] * 27 + [-1.75, 0.5, 0, 0.25, 0.5]]
    assert found.shape == (1, 37)


def test_fp8_matrix_worked_by_hand() -> None:
    """One scale a matrix, here 1. Steps: 2 from 16 to 32, 1/32 from 1/4 to 1/2, 2^-9 at the bottom."""
    matrix = torch.cat([row(448, 17, 19, 0.3, -(2.0**-10)), row(-400, 3 * 2.0**-10, 1.0, 0, 447)])
    assert to_fp8(matrix).tolist() == [[448, 16, 20, 0.3125, 0], [-384, 2.0**-8, 1, 0, 448]]
    assert to_fp8(matrix / 64).tolist() == (to_fp8(matrix) / 64).tolist()  # the scale is of the matrix


def fp8_values() -> np.ndarray:
    """All finite float8_e4m3 numbers by their definition: 4 exponent bits of bias 7, 3 of mantissa."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive = np.array(subnormal + normal[:-1])  # the last pattern is NaN
    return np.unique(np.concatenate([-positive, positive]))


def nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    place = np.abs(x[..., None] - values).argmin(-1)
    return values[place]


def oracle(weight: np.ndarray, quantization: str) -> np.ndarray:
    """What a matrix [outputs, inputs] becomes, in float64, scale by scale."""
    weight = weight.astype(np.float64)
    if quantization == "fp8":
        scale = np.abs(weight).max() / 448
        return nearest(fp8_values(), weight / scale) * scale
    bound, group = {"int8": (127, weight.shape[1]), "int4": (7, 32)}[quantization]
    found = np.zeros_like(weight)
    for i, outputs in enumerate(weight):
        for begin in range(0, len(outputs), group):
            part = outputs[begin : begin + group]
            scale = np.abs(part).max() / bound
            found[i, begin : begin + group] = nearest(np.arange(-bound, bound + 1), part / scale) * scale
    return found


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("shape", [(5, 7), (8, 96), (3, 70)])
def test_random_matrices_equal_the_oracle_and_keep_the_bound(
    quantization: str, shape: tuple[int, int]
) -> None:
    rounded: dict[str, Callable[[Tensor], Tensor]] = {"fp8": to_fp8, "int8": to_int8, "int4": to_int4}
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, shape[1])
    found = rounded[quantization](matrix).double().numpy()
    expected = oracle(matrix.numpy(), quantization)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
    error = np.abs(found - matrix.double().numpy())
    if quantization == "fp8":  # half a step of 1/8 of the power of two below; subnormal at the bottom
        bound = np.maximum(np.abs(matrix.numpy()) / 16, np.abs(matrix.numpy()).max() / 448 * 2.0**-10)
    elif quantization == "int8":
        bound = np.abs(matrix.numpy()).max(1, keepdims=True) / 254
    else:
        padded = np.pad(matrix.numpy(), ((0, 0), (0, -shape[1] % 32)))
        largest = np.abs(padded.reshape(shape[0], -1, 32)).max(-1).repeat(32, 1)[:, : shape[1]]
        bound = largest / 14
    assert (error <= bound * (1 + 1e-6)).all()


# The replica


def by_oracle(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """The model in float64 with matrices that the oracle rounded: found by name, not by kind."""
    exact = copy.deepcopy(model).double()
    for name, parameter in exact.named_parameters():
        matrix = parameter.detach().numpy()
        if "_proj." in name and "lora" not in name and "c_proj" not in name:
            parameter.data = torch.from_numpy(oracle(matrix, quantization))
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):  # GPT-2: [inputs, outputs]
            parameter.data = torch.from_numpy(oracle(matrix.T, quantization).T.copy())
    return exact


@torch.no_grad()
def log_probs_under(model: PreTrainedModel, prompt: list[int], done: Completion) -> Tensor:
    ids = torch.tensor([[*prompt, *done.tokens]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


PROMPT = [3, 4, 5, 6]


def served(
    model: PreTrainedModel, settings: dict[str, Any], updates: list[Weights]
) -> tuple[list[str], Completion]:
    """The answers to the updates, and a completion after them."""

    async def run() -> tuple[list[str], Completion]:
        sampler = LocalSampler(model, CONTEXT, SamplerConfig(**settings))
        answers = [await sampler.update(i + 1, weights) for i, weights in enumerate(updates)]
        return answers, await sampler.generate(PROMPT, max_tokens=30, stop=frozenset(), seed=0)

    return asyncio.run(run())


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": llama,
    "tied": lambda seed: llama(seed, tie_word_embeddings=True),
    "gpt2": gpt2,
    "adapters": adapted,
}


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("updates", [0, 2])
def test_what_is_sampled_is_the_oracles_policy(kind: str, quantization: str, updates: int) -> None:
    """Before and after updates: weights are rounded from what was published, not from what was served."""
    models = [MODELS[kind](seed) for seed in range(updates + 1)]
    replica = copy.deepcopy(models[0])
    published: list[Weights] = [weight_tensors(m) for m in models[1:]]
    _, done = served(replica, {"quantization": quantization}, published)
    expected = log_probs_under(by_oracle(models[-1], quantization), PROMPT, done)
    torch.testing.assert_close(torch.tensor(done.log_probs).double(), expected, rtol=0, atol=5e-5)
    unrounded = log_probs_under(copy.deepcopy(models[-1]).double(), PROMPT, done)
    assert float((unrounded - expected).abs().mean()) > (1e-3 if quantization == "int8" else 1e-2)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_only_matrices_of_linear_layers_are_rounded(kind: str, quantization: str) -> None:
    new = MODELS[kind](1)
    replica = MODELS[kind](0)
    served(replica, {"quantization": quantization}, [weight_tensors(new)])
    exact = dict(new.named_parameters())
    same = {n for n, p in replica.named_parameters() if torch.equal(p, exact[n])}
    kept = ("embed", "lm_head", "norm", "wte", "wpe", "ln_", "bias", "lora_")
    assert same == {n for n in exact if any(part in n for part in kept)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "fp8"},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"dtype": "bfloat16"},
        {"quantization": "int4", "dtype": "bfloat16"},
    ],
)
def test_the_learner_can_tell_what_must_be_served(kind: str, settings: dict[str, Any]) -> None:
    """Its own rounding has the checksum of the sampler; that of the version before has another."""
    learners, replica = [MODELS[kind](1), MODELS[kind](2)], MODELS[kind](0)
    expected = [
        checksum(Rounding(m, SamplerConfig(**settings)).of_published(weight_tensors(m))) for m in learners
    ]
    answers, _ = served(replica, settings, [weight_tensors(m) for m in learners])
    assert answers == expected
    assert len({*expected, *(checksum(weight_tensors(m)) for m in learners)}) == (
        2 if kind == "adapters" else 4  # adapters are served as they are
    )


def test_bfloat16_replicas_of_float32_policies() -> None:
    """Parameters are cast, rotary frequencies and adapters are not; log-probs are bfloat16's."""
    new, replica = adapted(1), adapted(0)
    _, done = served(replica, {"dtype": "bfloat16"}, [weight_tensors(new)])
    assert {p.dtype for p in replica.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in replica.parameters() if p.requires_grad} == {torch.float32}
    assert replica.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
    exact = log_probs_under(copy.deepcopy(new).double(), PROMPT, done)
    error = (torch.tensor(done.log_probs).double() - exact).abs()
    assert 1e-4 < float(error.mean()) < 0.05  # 2^-9 of logits of size 1 to 10, through two layers


def test_published_weights_are_rounded_before_they_are_cast() -> None:
    """To int8 from float32; casting first would move values across the middle between two of them."""
    new, replica = llama(1), llama(0)
    served(replica, {"quantization": "int8", "dtype": "bfloat16"}, [weight_tensors(new)])
    name = "model.layers.0.mlp.up_proj.weight"
    rounded = oracle(new.get_parameter(name).detach().numpy(), "int8")
    found = replica.get_parameter(name)
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.detach().double().numpy(), rounded, rtol=2.0**-8, atol=0)


def test_without_fewer_bits_nothing_is_touched() -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for settings in (SamplerConfig(), SamplerConfig(dtype="float32")):
        LocalSampler(model, CONTEXT, settings)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_matrix_of_no_linear_layer_is_refused_by_name() -> None:
    sizes: dict[str, Any] = SIZES | {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    with pytest.raises(ModelError, match=r"layers.0.mlp.* of MixtralForCausalLM.* is of none"):
        Rounding(model, SamplerConfig(quantization="int4"))
    Rounding(model, SamplerConfig(dtype="bfloat16"))
