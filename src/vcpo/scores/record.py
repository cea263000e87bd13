"""What is kept of a backward pass until the coefficients are known, and the gradient made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vcpo.errors import NonFiniteError, VcpoError
from vcpo.scores.factors import Lookup, Outer, memory_of
from vcpo.scores.head import LogitGradients, add_product
from vcpo.scores.layout import Layout, precise

if TYPE_CHECKING:
    from jaxtyping import Float


class Weights:
    """One coefficient for each trajectory, and what they make of a factor."""

    def __init__(self, coefficients: Float[Tensor, " N"], layout: Layout) -> None:
        self.coefficients = coefficients
        self._layout = layout
        self._spread: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def times(self, factor: Float[Tensor, "P w"], selection: Layout | None = None) -> Float[Tensor, "P w"]:
        """Every position's row times its trajectory's coefficient, 0 on padding.

        Layers that read one input come one after another: its product is made once. ``selection``: where
        the positions lie, if they are not those of the batch.
        """
        if selection is not None:
            weights = selection.spread(self.coefficients, len(factor))[:, None]
            return (weights.to(precise(factor[:0]).dtype) * factor).to(factor.dtype)
        if self._last is None or memory_of(self._last[0]) != memory_of(factor):
            if self._spread is None:
                self._spread = self._layout.spread(self.coefficients, len(factor))[:, None]
            weights = self._spread.to(precise(factor[:0]).dtype)
            self._last = (factor, (weights * factor).to(factor.dtype))
        return self._last[1]


@dataclass(frozen=True)
class Formed:
    """Every trajectory's own gradient of one parameter, stacked: [N, *shape]."""

    values: Tensor

    def add_to(self, total: Tensor, weights: Weights) -> None:
        """total += Σ_i c_i values_i."""
        coefficients = weights.coefficients
        rows = self.values.flatten(1)
        if rows.dtype == total.dtype == precise(rows[:0]).dtype and total.is_contiguous():
            total.view(-1).addmv_(rows.mT, coefficients.to(rows))
            return
        weighted = torch.zeros_like(total, dtype=precise(rows[:0]).dtype)
        for value, coefficient in zip(self.values, coefficients.tolist(), strict=True):
            weighted.add_(value, alpha=coefficient)
        total.add_(weighted)


@dataclass(frozen=True)
class Factored:
    """The factors of one parameter's gradient, one for each use of the parameter."""

    uses: Sequence[Outer | Lookup]
    versions: Sequence[int]
    """Of their tensors, as autograd counts changes in place."""

    @staticmethod
    def of(uses: Sequence[Outer | Lookup]) -> Factored:
        """Keep the factors as they are now."""
        return Factored(uses, _versions(uses))

    def add_to(self, total: Tensor, weights: Weights) -> None:
        """total += Σ_i c_i Σ_t rows_t ⊗ columns_t."""
        if _versions(self.uses) != self.versions:
            raise VcpoError(
                "a layer's input or output gradient was changed in place after it was measured, and "
                "the record has no copy: use the record first, or give the model a copy of its input"
            )
        for use in self.uses:
            if isinstance(use, Lookup):
                total.index_add_(0, use.tokens, weights.times(use.columns, use.layout).to(total.dtype))
            else:
                _add_product(total, use, weights)


def _versions(uses: Sequence[Outer | Lookup]) -> list[int]:
    rows = [use.rows for use in uses if isinstance(use, Outer)]
    tensors = [use.columns for use in uses] + [r for r in rows if isinstance(r, Tensor)]
    return [tensor._version for tensor in tensors]


