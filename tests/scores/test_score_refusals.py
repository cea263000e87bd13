"""What would make norms or gradients silently wrong is refused, and the module named.

Each model here is one that a tape once took without a word; the right answer, where there is one, is that of
one backward pass a trajectory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from score_cases import VOCABULARY, batch_of, objective_of, packed, padded, rows_of, separate_gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vcpo.errors import UnsupportedLayerError, VcpoError
from vcpo.scores import ScoreTape

torch.set_num_threads(1)

WIDTH = 8
LENGTHS = (3, 5, 4, 2)


class Between(nn.Module):
    """Table, something, head."""

    def __init__(self, middle: nn.Module, call: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.table: nn.Module = nn.Embedding(VOCABULARY, WIDTH)
        self.middle: Any = middle
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.call = call or (lambda module, x: module(x))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.call(self.middle, self.table(tokens)))


class GatedNorm(nn.Module):
    """As in Mamba 2: alone a scale norm, with a gate another function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * functional.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class ResidualNorm(GatedNorm):
    """Gives two tensors when it is given two."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return super().forward(x) if residual is None else (super().forward(x + residual), x + residual)


class ScalarScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class DroppingNorm(GatedNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)


class SpecialTable(nn.Embedding):
    """Scales some tokens only."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.where((input >= 9)[..., None], 0.1, 1.0) * super().forward(input)


class ScaledTable(nn.Embedding):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) * scale


def measure(model: nn.Module, rows: Any, batch: Any) -> Tensor:
    tape = ScoreTape(model, method="exact")
    with tape:
        logits = model(rows.ids)
    return tape.measure(objective_of(logits, batch, rows), rows.segments, len(batch.sequences)).squared_norms


def separate(model: nn.Module, batch: Any, rows: Any) -> dict[str, Tensor]:
    """Each trajectory's gradient of each parameter, [N, ...]."""
    each = separate_gradients(model, model(rows.ids), batch, rows)
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def squared(gradients: dict[str, Tensor], *names: str) -> Tensor:
    parts = [gradients[name] for name in names or gradients]
    return torch.stack([part.flatten(1).square().sum(1) for part in parts]).sum(0)


@pytest.mark.parametrize("call", [lambda m, x: m(x, x.flip(-1)), lambda m, x: m(gate=x.flip(-1), x=x)])
def test_norm_with_a_gate_is_refused_and_without_is_measured(call: Callable[..., Tensor]) -> None:
    batch = batch_of(LENGTHS)
    rows = padded(batch)
    with pytest.raises(UnsupportedLayerError, match=r"middle \(GatedNorm\) was called with more than one"):
        measure(Between(GatedNorm(), call), rows, batch)
    alone = Between(GatedNorm(), lambda m, x: m(x, None))
    torch.testing.assert_close(
        measure(alone, rows, batch), squared(separate(alone, batch, rows)), rtol=1e-8, atol=0.0
    )


def test_norm_that_gives_two_tensors_is_named() -> None:
    batch = batch_of(LENGTHS)
    model = Between(ResidualNorm(), lambda m, x: m(x, x)[0])
    with pytest.raises(UnsupportedLayerError, match=r"middle \(ResidualNorm\) was called with more than one"):
        measure(model, padded(batch), batch)


