"""Takes gradients as the backward pass finds them, layer by layer: measures each, and keeps what is needed.

Parameters that read one input (query, key, value) arrive one after another: they are measured together, when
another input arrives. A parameter with several uses (a tied head and table) waits for the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcpo.scores.choice import Choice
from vcpo.scores.factors import (
    Factor,
    Lookup,
    Outer,
    Vector,
    layout_of,
    matrix_norms,
    memory_of,
    shared_norms,
)
from vcpo.scores.layout import Layout, precise
from vcpo.scores.record import Factored, Formed, Kept
from vcpo.scores.sketch import Signs, project_rows, sketched_norms

if TYPE_CHECKING:
    from jaxtyping import Float


class Collector:
    """One backward pass. ``uses``: how often the forward pass used each parameter; ``names``: of each."""

    def __init__(
        self,
        layout: Layout,
        choice: Choice,
        signs: Signs,
        uses: Mapping[Tensor, int],
        names: Mapping[Tensor, str],
        *,
        keep: bool,
    ) -> None:
        self._layout, self._choice, self._signs = layout, choice, signs
        self._uses, self._names, self._keep = uses, names, keep
        self._sums: dict[Tensor, Tensor] = {}
        self._waiting: dict[Tensor, list[Outer | Lookup]] = {}
        # Matrices with the same columns: those to be measured exactly, and the projected rows of the others.
        self._shared: Outer | None = None
        self._neighbours: list[Outer] = []
        self._projected: Tensor | None = None
        self._norms: list[Tensor] = []
        self._variances: list[Tensor] = []
        self.arrived: Counter[Tensor] = Counter()
        """Uses of each parameter that the backward pass has reached."""
        self.kept: dict[Tensor, Kept] = {}
        self.methods: dict[str, str] = {}

    def add(self, parameter: Tensor, factor: Factor) -> None:
        """Take the gradient of one use of a parameter."""
        self.arrived[parameter] += 1
        if isinstance(factor, Vector):
            sums = _sums(factor, layout_of(factor, self._layout))
            self._sums[parameter] = self._sums[parameter] + sums if parameter in self._sums else sums
            return
        self._waiting.setdefault(parameter, []).append(factor)
        if self.arrived[parameter] == self._uses[parameter]:
            self._matrix(parameter, self._waiting.pop(parameter))

    def finish(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Squared norms over all parameters, and the variance that sketching gave them."""
        for parameter, uses in self._waiting.items():  # of these, some uses do not reach the objective
            self._matrix(parameter, uses)
        self._waiting.clear()
        self._measure_neighbours()
        for parameter, sums in self._sums.items():
            self._found(parameter, "sums", sums.square().sum(-1), Formed(sums))
        norms = torch.stack(self._norms).sum(0)
        return norms, torch.stack(self._variances).sum(0) if self._variances else torch.zeros_like(norms)

    def _matrix(self, parameter: Tensor, uses: list[Outer | Lookup]) -> None:
        """Measure a parameter all of whose uses are here."""
        use = uses[0]
        tokens = max(layout_of(use, self._layout).mean_length for use in uses)
        if len(uses) == 1 and isinstance(use, Lookup):
            self._found(parameter, "ghost", matrix_norms(uses, self._layout), Factored.of(uses))
        elif self._keep and len(uses) == 1 and isinstance(use, Outer) and self._choice.forms(tokens, use):
            formed, norms = _form(use, layout_of(use, self._layout))
            self._found(parameter, "formed", norms, Formed(formed))
        elif len(uses) == 1 and isinstance(use, Outer):
            self._add_neighbour(parameter, use)
        elif self._choice.sketches(tokens, use):
            rows = [project_rows(use, self._signs, self._names[parameter]) for use in uses]
            self._estimated(rows, uses)
            self._found(parameter, "sketch", None, Factored.of(uses))
        else:
            self._found(parameter, "ghost", matrix_norms(uses, self._layout), Factored.of(uses))

    def _add_neighbour(self, parameter: Tensor, use: Outer) -> None:
        """Take a matrix to be measured together with those that have the same columns."""
        if self._shared is not None and memory_of(use.columns) != memory_of(self._shared.columns):
            self._measure_neighbours()
        self._shared = use
        sketch = self._choice.sketches(layout_of(use, self._layout).mean_length, use)
        if sketch:
            rows = project_rows(use, self._signs, self._names[parameter])
            self._projected = rows if self._projected is None else self._projected + rows
        else:
            self._neighbours.append(use)
        self._found(parameter, "sketch" if sketch else "ghost", None, Factored.of([use]))

    def _measure_neighbours(self) -> None:
        if self._neighbours:
            self._norms.append(shared_norms(self._neighbours, self._layout))
        if self._projected is not None and self._shared is not None:
            self._estimated([self._projected], [self._shared])
        self._neighbours, self._projected, self._shared = [], None, None

    def _estimated(self, rows: Sequence[Tensor], uses: Sequence[Outer | Lookup]) -> None:
        projected = [(r, use.columns) for r, use in zip(rows, uses, strict=True)]
        estimate = sketched_norms(projected, self._layout, [layout_of(use, self._layout) for use in uses])
        self._norms.append(estimate.squared_norms)
        self._variances.append(estimate.variances)

    def _found(self, parameter: Tensor, method: str, norms: Tensor | None, kept: Kept) -> None:
        self.methods[self._names[parameter]] = method
        if norms is not None:
            self._norms.append(norms)
        if self._keep:
            self.kept[parameter] = kept


def _sums(factor: Vector, layout: Layout) -> Float[Tensor, "N p"]:
    if isinstance(factor.values, Tensor):
        return layout.sums(factor.values)
    return torch.cat([layout.sums(strip) for strip in factor.values.strips()], -1)


def _form(use: Outer, layout: Layout) -> tuple[Float[Tensor, "N p d"], Float[Tensor, " N"]]:
    """Each trajectory's own gradient and its squared norm, taken while the product is still in the cache."""
    assert isinstance(use.rows, Tensor)
    shape = (layout.count, use.rows.shape[-1], use.columns.shape[-1])
    formed = use.rows.new_empty(shape)
    norms = layout.zeros(use.rows)
    for i, span in enumerate(layout.spans):
        torch.mm(use.rows[span].mT, use.columns[span], out=formed[i])
        flat = precise(formed[i].view(-1))
        norms[i] = flat.dot(flat)
    return formed, norms