def _add_product(total: Tensor, use: Outer, weights: Weights) -> None:
    """total += (weights ⊙ rows)ᵀ columns, where the narrower factor is the one that is scaled."""
    rows, columns = use.rows, use.columns
    if isinstance(rows, LogitGradients):
        columns = weights.times(columns, use.layout)
        added = total if total.dtype == precise(total[:0]).dtype else torch.zeros_like(precise(total))
        for part, piece in rows.pieces():  # many pieces would lose their digits in a half-precision sum
            add_product(added, piece, columns[part])
        if added is not total:
            total.add_(added)
        return
    if rows.shape[-1] < columns.shape[-1]:
        rows = weights.times(rows, use.layout)
    else:
        columns = weights.times(columns, use.layout)
    add_product(total, rows, columns)


Kept = Formed | Factored


@dataclass(frozen=True)
class ScoreNorms:
    """The squared score norms of one micro-batch, all detached."""

    squared_norms: Float[Tensor, " N"]
    """‖∇ n_i log π(τ_i)‖² over all trainable parameters, in float32 or better."""
    relative_errors: Float[Tensor, " N"]
    """Estimated standard error of each squared norm, divided by it; 0 where nothing was sketched."""
    methods: Mapping[str, str]
    """How the norm of each parameter was found: ``formed`` and kept; ``ghost``, exactly from the factors (or
    formed and dropped, where that is cheaper); ``sketch``; or ``sums``, of a vector."""


@dataclass(frozen=True)
class Record(ScoreNorms):
    """Squared score norms, and the means to add the weighted gradient.

    Made by :meth:`vcpo.scores.ScoreTape.measure`. It holds layer inputs and output gradients until
    :meth:`backward`, about as much as the forward pass held before.
    """

    _kept: dict[nn.Parameter, Kept]
    _layout: Layout

    @torch.no_grad()
    def backward(self, coefficients: Float[Tensor, " N"]) -> None:
        """Add Σ_i c_i ∇ n_i log π(τ_i) to the ``.grad`` of the trainable parameters.

        ``coefficients`` [N], one number a trajectory; the n_i of the objective are included already. What
        an ordinary backward pass of Σ c_i n_i log π(τ_i) would add, without a second walk through the
        model. Sharded parameters (FSDP2) get the mean over ranks, as from an ordinary backward pass: then
        every rank must call it. Frees what the record holds, so it works once.

        Raises NonFiniteError naming the first coefficient that is not finite, and VcpoError if the record
        was spent or the number of coefficients is wrong.
        """
        if not self._kept:
            raise VcpoError("this record has given its gradient already: measure the micro-batch again")
        if coefficients.shape != (self._layout.count,):
            raise VcpoError(
                f"{self._layout.count} trajectories, but coefficients of shape {tuple(coefficients.shape)}"
            )
        bad = ~coefficients.isfinite()
        if bad.any():
            raise NonFiniteError("coefficient", int(bad.nonzero()[0]), "check its weight and its advantage")
        weights = Weights(coefficients.to(self._layout.lengths.device), self._layout)
        with torch.autocast(weights.coefficients.device.type, enabled=False):  # factors have their types
            try:
                while self._kept:
                    parameter, kept = self._kept.popitem()
                    _accumulate(parameter, kept, weights)
            finally:
                self._kept.clear()  # half a gradient must not be completed by a second try


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of it (a DTensor, as FSDP2 makes of parameters)."""
    return hasattr(parameter, "device_mesh")


def _accumulate(parameter: Any, kept: Kept, weights: Weights) -> None:
    if is_sharded(parameter):
        gradient = _reduced(parameter, kept, weights)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    kept.add_to(parameter.grad, weights)


def _reduced(parameter: Any, kept: Kept, weights: Weights) -> Tensor:
    """A sharded parameter's gradient: every rank's own, averaged over the ranks and sharded alike."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = parameter.device_mesh
    own = torch.zeros(parameter.shape, dtype=parameter.dtype, device=weights.coefficients.device)
    kept.add_to(own, weights)
    partial = DTensor.from_local(own / mesh.size(), mesh, [Partial("sum")] * mesh.ndim, run_check=False)
    return partial.redistribute(placements=parameter.placements)
