"""Squared norms of Σ_t rows_t ⊗ columns_t from a random projection of the rows.

With random signs Ω [p, r], and G the gradient of one trajectory,

    ‖Ωᵀ G‖² / r,    Ωᵀ G = Σ_t (Ωᵀ rows_t) ⊗ columns_t

is an unbiased estimate of ‖G‖², at 2·r·(d + p) operations a position where G takes 2·d·p. Matrices with the
same columns (query, key, value) are one wide matrix: their projected rows are added, and the columns read
once. Several uses of one parameter are projected by the same signs, and added before squaring. All
trajectories meet the same signs, so that part of the error is common to a group, where the baseline's
quotient cancels it.

Signs depend on (seed, parameter name) alone: not on the order of layers, the device or the rank.
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
from vcpo.scores.layout import Layout, precise

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
            bits = _random_bits(f"{self.seed}/{key}", width * self.columns, like.device)
            self._drawn[place] = (2 * bits - 1).view(width, self.columns).to(like.dtype)
        return self._drawn[place]


def _random_bits(key: str, count: int, device: torch.device) -> Tensor:
    """``count`` zeros and ones: few words are drawn, on the CPU for every device, and unpacked there."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 64),), generator=generator).to(device)
    bits = words[:, None] >> torch.arange(64, device=device) & 1
    return bits.flatten()[:count]


@dataclass(frozen=True)
class Estimate:
    """Estimated squared norms and the estimated variance of each estimate."""

    squared_norms: Float[Tensor, " N"]
    variances: Float[Tensor, " N"]


def project_rows(use: Outer | Lookup, signs: Signs, name: str) -> Float[Tensor, "P r"]:
    """Ωᵀ rows_t of every position; the rows of a lookup are one-hot, so theirs is read off."""
    if isinstance(use, Outer):
        omega = signs.of(name, use.height, use.columns)
        if isinstance(use.rows, Tensor):
            return use.rows @ omega
        return torch.cat([rows @ omega for _, rows in use.rows.pieces()])
    return signs.of(name, use.height, use.columns)[use.tokens]


def sketched_norms(
    uses: Sequence[tuple[Float[Tensor, "P r"], Float[Tensor, "P d"]]],
    layout: Layout,
    layouts: Sequence[Layout] | None = None,
) -> Estimate:
    """Squared norms of Σ over uses of Ωᵀ G, for each trajectory, from (projected rows, columns).

    ``layouts``, one a use, where positions are a selection. Each of the r rows of Ωᵀ G gives an estimate of
    its own; how they differ gives the variance.
    """
    r = uses[0][0].shape[-1]
    estimates = layout.zeros(uses[0][0])[:, None].repeat(1, r)
    spans = zip(*(own.spans for own in layouts or [layout] * len(uses)), strict=True)
    for i, places in enumerate(spans):
        products = (r[span].mT @ c[span] for (r, c), span in zip(uses, places, strict=True))
        estimates[i] = precise(reduce(torch.add, products)).square().sum(-1)
    return Estimate(estimates.mean(-1), estimates.var(-1) / r)
