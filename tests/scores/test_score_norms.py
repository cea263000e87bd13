"""Score norms from one batched backward pass, against one backward pass a trajectory, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
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

from vcpo.errors import NonFiniteError, UnsupportedLayerError, VcpoError
from vcpo.scores import ScoreTape, squared_score_norms_oracle
from vcpo.scores.factors import Factor, Lookup, Outer, Vector, total_squared_norms
from vcpo.scores.layout import BUDGET, Layout

torch.set_num_threads(1)

VOCABULARY = 13
PAD = 0


@dataclass(frozen=True)
class Batch:
    sequences: list[Tensor]
    masks: list[Tensor]
    normalisers: Tensor


@dataclass(frozen=True)
class Rows:
    ids: Tensor
    positions: Tensor
    segments: Tensor


def batch_of(lengths: Sequence[int], seed: int = 0) -> Batch:
    """Random tokens (the padding token among them); the first trajectory has no action."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.6 for n in lengths]
    for mask in masks:
        mask[-1], mask[0] = True, False
    masks[0][:] = False
    return Batch(sequences, masks, torch.rand(len(lengths), generator=generator, dtype=torch.float64) + 0.1)


def rows_of(batch: Batch, members: Sequence[Sequence[int]]) -> Rows:
    """Trajectories laid out one after another in rows; the rest of a row is a sequence of padding."""
    lengths = [len(s) for s in batch.sequences]
    width = max(sum(lengths[i] for i in row) for row in members)
    ids = torch.full((len(members), width), PAD)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    for r, row in enumerate(members):
        column = 0
        for i in row:
            span = slice(column, column + lengths[i])
            ids[r, span], segments[r, span] = batch.sequences[i], i
            positions[r, span] = torch.arange(lengths[i])
            column += lengths[i]
        positions[r, column:] = torch.arange(width - column)
    return Rows(ids, positions, segments)


def padded(batch: Batch) -> Rows:
    return rows_of(batch, [[i] for i in range(len(batch.sequences))])


def packed(batch: Batch) -> Rows:
    count = len(batch.sequences)
    order = list(range(count))[::-1]
    return rows_of(batch, [order[:2], order[2:]])


def objective_of(logits: Tensor, batch: Batch, rows: Rows) -> Tensor:
    total = logits.new_zeros(())
    for i, (tokens, mask) in enumerate(zip(batch.sequences, batch.masks, strict=True)):
        own = logits[rows.segments == i].log_softmax(-1)
        log_probs = own[:-1].gather(-1, tokens[1:, None])[:, 0]
        total = total + batch.normalisers[i] * log_probs[mask[1:]].sum()
    return total


def forward(model: nn.Module, rows: Rows) -> Tensor:
    return model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False).logits


def taped_norms(model: nn.Module, batch: Batch, rows: Rows, budget: int = BUDGET) -> Tensor:
    with ScoreTape(model, budget=budget) as tape:
        logits = forward(model, rows)
    objective = objective_of(logits, batch, rows)
    return tape.squared_norms(objective, rows.segments, len(batch.sequences), retain_graph=False)


def assert_matches_oracle(model: nn.Module, batch: Batch, rows: Rows, budget: int = BUDGET) -> None:
    norms = taped_norms(model, batch, rows, budget)
    expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0.0)
    assert (norms > 0).tolist() == [bool(mask.any()) for mask in batch.masks]


def build(
    kind: Callable[..., PreTrainedModel], config: Callable[..., Any], **changes: object
) -> PreTrainedModel:
    """A random float64 model; norms, biases and scales moved away from their special initial values."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
    }
    return disturbed(kind(config(**(common | changes))))


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    model = model.double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def llama(**changes: object) -> PreTrainedModel:
    return build(LlamaForCausalLM, LlamaConfig, **changes)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return disturbed(GPT2LMHeadModel(config))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config),
    "gemma-tied": lambda: build(GemmaForCausalLM, GemmaConfig, tie_word_embeddings=True),
    "gemma3-tied": lambda: build(Gemma3ForCausalLM, Gemma3TextConfig, tie_word_embeddings=True),
    "mistral": lambda: build(MistralForCausalLM, MistralConfig),
    "gpt2-tied": gpt2,
}


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms sum their weight gradients in float32, the oracle's too: let them stay in float64."""
    rounded = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))


