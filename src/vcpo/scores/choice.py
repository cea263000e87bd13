"""Which of several equal ways a layer's norms are found, chosen by counting what each costs.

A trajectory's gradient of a [p, d] matrix is Σ_t E_t ⊗ A_t over its T positions. What a plain step pays for
it is 2·T·d·p operations. Beside that:

| way    | operations         | numbers kept until the coefficients are known | norm  |
|--------|--------------------|-----------------------------------------------|-------|
| formed | none               | d·p                                           | exact |
| ghost  | 2·T²·(d + p)       | T·(d + p)                                     | exact |
| sketch | 2·T·r·(d + p)      | T·(d + p)                                     | ± few % |

*formed* turns the product that a plain step makes for all trajectories together into one a trajectory; norm
and weighted sum then only read the result. It is both the smaller record and nearly free once
T ≥ d·p / (d + p). Below that the factors are the smaller record, and their norm is sketched, or found exactly
by the ghost form if T is so short that it costs no more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vcpo.errors import VcpoError
from vcpo.scores.factors import Lookup, Outer


@dataclass(frozen=True)
class Choice:
    """The rules of one method."""

    columns: int
    """r: signs that a row of a matrix is projected by, 2 or more; 0: never sketch."""
    formed_from: float
    """Form from T = this · d·p / (d + p) on."""
    ghost_up_to: int = 0
    """Find norms exactly by the ghost form up to this T, even if sketches are allowed."""
    sketched_below: float = 0.5
    """Sketch only if r·(d + p) is at most this · d·p: a narrow matrix (LoRA) is exact at no greater cost."""

    def __post_init__(self) -> None:
        if self.columns < 0 or self.columns == 1:
            raise VcpoError(f"a sketch needs 2 columns or more to know its error, got {self.columns}")

    def forms(self, tokens: float, use: Outer | Lookup) -> bool:
        """Whether gradients of trajectories of ``tokens`` positions are formed and kept."""
        if isinstance(use, Outer) and not isinstance(use.rows, Tensor):
            return False  # rows that are made when they are read are no record to save on
        p, d = use.height, use.columns.shape[-1]
        return tokens * (d + p) >= self.formed_from * d * p

    def sketches(self, tokens: float, use: Outer | Lookup) -> bool:
        """Whether norms from factors are sketched."""
        p, d = use.height, use.columns.shape[-1]
        wide = self.columns * (d + p) <= self.sketched_below * d * p
        return self.columns > 0 and tokens > self.ghost_up_to and wide


METHODS = {
    "exact": Choice(columns=0, formed_from=0.5),
    "sketched": Choice(columns=16, formed_from=1.5, ghost_up_to=32),
}
