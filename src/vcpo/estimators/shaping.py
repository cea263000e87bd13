"""Shaping of rewards before any advantage is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcpo.errors import ConfigError
from vcpo.estimators.checks import upcast

if TYPE_CHECKING:
    from jaxtyping import Float, Num
    from torch import Tensor


def overlong_penalty(action_counts: Num[Tensor, " B"], longest: float, buffer: float) -> Float[Tensor, " B"]:
    """0 up to ``longest − buffer`` sampled tokens, then linearly down to −1 at ``longest`` and beyond.

    DAPO, arXiv 2503.14476, eq. 13 (there: longest 20480, buffer 4096 tokens). To be added to the rewards.

    Raises:
        ConfigError: not 0 < buffer ≤ longest.
    """
    if not 0 < buffer <= longest:
        raise ConfigError(f"the buffer of overlong answers is in (0, longest = {longest:g}], got {buffer:g}")
    return -((upcast(action_counts) - (longest - buffer)) / buffer).clamp(0.0, 1.0)
