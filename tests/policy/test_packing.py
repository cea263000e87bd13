"""Packing loses nothing, respects its budgets, and changes neither log-probs nor gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
)

from vcpo.errors import VcpoError
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.packing import micro_batches, pack, row_layout
from vcpo.trajectory import Trajectory

torch.set_num_threads(1)

VOCABULARY = 13
LENGTHS = st.lists(st.integers(0, 40), max_size=25)


def trajectory(length: int, seed: int = 0, actions: float = 0.5) -> Trajectory:
    random = np.random.default_rng(seed)
    mask = random.random(length) < actions
    mask[:1] = False
    return Trajectory(
        tokens=random.integers(0, VOCABULARY, length).astype(np.int32),
        action_mask=mask,
        log_probs=np.zeros(length, np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=0.0,
    )


def trajectories_of(lengths: Sequence[int]) -> list[Trajectory]:
    return [trajectory(length, seed) for seed, length in enumerate(lengths)]


# Rows and micro-batches


@given(LENGTHS, st.integers(0, 20))
def test_a_row_never_exceeds_its_capacity_and_nothing_is_lost(lengths: list[int], slack: int) -> None:
    capacity = max(lengths, default=0) + slack
    rows = row_layout(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=25))
def test_no_two_rows_could_have_been_one(lengths: list[int]) -> None:
    """First fit: no row's contents would fit in the room of another; hence at most twice the fewest rows."""
    capacity = max(lengths)
    used = sorted(sum(lengths[i] for i in row) for row in row_layout(lengths, capacity))
    assert all(a + b > capacity for a, b in pairwise(used))


@given(LENGTHS.filter(bool), st.booleans())
def test_packed_rows_hold_every_trajectory_where_they_say(lengths: list[int], packed: bool) -> None:
    trajectories = trajectories_of(lengths)
    rows = pack(trajectories, pad_id=VOCABULARY, packed=packed)
    segments = rows.segments.numpy()
    for i, t in enumerate(trajectories):
        assert rows.input_ids.numpy()[segments == i].tolist() == t.tokens.tolist()
        assert rows.position_ids.numpy()[segments == i].tolist() == list(range(len(t.tokens)))
        assert len(np.unique(np.nonzero(segments == i)[0])) <= 1  # in one row
    assert (rows.input_ids[rows.segments < 0] == VOCABULARY).all()
    # Neighbours in a row are told apart by a position that does not go up by one, padding included.
    same = np.diff(rows.position_ids.numpy(), axis=1) == 1
    assert (same == (np.diff(segments, axis=1) == 0)).all()


@given(LENGTHS.filter(bool), st.booleans())
def test_sampled_tokens_are_listed_trajectory_by_trajectory(lengths: list[int], packed: bool) -> None:
    trajectories = trajectories_of(lengths)
    rows = pack(trajectories, packed=packed)
    sampled = [(i, n) for i, t in enumerate(trajectories) for n in range(t.action_count)]
    assert list(zip(rows.action_owners.tolist(), rows.action_places.tolist(), strict=True)) == sampled
    tokens = np.concatenate([t.tokens[t.action_mask] for t in trajectories])
    assert rows.input_ids[rows.action_rows, rows.action_columns].tolist() == tokens.tolist()
    table = rows.spread(torch.arange(1.0, len(sampled) + 1))
    assert table.shape == (len(lengths), max([1, *(t.action_count for t in trajectories)]))
    assert table[table > 0].tolist() == list(range(1, len(sampled) + 1))
    assert (table > 0).sum(1).tolist() == [t.action_count for t in trajectories]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(1, 200),
)
@settings(max_examples=200)
def test_micro_batches_keep_the_budget_and_the_groups(members: list[tuple[int, int]], budget: int) -> None:
    lengths, groups = [m[0] for m in members], [m[1] for m in members]
    trajectories = trajectories_of(lengths)
    units = micro_batches(trajectories, groups, budget)
    assert sorted(i for unit in units for batch in unit for i in batch) == list(range(len(members)))
    for batch in (batch for unit in units for batch in unit):
        tokens = pack([trajectories[i] for i in batch]).input_ids.numel()
        assert tokens <= budget or len(batch) == 1
    for group in set(groups):
        own = {i for i, g in enumerate(groups) if g == group}
        (home,) = [
            unit for unit in units if any(own & set(batch) for batch in unit)
        ]  # a unit holds whole groups
        split = sum(bool(own & set(batch)) for batch in home) > 1
        assert not (split and pack([trajectories[i] for i in own]).input_ids.numel() <= budget)