RAGGED = [5, 9, 1, 3, 17, 8]


@pytest.mark.parametrize("lay_out", [padded, packed])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_matches_one_backward_per_trajectory(name: str, lay_out: Callable[[Batch], Rows]) -> None:
    model = MODELS[name]()
    batch = batch_of(RAGGED)
    assert_matches_oracle(model, batch, lay_out(batch))


@pytest.mark.parametrize("budget", [1, 200, 3000])
@pytest.mark.parametrize("name", ["llama-biases", "gemma3-tied", "gpt2-tied"])
def test_small_memory_budget_gives_the_same_norms(name: str, budget: int) -> None:
    """A budget this small cuts the batch into many blocks and wide layers into slices."""
    batch = batch_of(RAGGED, seed=1)
    assert_matches_oracle(MODELS[name](), batch, packed(batch), budget)


@pytest.mark.parametrize("length", [3, 30])
def test_sequences_far_below_and_above_the_ghost_threshold(length: int) -> None:
    batch = batch_of([length] * 4)
    assert_matches_oracle(llama(), batch, padded(batch))


@pytest.mark.parametrize(
    "kind, config", [(Qwen3ForCausalLM, Qwen3Config), (Gemma3ForCausalLM, Gemma3TextConfig)]
)
def test_norms_inside_attention_with_as_many_positions_as_heads(
    kind: Callable[..., PreTrainedModel], config: Callable[..., Any]
) -> None:
    """Qwen3 normalises [R, T, H, d], Gemma3 [R, H, T, d]: with T = H only the strides tell them apart."""
    batch = batch_of([2, 2, 2, 2])
    assert_matches_oracle(build(kind, config, num_attention_heads=4), batch, packed(batch))


FROZEN: dict[str, Callable[[str], bool]] = {
    "embedding": lambda name: "embed" in name,
    "all but biases": lambda name: not name.endswith("bias"),
    "all but weights": lambda name: name.endswith("bias"),
    "all but one norm": lambda name: name != "model.layers.1.input_layernorm.weight",
    "first layer": lambda name: "layers.0" in name,
    "head": lambda name: "lm_head" in name,
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_are_left_out(name: str) -> None:
    model = llama(attention_bias=True)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[name](parameter_name))
    batch = batch_of(RAGGED)
    assert_matches_oracle(model, batch, packed(batch))


def test_parameter_thawed_between_two_uses_of_one_tape() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    model.requires_grad_(False).get_submodule("lm_head").requires_grad_(True)
    tape = ScoreTape(model)
    for _ in range(2):
        with tape:
            objective = objective_of(forward(model, rows), batch, rows)
        norms = tape.squared_norms(objective, rows.segments, len(RAGGED), retain_graph=False)
        expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
        torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0.0)
        model.requires_grad_(True)


@dataclass
class Output:
    logits: Tensor


class Repeating(nn.Module):
    """Every module is called twice, and the table is also the head; each position sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=3)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        x = self.embed(input_ids) + self.embed((input_ids + 1) % VOCABULARY)
        for _ in range(2):
            x = self.norm(torch.tanh(self.mix(x.cumsum(1))))
        return Output(self.head(x) + self.head(x.square()))


def test_modules_called_twice_add_their_gradients_before_squaring() -> None:
    batch = batch_of(RAGGED)
    assert_matches_oracle(Repeating(), batch, padded(batch))


class Bigram(nn.Module):
    """logits of the next token = a row of a table of zeros: every score is known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 2, _weight=torch.zeros(2, 2, dtype=torch.float64))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        return Output(self.table(input_ids))


