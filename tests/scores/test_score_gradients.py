"""The weighted gradient of a record, and the ways to get it, against one backward pass a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from score_cases import (
    MODELS,
    RAGGED,
    Batch,
    Rows,
    batch_of,
    forward,
    gradient_oracle,
    gradients_of,
    llama,
    objective_of,
    packed,
    padded,
)
from torch import Tensor, nn

from vcpo.errors import NonFiniteError, UnsupportedLayerError, VcpoError
from vcpo.scores import Record, ScoreTape, squared_score_norms_oracle
from vcpo.scores.choice import Choice

torch.set_num_threads(1)

COEFFICIENTS = torch.tensor([0.7, -1.3, 0.4, 0.0, -2.0, 1.1], dtype=torch.float64)

CHOICES = {
    "formed": Choice(columns=0, formed_from=0.0),
    "ghost": Choice(columns=0, formed_from=torch.inf),
    "sketch": Choice(columns=4, formed_from=torch.inf, sketched_below=torch.inf),
}


@pytest.fixture(autouse=True)
def gradients_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm layers compute in float32 whatever the model's type: let them stay in float64."""
    rounded = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))


def measured(model: nn.Module, tape: ScoreTape, batch: Batch, rows: Rows) -> Record:
    with tape:
        objective = objective_of(forward(model, rows), batch, rows)
    return tape.measure(objective, rows.segments, len(batch.sequences))


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], *, rtol: float = 1e-9) -> None:
    for name, gradient in gradients_of(model).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("lay_out", [padded, packed])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_every_model(name: str, lay_out: Callable[[Batch], Rows], choice: str) -> None:
    model, batch = MODELS[name](), batch_of(RAGGED)
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    norms = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    record = measured(model, ScoreTape(model, method=CHOICES[choice]), batch, lay_out(batch))
    assert all(p.grad is None for p in model.parameters())
    record.backward(COEFFICIENTS)
    assert_gradients(model, expected)
    if choice != "sketch":
        torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
        assert not record.relative_errors.any()


def test_gradients_of_micro_batches_add_up() -> None:
    """Gradient accumulation, and a group that spans two micro-batches: both records are held until then."""
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    tape, records = ScoreTape(model), []
    for part in (slice(0, 4), slice(4, 6)):
        own = Batch(batch.sequences[part], batch.masks[part], batch.normalisers[part])
        records.append((part, measured(model, tape, own, padded(own))))
    for part, record in records:
        record.backward(COEFFICIENTS[part])
    assert_gradients(model, expected)


def test_gradient_is_added_to_what_is_there() -> None:
    model, batch = llama(), batch_of(RAGGED)
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    measured(model, ScoreTape(model), batch, packed(batch)).backward(COEFFICIENTS)
    assert_gradients(model, {name: gradient + 1 for name, gradient in expected.items()})


def test_ordinary_backward_with_norms_on_its_way() -> None:
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    rows, ones = packed(batch), torch.ones(len(RAGGED), dtype=torch.float64)
    expected = gradient_oracle(model, batch, ones)
    tape = ScoreTape(model, method="exact")
    with tape:
        objective = objective_of(forward(model, rows), batch, rows)
    norms = tape.backward(objective, rows.segments, len(RAGGED)).squared_norms
    oracle = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    torch.testing.assert_close(norms, oracle, rtol=1e-8, atol=0.0)
    assert_gradients(model, expected)


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    yield
    model.gradient_checkpointing_disable()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("choice", ["formed", "ghost"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2-tied"])
def test_gradient_checkpointing(name: str, choice: str) -> None:
    model, batch = MODELS[name](), batch_of(RAGGED)
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    norms = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    rows, tape = packed(batch), ScoreTape(model, method=CHOICES[choice])
    with checkpointed(model):
        record = measured(model, tape, batch, rows)
        torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
        record.backward(COEFFICIENTS)
        assert_gradients(model, expected)
        with tape:
            objective = objective_of(forward(model, rows), batch, rows)
        streamed = tape.squared_norms(objective, rows.segments, len(RAGGED))
        torch.testing.assert_close(streamed, norms, rtol=1e-8, atol=0.0)
        model.zero_grad()
        objective_of(forward(model, rows), batch, rows).backward()  # plain again, no tape
        ones = torch.ones(len(RAGGED), dtype=torch.float64)
    assert_gradients(model, gradient_oracle(model, batch, ones))


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_is_refused() -> None:
    model, batch = llama().train(), batch_of(RAGGED)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0\..* ran without gradient"):
        measured(model, ScoreTape(model), batch, packed(batch))


def test_frozen_parameters_get_no_gradient() -> None:
    model, batch = llama(attention_bias=True), batch_of(RAGGED)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("v_proj" in name)
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    measured(model, ScoreTape(model), batch, packed(batch)).backward(COEFFICIENTS)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(expected)
    assert_gradients(model, expected)


def test_norms_of_some_modules_only() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    tape = ScoreTape(model, method="exact", only=["lm_head"])
    with tape:
        objective = objective_of(forward(model, rows), batch, rows)
    norms = tape.squared_norms(objective, rows.segments, len(RAGGED))
    model.requires_grad_(False).get_submodule("lm_head").requires_grad_(True)
    expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0.0)
    with pytest.raises(VcpoError, match="restricted by only="):
        tape.measure(objective, rows.segments, len(RAGGED))


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_low_precision_models(precision: torch.dtype, tolerance: float) -> None:
    """Gradients of bfloat16 weights are bfloat16, as autograd's; their direction is what must hold."""
    model, batch = llama(), batch_of(RAGGED)
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    for choice in CHOICES.values():
        low = nn.Module.to(model, precision)
        low.zero_grad()
        measured(low, ScoreTape(low, method=choice), batch, packed(batch)).backward(COEFFICIENTS)
        gradients = gradients_of(low)
        assert all(g.dtype == precision for g in gradients.values())
        error = sum(float((gradients[n].double() - g).square().sum()) for n, g in expected.items())
        assert error < tolerance**2 * sum(float(g.square().sum()) for g in expected.values())


def test_record_gives_its_gradient_once_and_checks_coefficients() -> None:
    model, batch = llama(), batch_of(RAGGED)
    record = measured(model, ScoreTape(model), batch, packed(batch))
    with pytest.raises(VcpoError, match=r"6 trajectories, but coefficients of shape \(5,\)"):
        record.backward(COEFFICIENTS[:5])
    with pytest.raises(NonFiniteError, match="coefficient at trajectory index 2"):
        record.backward(COEFFICIENTS.clone().index_fill_(0, torch.tensor([2]), torch.nan))
    record.backward(COEFFICIENTS)
    with pytest.raises(VcpoError, match="has given its gradient already"):
        record.backward(COEFFICIENTS)


def test_tape_can_be_taken_off() -> None:
    model, batch = llama(), batch_of(RAGGED)
    tape = ScoreTape(model)
    tape.remove()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UnsupportedLayerError, match="was not called while the tape ran"):
        measured(model, tape, batch, packed(batch))


def test_parameter_that_is_not_contiguous() -> None:
    model, batch = llama(), batch_of(RAGGED)
    head: Any = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.weight.detach().t().contiguous().t())
    expected = gradient_oracle(model, batch, COEFFICIENTS)
    measured(model, ScoreTape(model, method=CHOICES["formed"]), batch, packed(batch)).backward(COEFFICIENTS)
    assert_gradients(model, expected)