def test_micro_batches_of_a_hand_worked_example() -> None:
    """Budget 24. Groups 0 and 1 (4 × 6 tokens) fill one; group 2 needs two; group 3 is 30 tokens."""
    trajectories = trajectories_of([6, 6, 6, 6, 12, 12, 12, 30])
    units = micro_batches(trajectories, [0, 1, 0, 1, 2, 2, 2, 3], 24)
    assert units == [[[0, 2, 1, 3]], [[4, 5], [6]], [[7]]]


# Log-probs and gradients


def build(
    kind: Callable[..., PreTrainedModel], config: Callable[..., Any], **changes: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
    }
    return disturbed(kind(config(**(common | changes))))


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    }
    return disturbed(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig),
    "llama-tied": lambda: build(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config),
    "gemma3-mixed": lambda: build(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral-sliding": lambda: build(MistralForCausalLM, MistralConfig, sliding_window=4),
    "gpt2": gpt2,
}


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms compute in float32 whatever the model's type: let them stay in float64."""
    cast, rounded = torch.Tensor.to, torch.Tensor.float

    def to(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if self.dtype == torch.float64 and arguments[:1] == (torch.float32,):
            return self
        return cast(self, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))


def gradients(model: PreTrainedModel, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_at_a_time(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """The oracle: each trajectory alone, without position ids, log-softmax written out."""
    results = []
    for t in trajectories:
        if not t.action_mask.any():
            results.append(torch.zeros(0, dtype=torch.float64))
            continue
        ids = torch.from_numpy(t.tokens.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        places = np.flatnonzero(t.action_mask)
        results.append(torch.stack([logits[p - 1, ids[p]] - logits[p - 1].logsumexp(-1) for p in places]))
    return results


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("name", MODELS)
def test_packed_padded_and_alone_have_one_log_prob_and_one_gradient(name: str) -> None:
    model = MODELS[name]()
    trajectories = trajectories_of([9, 1, 17, 3, 0, 8, 2, 16])  # one empty, one of a lone prompt token
    weights = torch.linspace(-1.0, 2.0, sum(t.action_count for t in trajectories), dtype=torch.float64)
    alone = torch.cat(one_at_a_time(model, trajectories))
    expected = gradients(model, weights @ alone)
    for packed in (True, False):
        log_probs = sampled_log_probs(model, pack(trajectories, packed=packed))
        torch.testing.assert_close(log_probs, alone, rtol=0, atol=1e-10)
        actual = gradients(model, weights @ log_probs)
        assert actual.keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(actual[parameter], gradient, rtol=1e-10, atol=1e-10)
    assert pack(trajectories).input_ids.shape[0] == 4  # 17, 16+1, 9+8, 3+2+0


def test_trajectories_without_tokens_or_samples_have_no_log_probs() -> None:
    model = MODELS["llama"]()
    rows = pack([trajectory(0), trajectory(6, actions=0.0), trajectory(1)])
    log_probs = sampled_log_probs(model, rows)
    assert log_probs.shape == (0,)
    assert rows.spread(log_probs).tolist() == [[0.0], [0.0], [0.0]]
    assert [pack([trajectory(0)] * n).count for n in (1, 3)] == [1, 3]


def test_a_sampled_first_token_is_refused_by_index() -> None:
    """Nothing comes before it: its log-prob would be read from a neighbour's last token."""
    bad = trajectory(4)
    bad.action_mask[0] = True
    with pytest.raises(VcpoError, match=r"trajectory 1 .*first token"):
        pack([trajectory(5), bad])
