"""Sketched norms: unbiased, with the error they state, the same however the batch is cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from score_cases import (
    RAGGED,
    Batch,
    Rows,
    batch_of,
    forward,
    gpt2,
    llama,
    objective_of,
    packed,
    padded,
    rows_of,
)
from torch import Tensor, nn

from vcpo.errors import VcpoError
from vcpo.scores import Record, ScoreTape, squared_score_norms_oracle
from vcpo.scores.choice import METHODS, Choice
from vcpo.scores.factors import Lookup, Outer
from vcpo.scores.layout import Layout
from vcpo.scores.sketch import Signs, project_rows, sketched_norms

torch.set_num_threads(1)

ACTIVE = [1, 3, 4, 5]
"""The trajectories of the ragged batch that have actions; the others' norms are 0."""

SKETCH = Choice(columns=8, formed_from=torch.inf, sketched_below=torch.inf)


def measured(model: nn.Module, batch: Batch, rows: Rows, *, seed: int = 0, choice: Choice = SKETCH) -> Record:
    tape = ScoreTape(model, method=choice, seed=seed)
    with tape:
        objective = objective_of(forward(model, rows), batch, rows)
    record = tape.measure(objective, rows.segments, len(batch.sequences))
    tape.remove()
    return record


class Given(Signs):
    """Signs that are told, not drawn."""

    def __init__(self, signs: Tensor) -> None:
        super().__init__(seed=0, columns=1)
        self.signs = signs

    def of(self, key: str, width: int, like: Tensor) -> Tensor:
        return self.signs.to(like)


@pytest.mark.filterwarnings("ignore:var")  # one column says nothing about its error
def test_mean_over_all_signs_is_the_squared_norm() -> None:
    """r = 1: every pattern of signs once. Two uses of one matrix, a product and a table, must add first."""
    generator = torch.Generator().manual_seed(0)
    p, d, positions = 5, 4, 6
    rows, columns, embedded = (
        torch.randn(positions, width, generator=generator, dtype=torch.float64) for width in (p, d, d)
    )
    tokens = torch.tensor([0, 2, 4, 1, 0, 3])
    uses = [Outer(rows, columns), Lookup(tokens, embedded, p)]
    layout = Layout.of(torch.tensor([[0, 0, 1, 1, 0, -1]]), 2)
    gradients = [
        sum(
            torch.outer(rows[t], columns[t]) + torch.outer(torch.eye(p).double()[tokens[t]], embedded[t])
            for t in own
        )
        for own in ((0, 1, 4), (2, 3))
    ]
    expected = torch.stack([torch.as_tensor(g).square().sum() for g in gradients])

    total = torch.zeros(2, dtype=torch.float64)
    patterns = list(itertools.product((-1.0, 1.0), repeat=p))
    for pattern in patterns:
        given = Given(torch.tensor(pattern)[:, None])
        projected = [(project_rows(use, given, "w"), use.columns) for use in uses]
        total += sketched_norms(projected, layout).squared_norms
    torch.testing.assert_close(total / len(patterns), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("model", [llama, gpt2])
def test_sketches_average_to_the_exact_norms_and_err_as_they_say(model) -> None:
    """200 seeds: the mean is right within its own standard error, and so is the estimated error."""
    policy, batch = model(), batch_of(RAGGED)
    rows = packed(batch)
    exact = squared_score_norms_oracle(policy, batch.sequences, batch.masks, batch.normalisers)[ACTIVE]
    records = [measured(policy, batch, rows, seed=seed) for seed in range(200)]
    ratios = torch.stack([record.squared_norms[ACTIVE] for record in records]) / exact
    assert not any(record.squared_norms[[0, 2]].any() for record in records)
    errors = torch.stack([record.relative_errors[ACTIVE] for record in records])
    deviation = ratios.std(0)
    assert ((ratios.mean(0) - 1).abs() < 4 * deviation / 200**0.5).all()
    stated = (errors * ratios).square().mean(0).sqrt()  # relative to the exact norm, as the deviation is
    assert ((stated / deviation).log().abs() < 0.5).all(), (stated, deviation)


def test_columns_shrink_the_error_as_one_over_their_root() -> None:
    policy, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    exact = squared_score_norms_oracle(policy, batch.sequences, batch.masks, batch.normalisers)[ACTIVE]

    def deviation(columns: int) -> float:
        choice = Choice(columns=columns, formed_from=torch.inf, sketched_below=torch.inf)
        ratios = [
            measured(policy, batch, rows, seed=seed, choice=choice).squared_norms[ACTIVE] / exact
            for seed in range(60)
        ]
        return float((torch.stack(ratios) - 1).square().mean().sqrt())

    assert 2.0 < deviation(2) / deviation(32) < 8.0  # sqrt(16) = 4


def test_a_sketch_does_not_depend_on_packing_or_micro_batches() -> None:
    policy, batch = llama(), batch_of(RAGGED)
    whole = measured(policy, batch, packed(batch)).squared_norms
    torch.testing.assert_close(
        measured(policy, batch, padded(batch)).squared_norms, whole, rtol=1e-9, atol=0.0
    )
    parts = []
    for part in (slice(0, 3), slice(3, 6)):
        own = Batch(batch.sequences[part], batch.masks[part], batch.normalisers[part])
        parts.append(measured(policy, own, rows_of(own, [[0, 1], [2]])).squared_norms)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=0.0)


