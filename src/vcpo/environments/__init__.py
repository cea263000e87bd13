"""Prompts, multi-turn interaction and rewards. Knows the samplers' protocol, no engine and no learner."""

from vcpo.environments.protocol import (
    Codec,
    ContextChecked,
    DataEnvironment,
    DemonstratingEnvironment,
    Demonstration,
    Environment,
    Episode,
    FiniteEnvironment,
    Problem,
    SmallModelEnvironment,
    Split,
)
from vcpo.environments.registry import environment_class

__all__ = [
    "Codec",
    "ContextChecked",
    "DataEnvironment",
    "DemonstratingEnvironment",
    "Demonstration",
    "Environment",
    "Episode",
    "FiniteEnvironment",
    "Problem",
    "SmallModelEnvironment",
    "Split",
    "environment_class",
]
