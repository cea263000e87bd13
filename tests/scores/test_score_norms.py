"""Score norms from one batched backward pass, against one backward pass a trajectory, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_cases import (
    MODELS,
    RAGGED,
    VOCABULARY,
    Batch,
    Rows,
    batch_of,
    build,
    forward,
    gpt2,
    llama,
    objective_of,
    packed,
    padded,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from vcpo.errors import NonFiniteError, UnsupportedLayerError, VcpoError
from vcpo.scores import ScoreTape, squared_score_norms_oracle
from vcpo.scores.choice import METHODS
from vcpo.scores.collector import Collector
from vcpo.scores.factors import Factor, Lookup, Outer, Vector
from vcpo.scores.layout import BUDGET, Layout
from vcpo.scores.sketch import Signs

torch.set_num_threads(1)


def taped_norms(model: nn.Module, batch: Batch, rows: Rows, budget: int = BUDGET) -> Tensor:
    with ScoreTape(model, method="exact", budget=budget) as tape:
        logits = forward(model, rows)
    objective = objective_of(logits, batch, rows)
    return tape.squared_norms(objective, rows.segments, len(batch.sequences))


def assert_matches_oracle(model: nn.Module, batch: Batch, rows: Rows, budget: int = BUDGET) -> None:
    norms = taped_norms(model, batch, rows, budget)
    expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0.0)
    assert (norms > 0).tolist() == [bool(mask.any()) for mask in batch.masks]


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms sum their weight gradients in float32, the oracle's too: let them stay in float64."""
    rounded = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))


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
        norms = tape.squared_norms(objective, rows.segments, len(RAGGED))
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
            assert isinstance(use.rows, Tensor)
            total = total + use.rows[where].mT @ use.columns[where]
        elif isinstance(use, Lookup):
            one_hot = functional.one_hot(use.tokens[where], vocabulary).to(use.columns.dtype)
            total = total + one_hot.mT @ use.columns[where]
        else:
            assert isinstance(use.values, Tensor)
            total = total + use.values[where].sum(0)
    return total


@settings(deadline=None, max_examples=60)
@given(
    segments=st.lists(st.integers(-1, 4), min_size=1, max_size=40),
    p=st.integers(1, 9),
    d=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    keep=st.booleans(),
)
def test_collected_norms_equal_formed_gradients(
    segments: list[int], p: int, d: int, seed: int, keep: bool
) -> None:
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
        [Lookup(tokens(), random(d), p)],
        [Lookup(tokens(), random(d), p), Outer(random(p), random(d)), Lookup(tokens(), random(d), p)],
        [Vector(random(p)), Vector(random(p))],
    ]
    owners = torch.tensor(segments)
    expected = [
        torch.stack([formed(uses, owners == i, p).square().sum() for uses in parameters]).sum()
        for i in range(5)
    ]
    names = {torch.empty(0): f"parameter {k}" for k in range(len(parameters))}
    uses = {key: len(parameters[k]) for k, key in enumerate(names)}
    signs = Signs(0, METHODS["exact"].columns)
    collector = Collector(Layout.of(owners[None], 5), METHODS["exact"], signs, uses, names, keep=keep)
    for key, factors in zip(names, parameters, strict=True):
        for factor in factors:
            collector.add(key, factor)
    norms, variances = collector.finish()
    assert not variances.any()
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_models_give_float32_norms(precision: torch.dtype, tolerance: float) -> None:
    model, batch = llama(), batch_of(RAGGED)
    expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    norms = taped_norms(nn.Module.to(model, precision), batch, packed(batch))
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), expected, rtol=tolerance, atol=0.0)


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
        tape.squared_norms(objective, rows.segments, len(RAGGED))


def test_parameter_used_beside_its_module_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    with ScoreTape(model) as tape:
        logits = forward(model, rows)
    head = model.get_parameter("lm_head.weight")
    objective = objective_of(logits + functional.linear(torch.ones(12).double(), head), batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"lm_head\.weight is also used outside"):
        tape.squared_norms(objective, rows.segments, len(RAGGED))


class InPlace(Repeating):
    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        return Output(self.head(self.norm(self.mix(self.embed(input_ids)).relu_())))


def test_output_changed_in_place_is_named() -> None:
    batch = batch_of(RAGGED)
    with pytest.raises(UnsupportedLayerError, match=r"mix \(Linear\) .*had its output changed in place"):
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
        tape.squared_norms(objective, rows.segments, len(RAGGED))


def test_nan_is_named_by_its_trajectory() -> None:
    batch = batch_of(RAGGED)
    batch.normalisers[3] = float("nan")
    with pytest.raises(NonFiniteError, match="squared score norm at trajectory index 3"):
        taped_norms(llama(), batch, padded(batch))


def test_misused_inputs_are_refused() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    tape = ScoreTape(model)

    def recorded() -> Tensor:
        with tape:
            return objective_of(forward(model, rows), batch, rows)

    with pytest.raises(VcpoError, match="nothing is recorded"):
        tape.squared_norms(objective_of(forward(model, rows), batch, rows), rows.segments, len(RAGGED))
    with pytest.raises(VcpoError, match="the objective has no gradient"):
        tape.squared_norms(recorded().detach(), rows.segments, len(RAGGED))
    recorded()
    with pytest.raises(VcpoError, match="does not depend on the recorded forward pass"):
        tape.squared_norms(torch.ones((), requires_grad=True) * 2, rows.segments, len(RAGGED))
    objective = recorded()
    with pytest.raises(VcpoError, match="name trajectory 5, but there are only 3"):
        tape.squared_norms(objective, rows.segments, 3)
    objective = recorded()
    tape.measure(objective, rows.segments, len(RAGGED))
    with pytest.raises(VcpoError, match="nothing is recorded"):
        tape.measure(objective, rows.segments, len(RAGGED))
    with pytest.raises(VcpoError, match="no score-norm method 'precise': choose exact or sketched"):
        ScoreTape(model, method="precise")
    with pytest.raises(VcpoError, match="no module with trainable parameters is called head"):
        ScoreTape(model, only=["head"])
    with pytest.raises(VcpoError, match="first token"):
        squared_score_norms_oracle(model, [torch.tensor([1, 2])], [torch.tensor([True, True])], [1.0])