def test_seed_decides_the_sketch() -> None:
    policy, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    tape = ScoreTape(policy, method=SKETCH, seed=1)

    def norms() -> Tensor:
        with tape:
            objective = objective_of(forward(policy, rows), batch, rows)
        return tape.measure(objective, rows.segments, len(RAGGED)).squared_norms

    first = norms()
    assert torch.equal(norms(), first)
    tape.seed = 2
    other = norms()
    assert not torch.isclose(other[ACTIVE], first[ACTIVE], rtol=1e-3).any()
    tape.seed = 1
    assert torch.equal(norms(), first)


def test_the_default_sketches_only_where_that_is_cheaper() -> None:
    """Matrices of 12 × 20: ghost at 4 tokens, formed at 40. Wide ones are sketched at 40."""
    by_length = {
        length: set(measured(llama(), *long_batch(length), choice=METHODS["sketched"]).methods.values())
        for length in (4, 40)
    }
    assert by_length == {4: {"ghost", "sums"}, 40: {"formed", "ghost", "sums"}}
    wide = llama(hidden_size=96, intermediate_size=192)
    methods = measured(wide, *long_batch(40), choice=METHODS["sketched"]).methods
    assert methods["model.layers.0.mlp.up_proj.weight"] == "sketch"
    assert methods["model.embed_tokens.weight"] == "ghost"
    assert methods["model.norm.weight"] == "sums"
    exact = measured(wide, *long_batch(40), choice=METHODS["exact"])
    assert "sketch" not in exact.methods.values() and not exact.relative_errors.any()


def long_batch(length: int) -> tuple[Batch, Rows]:
    batch = batch_of([length] * 3)
    return batch, padded(batch)


def test_narrow_matrices_are_exact_even_where_nothing_is_kept() -> None:
    """A sketch of 16 numbers cannot save anything of a row of 8."""
    narrow = llama(hidden_size=8, num_attention_heads=1, head_dim=8, intermediate_size=8)
    batch, rows = long_batch(50)
    tape = ScoreTape(narrow, method="sketched")
    with tape:
        objective = objective_of(forward(narrow, rows), batch, rows)
    norms = tape.norms(objective, rows.segments, 3)
    exact = squared_score_norms_oracle(narrow, batch.sequences, batch.masks, batch.normalisers)
    torch.testing.assert_close(norms.squared_norms, exact, rtol=1e-5, atol=0.0)
    assert not norms.relative_errors.any()
    with pytest.raises(VcpoError, match="2 columns or more"):
        Choice(columns=1, formed_from=1.0)