def test_bigram_by_hand() -> None:
    # From row 0: one action scores (½, -½); two equal ones add up; two different ones cancel. n scales by n².
    sequences = [torch.tensor(s) for s in ([0, 0], [0, 0, 0], [0, 0, 1], [0, 1])]
    masks = [torch.arange(len(s)) > 0 for s in sequences]
    batch = Batch(sequences, masks, torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64))
    expected = torch.tensor([0.5, 2.0, 0.0, 4.5], dtype=torch.float64)
    oracle = squared_score_norms_oracle(Bigram(), sequences, masks, batch.normalisers)
    torch.testing.assert_close(oracle, expected)
    torch.testing.assert_close(taped_norms(Bigram(), batch, packed(batch)), expected)


def formed(uses: Sequence[Factor], where: Tensor, vocabulary: int) -> Tensor:
    """The gradient of one trajectory, formed."""
    total = torch.zeros(())
    for use in uses:
        if isinstance(use, Outer):
            total = total + use.rows[where].mT @ use.columns[where]
        elif isinstance(use, Lookup):
            one_hot = functional.one_hot(use.tokens[where], vocabulary).to(use.columns.dtype)
            total = total + one_hot.mT @ use.columns[where]
        else:
            total = total + use.values[where].sum(0)
    return total


@settings(deadline=None, max_examples=60)
@given(
    segments=st.lists(st.integers(-1, 4), min_size=1, max_size=40),
    p=st.integers(1, 9),
    d=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_factored_norms_equal_formed_gradients(segments: list[int], p: int, d: int, seed: int) -> None:
    """Any assignment of positions to trajectories, interleaved and empty ones included."""
    generator = torch.Generator().manual_seed(seed)
    positions = len(segments)

    def random(width: int) -> Tensor:
        return torch.randn(positions, width, generator=generator, dtype=torch.float64)

    def tokens() -> Tensor:
        return torch.randint(p, (positions,), generator=generator)

    shared = random(d)
    parameters: list[list[Factor]] = [
        [Outer(random(p), shared)],
        [Outer(random(p + 1), shared)],
        [Outer(random(p), random(d)), Outer(random(p), random(d))],
        [Lookup(tokens(), random(d))],
        [Lookup(tokens(), random(d)), Outer(random(p), random(d)), Lookup(tokens(), random(d))],
        [Vector(random(p)), Vector(random(p))],
    ]
    owners = torch.tensor(segments)
    expected = [
        torch.stack([formed(uses, owners == i, p).square().sum() for uses in parameters]).sum()
        for i in range(5)
    ]
    norms = total_squared_norms(parameters, Layout.of(owners[None], 5))
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_models_give_float32_norms(precision: torch.dtype, tolerance: float) -> None:
    model, batch = llama(), batch_of(RAGGED)
    expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    norms = taped_norms(nn.Module.to(model, precision), batch, packed(batch))
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), expected, rtol=tolerance, atol=0.0)


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2-tied"])
def test_graph_still_gives_plain_gradients(name: str) -> None:
    model, batch = MODELS[name](), batch_of(RAGGED)
    rows = packed(batch)
    objective_of(forward(model, rows), batch, rows).backward()
    plain = grads_of(model)
    model.zero_grad()
    with ScoreTape(model) as tape:
        objective = objective_of(forward(model, rows), batch, rows)
        tape.squared_norms(objective, rows.segments, len(RAGGED), retain_graph=True)
    assert not grads_of(model)
    objective.backward()
    assert all(torch.equal(one, other) for one, other in zip(plain, grads_of(model), strict=True))


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def test_no_hook_stays_even_after_an_error() -> None:
    model = llama()
    with ScoreTape(model):
        assert hooks_of(model) > 0
    assert hooks_of(model) == 0
    with pytest.raises(KeyboardInterrupt), ScoreTape(model):
        raise KeyboardInterrupt
    assert hooks_of(model) == 0


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_is_exact() -> None:
    model, batch = llama().train(), batch_of(RAGGED)
    rows = packed(batch)
    objective_of(forward(model, rows), batch, rows).backward()
    plain = grads_of(model)
    expected = taped_norms(model, batch, rows)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with ScoreTape(model) as tape:
        objective = objective_of(forward(model, rows), batch, rows)
        norms = tape.squared_norms(objective, rows.segments, len(RAGGED), retain_graph=True)
        objective.backward()
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(grads_of(model), plain, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_is_refused() -> None:
    model, batch = llama().train(), batch_of(RAGGED)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0\..* ran without gradient"):
        taped_norms(model, batch, packed(batch))


class Gate(nn.Module):
    """Not affine in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sigmoid()


class LoudLinear(nn.Linear):
    """A linear layer only by inheritance."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [Gate(), LoudLinear(12, 12), nn.Embedding(4, 4, max_norm=1.0), nn.Bilinear(2, 2, 2), nn.PReLU(12)],
)
def test_unsupported_layer_is_named(layer: nn.Module) -> None:
    model = llama()
    model.get_submodule("model.layers.1.mlp").add_module("odd", layer)
    with pytest.raises(
        UnsupportedLayerError, match=rf"model\.layers\.1\.mlp\.odd \({type(layer).__name__}\)"
    ):
        ScoreTape(model)
    layer.requires_grad_(False)
    ScoreTape(model)


