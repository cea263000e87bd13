"""Gradients of one parameter, for all trajectories at once, kept as the factors they are made of.

A weight that meets one position after another has as its gradient a sum over a trajectory's positions t,
and each term is a product: ∇W = Σ_t rows_t ⊗ columns_t. Its square needs no ∇W,

    ‖∇W‖² = Σ_{t,u} (rows_t · rows_u) (columns_t · columns_u)                  (ghost form)

which is cheaper than forming ∇W iff T < d·p / (d + p) (arXiv 2110.05679; the book-keeping view of
2210.00038). A parameter used several times has as its gradient the sum of its uses', so

    ‖Σ_k G_k‖² = Σ_k ‖G_k‖² + 2 Σ_{k<l} ⟨G_k, G_l⟩

and the cross terms ⟨G_k, G_l⟩ have the same form, with rows and columns of two uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcpo.scores.head import LogitGradients
from vcpo.scores.layout import Block, Layout, precise

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Outer:
    """Gradient [p, d] of a matrix: Σ_t rows_t ⊗ columns_t."""

    rows: Float[Tensor, "P p"] | LogitGradients
    columns: Float[Tensor, "P d"]
    layout: Layout | None = None
    """Of P positions that are a selection; None: they are those of the batch."""

    @property
    def height(self) -> int:
        """p."""
        return self.rows.shape[-1]


@dataclass(frozen=True)
class Lookup:
    """Gradient [V, d] of a table: Σ_t onehot(token_t) ⊗ columns_t."""

    tokens: Int[Tensor, " P"]
    columns: Float[Tensor, "P d"]
    height: int
    """V."""
    layout: Layout | None = None
    """As of :class:`Outer`."""


@dataclass(frozen=True)
class Vector:
    """Gradient [p] of a vector: Σ_t values_t."""

    values: Float[Tensor, "P p"] | LogitGradients
    layout: Layout | None = None
    """As of :class:`Outer`."""


Factor = Outer | Lookup | Vector


def memory_of(values: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same numbers in the same place."""
    return values.data_ptr(), values.shape, values.stride(), values.dtype


def layout_of(factor: Factor, layout: Layout) -> Layout:
    """Where the trajectories' positions lie in a factor; ``layout`` is the batch's."""
    return layout if factor.layout is None else factor.layout


def shared_norms(outers: Sequence[Outer], layout: Layout) -> Float[Tensor, " N"]:
    """Σ over parameters of ‖∇‖², for each trajectory, where all have the same columns.

    Layers that read one input (query, key, value; gate, up) are one wide layer: its AAᵀ is found once.
    """
    return _outer_norms([o.rows for o in outers], outers[0].columns, layout_of(outers[0], layout))


def matrix_norms(uses: Sequence[Outer | Lookup], layout: Layout) -> Float[Tensor, " N"]:
    """‖∇‖² of one parameter, for each trajectory; one factor for each use of it."""
    total = reduce(torch.add, [_matrix_norms(use, layout) for use in uses])
    for one, other in combinations(uses, 2):
        total = total + 2 * _inner_products(one, other, layout)
    return total.clamp_min(0)  # gradients that cancel may leave a rounding error below zero


def _matrix_norms(use: Outer | Lookup, layout: Layout) -> Tensor:
    if isinstance(use, Outer):
        return shared_norms([use], layout)
    sums, owners = layout_of(use, layout).token_sums(use.tokens, use.columns)
    return layout.zeros(sums).index_add_(0, owners, sums.square().sum(-1))


