"""Step scales that were written down beforehand, in place of the algorithm's step rule."""

from __future__ import annotations

import json
from pathlib import Path

from vcpo.config import Config
from vcpo.errors import ConfigError


def read_step_scales(config: Config) -> tuple[float, ...] | None:
    """The factors of ``algorithm.step_scales``, one a step; None if it is empty.

    Raises ConfigError: no such file, no JSON list of numbers, not ``pipeline.steps`` of them, a factor
    outside (0, 1].
    """
    name = config.algorithm.step_scales
    if not name:
        return None
    try:
        factors = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read algorithm.step_scales {name}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"algorithm.step_scales {name} is no JSON: write a list of numbers") from error
    if not isinstance(factors, list):
        raise ConfigError(f"algorithm.step_scales {name} must be a list of numbers, one a step")
    if len(factors) != config.pipeline.steps:
        raise ConfigError(
            f"algorithm.step_scales {name} has {len(factors)} factors, and pipeline.steps is "
            f"{config.pipeline.steps}: it takes one a step"
        )
    for step, factor in enumerate(factors, start=1):
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise ConfigError(
                f"algorithm.step_scales {name}: the factor of step {step} is {factor!r}, not in (0, 1]"
            )
    return tuple(map(float, factors))