def test_bypassed_module_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    with ScoreTape(model) as tape:
        hidden = model.get_submodule("model")(input_ids=rows.ids, position_ids=rows.positions)[0]
    logits = functional.linear(hidden, model.get_parameter("lm_head.weight"))
    objective = objective_of(logits, batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"lm_head \(Linear\) was not called"):
        tape.squared_norms(objective, rows.segments, len(RAGGED), retain_graph=False)


def test_parameter_used_beside_its_module_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    with ScoreTape(model) as tape:
        logits = forward(model, rows)
    head = model.get_parameter("lm_head.weight")
    objective = objective_of(logits + functional.linear(torch.ones(12).double(), head), batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"lm_head\.weight is also used outside"):
        tape.squared_norms(objective, rows.segments, len(RAGGED), retain_graph=False)


class InPlace(Repeating):
    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        return Output(self.head(self.norm(self.mix(self.embed(input_ids)).relu_())))


def test_output_changed_in_place_is_named() -> None:
    batch = batch_of(RAGGED)
    with pytest.raises(
        UnsupportedLayerError, match=r"mix \(Linear\) had its input or output changed in place"
    ):
        taped_norms(InPlace(), batch, padded(batch))


def test_positions_shared_by_rows_are_named() -> None:
    model, batch = gpt2(), batch_of(RAGGED)
    rows = padded(batch)
    with ScoreTape(model) as tape:
        logits = model(input_ids=rows.ids, use_cache=False).logits  # [1, T] position ids, made inside
    objective = objective_of(logits, batch, rows)
    with pytest.raises(
        UnsupportedLayerError, match=r"transformer\.wpe \(Embedding\) saw \(1, 17\) positions"
    ):
        tape.squared_norms(objective, rows.segments, len(RAGGED), retain_graph=False)


def test_nan_is_named_by_its_trajectory() -> None:
    batch = batch_of(RAGGED)
    batch.normalisers[3] = float("nan")
    with pytest.raises(NonFiniteError, match="squared score norm at trajectory index 3"):
        taped_norms(llama(), batch, padded(batch))


def test_misused_inputs_are_refused() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    with ScoreTape(model) as tape:
        objective = objective_of(forward(model, rows), batch, rows)
    with pytest.raises(VcpoError, match="the objective has no gradient"):
        tape.squared_norms(objective.detach(), rows.segments, len(RAGGED), retain_graph=True)
    other = torch.ones((), requires_grad=True) * 2
    with pytest.raises(VcpoError, match="does not depend on the recorded forward pass"):
        tape.squared_norms(other, rows.segments, len(RAGGED), retain_graph=True)
    with pytest.raises(VcpoError, match="name trajectory 5, but there are only 3"):
        tape.squared_norms(objective, rows.segments, 3, retain_graph=True)
    with pytest.raises(VcpoError, match="first token"):
        squared_score_norms_oracle(model, [torch.tensor([1, 2])], [torch.tensor([True, True])], [1.0])