def _outer_norms(rows: Sequence[Tensor | LogitGradients], columns: Tensor, layout: Layout) -> Tensor:
    """‖Σ_t rows_t ⊗ columns_t‖², where ``rows`` lie side by side."""
    d, p = columns.shape[-1], sum(r.shape[-1] for r in rows)
    width = max(1, layout.budget // max(d, layout.longest))
    slices = [(r, slice(begin, begin + width)) for r in rows for begin in range(0, r.shape[-1], width)]
    widest = min(width, max(r.shape[-1] for r in rows))

    def ghost(length: int) -> bool:
        return length * (d + p) < d * p

    def cost(length: int) -> int:
        return length * (d + widest) + (2 * length**2 if ghost(length) else d * widest)

    norms = layout.zeros(columns)
    for block in layout.blocks(cost):
        form = _ghost_norms if ghost(block.index.shape[1]) else _formed_norms
        parts = (_gathered(block, r, part) for r, part in slices)
        norms[block.members] = form(parts, block.gather_padded(columns))
    return norms


def _gathered(block: Block, rows: Tensor | LogitGradients, part: slice) -> Float[Tensor, "n T w"]:
    if isinstance(rows, Tensor):
        return block.gather(rows[:, part])
    return precise(rows.part(block.index.flatten(), part)).view(*block.index.shape, -1)


def _ghost_norms(rows: Iterator[Tensor], columns: Float[Tensor, "n T d"]) -> Float[Tensor, " n"]:
    first = next(rows)
    kernel = first @ first.mT
    for part in rows:
        kernel.baddbmm_(part, part.mT)
    return kernel.mul_(columns @ columns.mT).sum((1, 2))


def _formed_norms(rows: Iterator[Tensor], columns: Float[Tensor, "n T d"]) -> Float[Tensor, " n"]:
    return reduce(torch.add, ((part.mT @ columns).square_().sum((1, 2)) for part in rows))


def _inner_products(one: Outer | Lookup, other: Outer | Lookup, layout: Layout) -> Float[Tensor, " N"]:
    """⟨∇₁, ∇₂⟩ of two uses of one parameter, for each trajectory."""
    width = max(w for use in (one, other) for w in (use.columns.shape[-1], _row_width(use)))
    products = layout.zeros(one.columns)
    of_one, of_other = layout_of(one, layout), layout_of(other, layout)
    for block in layout.blocks(lambda length: 2 * length * (width + length)):
        mine, yours = (block if own is layout else own.block_of(block.members) for own in (of_one, of_other))
        columns = mine.gather_padded(one.columns) @ yours.gather_padded(other.columns).mT
        products[block.members] = (columns * _row_kernel(one, mine, other, yours)).sum((1, 2))
    return products


def _row_width(use: Outer | Lookup) -> int:
    return use.rows.shape[-1] if isinstance(use, Outer) and isinstance(use.rows, Tensor) else 1


def _row_kernel(
    one: Outer | Lookup, mine: Block, other: Outer | Lookup, yours: Block
) -> Float[Tensor, "n S T"]:
    """rows_t · rows'_u; the row of a lookup is one-hot, so that its product is an element of the other."""
    if isinstance(one, Outer) and isinstance(other, Outer):
        return reduce(torch.add, _kernels(one.rows, mine, other.rows, yours))
    if isinstance(one, Lookup) and isinstance(other, Lookup):
        return one.tokens[mine.index][:, :, None] == other.tokens[yours.index][:, None, :]
    if isinstance(one, Lookup) and isinstance(other, Outer):
        tokens = one.tokens[mine.index]
        if isinstance(other.rows, LogitGradients):
            return precise(other.rows.elements(yours.index, tokens)).mT
        return other.rows[yours.index[:, None, :], tokens[:, :, None]]
    return _row_kernel(other, yours, one, mine).mT


def _kernels(
    one: Tensor | LogitGradients, mine: Block, other: Tensor | LogitGradients, yours: Block
) -> Iterator[Float[Tensor, "n S T"]]:
    """rows_t · rows'_u in parts; rows that are made when they are read are never there in full width."""
    made = isinstance(one, LogitGradients) or isinstance(other, LogitGradients)
    width = one.shape[-1] if not made else max(mine.index.shape[1], yours.index.shape[1])
    for begin in range(0, one.shape[-1], width):
        part = slice(begin, begin + width)
        yield _gathered(mine, one, part) @ _gathered(yours, other, part).mT
