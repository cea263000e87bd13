"""Models whose modules all see a flat list of positions, in any order: ``selected`` says which they are."""

from __future__ import annotations

import pytest
import torch
from score_cases import VOCABULARY, batch_of, gradients_of, objective_of, packed, separate_gradients
from torch import Tensor, nn

from vcpo.scores import ScoreTape

torch.set_num_threads(1)

WIDTH = 8
LENGTHS = (3, 5, 4, 2)


class Flat(nn.Module):
    """As a model without padding is fed; its output is laid out in rows again."""

    def __init__(self, order: Tensor, *, tied: bool) -> None:
        super().__init__()
        self.order = order
        self.table, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.table.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.table(ids.flatten()[self.order]).tanh())
        rows = logits.new_zeros(ids.numel(), VOCABULARY)
        return rows.index_copy(0, self.order, logits).view(*ids.shape, VOCABULARY)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["every position, shuffled", "the trajectories' positions, shuffled"])
def test_tables_that_see_a_selection(kind: str, tied: bool) -> None:
    torch.manual_seed(0)
    batch = batch_of(LENGTHS)
    rows = packed(batch)
    order = torch.randperm(rows.ids.numel())
    if kind.startswith("the"):
        order = order[rows.segments.flatten()[order] >= 0]
    model = Flat(order, tied=tied)
    each = separate_gradients(model, model(rows.ids), batch, rows)
    tape = ScoreTape(model, method="exact")
    with tape:
        logits = model(rows.ids)
    record = tape.measure(objective_of(logits, batch, rows), rows.segments, len(LENGTHS), order)
    norms = torch.stack([torch.stack([g.square().sum() for g in own.values()]).sum() for own in each])
    torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
    coefficients = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    record.backward(coefficients)
    for name, gradient in gradients_of(model).items():
        expected = torch.tensordot(coefficients, torch.stack([own[name] for own in each]), 1)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
