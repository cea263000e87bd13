"""The named algorithms: each is a value, its source and where it departs from it."""

from __future__ import annotations

import difflib
from types import MappingProxyType

from vcpo.algorithms.composition import Algorithm
from vcpo.algorithms.parts import (
    GROUP_MEAN,
    LEAVE_ONE_OUT,
    NO_NORMALISATION,
    OPTIMAL,
    SEQUENCE,
    SEQUENCE_MEAN,
    STD,
    Importance,
    PolicyGradient,
    PpoClip,
)
from vcpo.errors import ConfigError

_VCPO = Algorithm(
    name="vcpo",
    source="VCPO, arXiv 2602.17616; truncation 8 and sequence mean as in its official scripts",
    importance=Importance(SEQUENCE, truncation=8.0),
    baseline=OPTIMAL,
    normalisation=NO_NORMALISATION,
    surrogate=PolicyGradient(),
    aggregation=SEQUENCE_MEAN,
    step_rule="sqrt",
    departures=(
        "Advantages are not divided by the std, as in the paper's loss; the official scripts divide.",
        "The baseline uses the truncated weights and length-normalised norms of the update itself; the "
        "official code counts w twice, leaves it untruncated and multiplies the length back in.",
        "ESS and baseline are max-shifted in log space without an epsilon; non-finite input is an error.",
        "The step scale leaves decoupled weight decay alone.",
    ),
)

_GRPO = Algorithm(
    name="grpo",
    source="GRPO, arXiv 2402.03300, with PPO's clip (arXiv 1707.06347)",
    importance=Importance(),
    baseline=GROUP_MEAN,
    normalisation=STD,
    surrogate=PpoClip(low=0.2, high=0.2),
    aggregation=SEQUENCE_MEAN,
    step_rule="off",
    departures=(
        "No KL term to a reference policy.",
        "The clipped ratio is against the behaviour policy that sampled the token, however old, and not "
        "against the policy at the start of the step.",
    ),
)

_REINFORCE = Algorithm(
    name="reinforce",
    source="REINFORCE, with the leave-one-out baseline of RLOO (arXiv 2402.14740)",
    importance=Importance(),
    baseline=LEAVE_ONE_OUT,
    normalisation=NO_NORMALISATION,
    surrogate=PolicyGradient(),
    aggregation=SEQUENCE_MEAN,
    step_rule="off",
    departures=(
        "The leave-one-out mean, independent of the trajectory, is the baseline: unbiased on-policy.",
        "No correction for the behaviour policy: biased as soon as there is policy lag.",
        "Scores are divided by their length, as in the other algorithms here; RLOO does not divide.",
    ),
)

_TIS = Algorithm(
    name="tis",
    source="truncated importance sampling at sequence level, the baseline method of arXiv 2602.17616",
    importance=Importance(SEQUENCE, truncation=8.0),
    baseline=GROUP_MEAN,
    normalisation=STD,
    surrogate=PolicyGradient(),
    aggregation=SEQUENCE_MEAN,
    step_rule="off",
    departures=("No KL term and no clip besides the truncation.",),
)

ALGORITHMS = MappingProxyType({part.name: part for part in (_VCPO, _GRPO, _REINFORCE, _TIS)})
"""Every algorithm by its name in a recipe."""


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        ConfigError: there is none; suggests the nearest name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    nearest = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"unknown algorithm.name {name!r}; did you mean {nearest!r}? (known: {', '.join(ALGORITHMS)})"
    )
