"""Squared norms of Σ_t rows_t ⊗ columns_t from random projections of both sides.

With independent random signs Ω₁ [p, r] and Ω₂ [d, r], and G the gradient of one trajectory,

    ‖Ω₁ᵀ G Ω₂‖² / r²,    Ω₁ᵀ G Ω₂ = Σ_t (Ω₁ᵀ rows_t) ⊗ (Ω₂ᵀ columns_t)

is an unbiased estimate of ‖G‖², at 2·r·(d + p) operations a position: each wide factor is read once, and
what belongs to single trajectories happens on r-vectors. Several uses of one parameter are projected by the
same signs and added before squaring. All trajectories meet the same signs, so that most of the error is
common to a group, where the baseline's quotient cancels it.

Signs depend on (seed, parameter name, side) alone: not on the order of layers, the device or the rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcpo.scores.factors import Lookup, Outer
from vcpo.scores.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class Signs:
    """The projections of one seed, drawn when first asked for."""

    seed: int
    columns: int
    _drawn: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def of(self, key: str, width: int, like: Tensor) -> Float[Tensor, "w r"]:
        """[width, r] of ±1 in the number type and on the device of ``like``."""
        place = (key, like.dtype, like.device)
        if place not in self._drawn:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{key}".encode()))
            bits = torch.randint(2, (width, self.columns), generator=generator)
            self._drawn[place] = (2 * bits - 1).to(like)
        return self._drawn[place]


@dataclass(frozen=True)
class Estimate:
    """Estimated squared norms and the estimated variance of each estimate."""

    squared_norms: Float[Tensor, " N"]
    variances: Float[Tensor, " N"]


def project_rows(use: Outer | Lookup, signs: Signs, key: str) -> Float[Tensor, "P r"]:
    """Ω₁ᵀ rows_t of every position; the rows of a lookup are one-hot, so its projection is read off."""
    key = f"{key}/rows"
    if isinstance(use, Outer):
        return use.rows @ signs.of(key, use.rows.shape[-1], use.rows)
    return signs.of(key, use.height, use.columns)[use.tokens]


def project_columns(use: Outer | Lookup, signs: Signs, key: str) -> Float[Tensor, "P r"]:
    """Ω₂ᵀ columns_t of every position."""
    return use.columns @ signs.of(f"{key}/columns", use.columns.shape[-1], use.columns)


def sketched_norms(
    projected: Sequence[tuple[Float[Tensor, "P r"], Float[Tensor, "P r"]]], layout: Layout
) -> Estimate:
    """Squared norms of a parameter's gradient, for each trajectory, from the projected uses of it.

    The variance comes from how much the rows, and the columns, of the projected gradient differ.
    """
    squares = reduce(torch.add, (layout.outer_sums(*use) for use in projected)).square()
    spread = squares.mean(1).var(-1) + squares.mean(2).var(-1)
    return Estimate(squares.mean((1, 2)), spread / squares.shape[-1])