class DetachedScale(GatedNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * self.weight.detach()


class SlowScale(GatedNorm):
    """The weight's gradient is a tenth of what it would be."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * (0.1 * self.weight + 0.9 * self.weight.detach())


@pytest.mark.parametrize(
    "middle", [nn.PReLU(), ScalarScale(), DroppingNorm().eval(), DetachedScale(), SlowScale()]
)
def test_scales_that_are_no_vector_or_draw_numbers_have_no_rule(middle: nn.Module) -> None:
    with pytest.raises(UnsupportedLayerError, match="no score-norm rule for middle"):
        ScoreTape(Between(middle).eval())


def test_tables_with_special_tokens_or_arguments() -> None:
    model = Between(nn.Identity())
    model.table = SpecialTable(VOCABULARY, WIDTH).double()
    with pytest.raises(UnsupportedLayerError, match="no score-norm rule for table"):
        ScoreTape(model)
    batch = batch_of(LENGTHS)
    scaled = Between(ScaledTable(VOCABULARY, WIDTH), lambda m, x: x)
    scaled.table = scaled.middle
    scaled.forward = lambda tokens: scaled.head(scaled.table(tokens, scale=2.5))  # pyright: ignore
    with pytest.raises(UnsupportedLayerError, match=r"\(ScaledTable\) was called with more than one"):
        measure(scaled, padded(batch), batch)


@pytest.mark.parametrize("count", [4, 6])
def test_layer_that_sees_rows_and_positions_exchanged(count: int) -> None:
    """As many rows as positions: the shape alone would not tell."""
    batch = batch_of([6] * count)
    model = Between(nn.Linear(WIDTH, WIDTH), lambda m, x: m(x.transpose(0, 1)).tanh().transpose(0, 1))
    with pytest.raises(
        UnsupportedLayerError,
        match=r"positions.*but the segments are",
    ):
        measure(model, padded(batch), batch)


def test_gradient_hooks_are_named() -> None:
    batch = batch_of(LENGTHS)
    model = Between(nn.Linear(WIDTH, WIDTH))
    handle = model.middle.weight.register_hook(lambda g: 3 * g)
    with pytest.raises(UnsupportedLayerError, match=r"middle .*has a gradient hook on weight"):
        measure(model, padded(batch), batch)
    handle.remove()
    model.head.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(UnsupportedLayerError, match=r"head .*finished gradient of bias"):
        measure(model, padded(batch), batch)


def test_weights_that_are_functions_of_the_parameters_are_named() -> None:
    batch = batch_of(LENGTHS)
    model, rows = Between(nn.Linear(WIDTH, WIDTH)), padded(batch)
    tape = ScoreTape(model)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedLayerError, match="computes weight from other parameters"), tape:
        torch.func.functional_call(model, doubled, (rows.ids,))


def test_parameter_thawed_while_the_tape_runs_is_named() -> None:
    batch = batch_of(LENGTHS)
    model, rows = Between(nn.Linear(WIDTH, WIDTH)), padded(batch)
    model.middle.requires_grad_(False)
    tape = ScoreTape(model)
    with tape:
        model.middle.requires_grad_(True)
        logits = model(rows.ids)
    with pytest.raises(UnsupportedLayerError, match=r"middle \(Linear\) became trainable while"):
        tape.measure(objective_of(logits, batch, rows), rows.segments, len(LENGTHS))


def test_weight_thawed_beside_a_trainable_bias_while_the_tape_runs_is_named() -> None:
    model = Between(nn.Linear(WIDTH, WIDTH))
    model.middle.weight.requires_grad_(False)
    tape = ScoreTape(model)
    with pytest.raises(UnsupportedLayerError, match=r"middle \(Linear\) had its weight thawed while"), tape:
        model.middle.weight.requires_grad_(True)
        model(padded(batch_of(LENGTHS)).ids)


def test_record_of_an_input_buffer_that_was_filled_again_is_refused() -> None:
    torch.manual_seed(0)
    model, buffer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(2, 3, WIDTH)
    tape = ScoreTape(model, method="sketched")
    with tape:
        output = model(buffer)
    record = tape.measure(output.sum(), torch.arange(6).view(2, 3), 6)
    buffer.copy_(torch.randn_like(buffer))
    with pytest.raises(VcpoError, match="changed in place after it was measured"):
        record.backward(torch.ones(6))


def test_objective_that_reaches_padding_is_refused() -> None:
    batch = batch_of(LENGTHS)
    model, rows = Between(nn.Linear(WIDTH, WIDTH)), rows_of(batch, [[0, 1], [2], [3]])
    tape = ScoreTape(model)
    with tape:
        logits = model(rows.ids)
    wrong = rows.segments.masked_fill(rows.segments == 3, -1)
    with pytest.raises(VcpoError, match=r"head \(Linear\), on positions that the segments call padding"):
        tape.measure(objective_of(logits, batch, rows), wrong, len(LENGTHS))


def _earlier(module: nn.Module, x: Tensor) -> Tensor:
    """What attention does: later positions get something from the earlier ones."""
    return module(x).cumsum(1).tanh()


@pytest.mark.parametrize("method", ["exact", "sketched"])
@pytest.mark.parametrize(
    ("middle", "call", "named"),
    [
        (nn.Linear(WIDTH, WIDTH), _earlier, r"middle \(Linear\)"),
        (GatedNorm(), lambda m, x: _earlier(m, x[:, None].repeat(1, 3, 1, 1)).cumsum(2).sum(1), "middle"),
        (nn.Identity(), _earlier, r"table \(Embedding\)"),
    ],
)
def test_prompt_that_is_called_padding_is_refused(
    middle: nn.Module, call: Callable[..., Tensor], named: str, method: str
) -> None:
    """The head gives nothing there, but other layers pass on what later positions read."""
    batch = batch_of([6, 5, 4])
    for mask in batch.masks:
        mask[:3] = False
    model, rows = Between(middle, call), padded(batch)
    segments = rows.segments.clone()
    segments[:, :2] = -1
    tape = ScoreTape(model, method=method)
    with tape:
        logits = model(rows.ids)
    with pytest.raises(VcpoError, match=f"{named}.*that the segments call padding"):
        tape.measure(objective_of(logits, batch, rows), segments, 3)


def test_module_that_is_shown_rows_from_behind_is_named() -> None:
    batch = batch_of(LENGTHS)
    model = Between(nn.Linear(WIDTH, WIDTH), lambda m, x: m(x.flip(1)).tanh().flip(1))
    with pytest.raises(VcpoError, match=r"middle \(Linear\), on positions that the segments call padding"):
        measure(model, padded(batch), batch)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.zeros(2, 3), r"whole numbers of shape \[R, T\], not torch.float32 \(2, 3\)"),
        (torch.zeros(6, dtype=torch.long), r"not torch.int64 \(6,\)"),
        (torch.full((2, 3), -2), "name trajectory -2; padding is -1"),
    ],
)
def test_segments_are_checked(segments: Tensor, message: str) -> None:
    model = Between(nn.Identity())
    tape = ScoreTape(model)
    with tape:
        total = model(torch.ones(2, 3, dtype=torch.long)).sum()
    with pytest.raises(VcpoError, match=message):
        tape.measure(total, segments, 1)


def test_objective_must_be_one_number() -> None:
    model = Between(nn.Identity())
    tape = ScoreTape(model)
    with tape:
        logits = model(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(VcpoError, match=r"the objective has shape \(2, 3\)"):
        tape.measure(logits.sum(-1), torch.zeros(2, 3, dtype=torch.long), 1)


def test_record_does_not_depend_on_the_callers_token_buffer() -> None:
    """Static input buffers are filled with the next batch while a record waits for its coefficients."""
    batch = batch_of(LENGTHS)
    model, rows = Between(nn.Linear(WIDTH, WIDTH)), packed(batch)
    tape = ScoreTape(model, method="exact")
    coefficients = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    each = separate(model, batch, rows)
    with tape:
        logits = model(rows.ids)
    record = tape.measure(objective_of(logits, batch, rows), rows.segments, len(LENGTHS))
    rows.ids.copy_(rows.ids.flip(-1))
    record.backward(coefficients)
    for name, parameter in model.named_parameters():
        expected = torch.tensordot(coefficients, each[name], 1)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("change", [lambda y: y[..., 0].zero_(), lambda y: y.view(-1, WIDTH).add_(1)])
def test_view_of_an_output_changed_in_place_is_named(change: Callable[[Tensor], Tensor]) -> None:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        change(y)
        return y

    batch = batch_of(LENGTHS)
    with pytest.raises(UnsupportedLayerError, match=r"middle .*had its output changed in place"):
        measure(Between(nn.Linear(WIDTH, WIDTH), call), padded(batch), batch)


def test_hooks_go_with_their_tape() -> None:
    model = Between(nn.Identity())
    for _ in range(3):
        ScoreTape(model)
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("inside", [False, True])
def test_other_graphs_are_recomputed_as_they_were_while_a_recording_waits(inside: bool) -> None:
    """A graph made without the tape has no taps; nor has what checkpointing makes of it again."""
    batch = batch_of(LENGTHS)
    model, rows = Between(nn.Linear(WIDTH, WIDTH)), padded(batch)
    model.call = lambda m, x: checkpoint(lambda y: m(y).tanh(), x, use_reentrant=False)  # pyright: ignore
    expected = torch.autograd.grad(objective_of(model(rows.ids), batch, rows), model.middle.weight)
    before = objective_of(model(rows.ids), batch, rows)
    tape = ScoreTape(model)
    with tape:
        model(rows.ids)
        found = torch.autograd.grad(before, model.middle.weight) if inside else None
    if not inside:
        found = torch.autograd.grad(objective_of(model(rows.ids), batch, rows), model.middle.weight)
    torch.testing.assert_close(found, expected)


class ModalNorm(GatedNorm):
    """Scales twice as much in eval mode."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) * (1 if self.training else 2)


class ContextNorm(GatedNorm):
    """Adds the row's mean: no part of w ⊙ x̂, and with one position in a row like 1 + w."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * self.weight + x.mean(1, keepdim=True)


@pytest.mark.parametrize("middle", [ModalNorm(), ContextNorm()])
def test_scale_norms_in_eval_mode_match_the_oracle(middle: nn.Module) -> None:
    batch = batch_of([4] * 4)
    model, rows = Between(middle).eval(), padded(batch)
    found = measure(model, rows, batch)
    torch.testing.assert_close(found, squared(separate(model, batch, rows)), rtol=1e-8, atol=0.0)


class Repeated(GatedNorm):
    """A weight for half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH // 2))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * self.weight.repeat(x.shape[-1] // len(self.weight))


def test_scale_for_half_of_the_channels_is_named() -> None:
    batch = batch_of(LENGTHS)
    with pytest.raises(UnsupportedLayerError, match=r"middle \(Repeated\) saw 8 channels with 4 weights"):
        measure(Between(Repeated()), padded(batch), batch)


def test_positions_expanded_over_as_many_rows() -> None:
    batch = batch_of([4] * 4)
    model, rows = Between(nn.Embedding(4, WIDTH)), padded(batch)
    places = torch.arange(4).expand(4, 4)
    model.call = lambda module, x: x + module(places)  # pyright: ignore
    found = measure(model, rows, batch)
    torch.testing.assert_close(found, squared(separate(model, batch, rows)), rtol=1e-8, atol=0.0)


def test_only_takes_one_name() -> None:
    model = Between(nn.Linear(WIDTH, WIDTH))
    tape = ScoreTape(model, only="middle")  # pyright: ignore[reportArgumentType]
    batch = batch_of(LENGTHS)
    rows = padded(batch)
    with tape:
        logits = model(rows.ids)
    norms = tape.squared_norms(objective_of(logits, batch, rows), rows.segments, len(LENGTHS))
    each = separate(model, batch, rows)
    expected = squared(each, "middle.weight", "middle.bias")
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0.0)
