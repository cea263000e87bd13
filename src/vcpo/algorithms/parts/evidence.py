"""What algorithms decide from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vcpo.errors import VcpoError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What the learner measured of a set of whole groups: B trajectories padded to T tokens.

    Values outside the mask never matter.
    """

    log_probs: Float[Tensor, "B T"]
    """The learner's log π(y_t), in nats."""
    behaviour_log_probs: Float[Tensor, "B T"]
    """The recorded log μ(y_t), in nats."""
    mask: Bool[Tensor, "B T"]
    """True at the tokens that the behaviour policy sampled."""
    rewards: Float[Tensor, " B"]
    """Reward of the whole episode."""
    groups: Int[Tensor, " B"]
    """Group id of each trajectory, in any order."""
    lags: Int[Tensor, "B T"] | None = None
    """The learner's version minus the version that sampled the token."""
    squared_score_norms: Float[Tensor, " B"] | None = None
    """‖u_i‖² of u_i = ∇ Σ_t n_i log π(y_t), n_i the normaliser; only if ``needs_score_norms``."""
    entropies: Float[Tensor, "B T"] | None = None
    """H_t = −Σ_v π(v) log π(v) where the token was sampled, in nats; only if ``needs_distributions``."""
    energies: Float[Tensor, "B T"] | None = None
    """1 − 2 π(y_t) + Σ_v π(v)²; only if ``needs_distributions``."""
    values: Float[Tensor, "B T"] | None = None
    """The critic's V before each token; only if ``needs_values``."""

    def rows(self, places: Sequence[int]) -> Evidence:
        """Of some trajectories alone."""
        chosen: dict[str, Any] = {k: None if v is None else v[list(places)] for k, v in vars(self).items()}
        return Evidence(**chosen)

    def required(self, name: str, who: str) -> Tensor:
        """The field ``name``, or VcpoError saying who needs it."""
        values = getattr(self, name)
        if values is None:
            raise VcpoError(f"{who} needs {name} in its evidence, got None")
        return values
