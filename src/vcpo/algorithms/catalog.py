"""The named algorithms: each is a value, its source and where it departs from it.

A new one is one more entry of :data:`ALGORITHMS`; a new part is a class or value of
:mod:`vcpo.algorithms.parts`. CONTRIBUTING shows both.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from types import MappingProxyType

from vcpo.algorithms.composition import Algorithm
from vcpo.algorithms.parts import (
    CONSTANT,
    GEOMETRIC,
    GROUP_MEAN,
    LEAVE_ONE_OUT,
    LENGTH_WEIGHTED,
    MARGIN,
    NO_NORMALISATION,
    OPTIMAL,
    OPTIMAL_TOKEN,
    PROXIMAL,
    SEQUENCE,
    STD,
    TOKEN,
    TOKEN_MEAN,
    ZERO,
    CappedByEss,
    Clip,
    Decoupled,
    Gae,
    Importance,
    KlToBehaviour,
    SecondMoment,
    Soft,
    Spurious,
    Tapered,
    Truncated,
    VTrace,
    Within,
    below_mean,
)
from vcpo.errors import ConfigError

_BEHAVIOUR_RATIO = (
    "The ratio is against the behaviour policy that sampled the token, however old, and not against the "
    "policy at the start of the step."
)
_NO_KL = "No KL term to a reference policy."

_OVER_LENGTH = "Scores are divided by their length, as in most of the methods here{}."
_OWN_ADVANTAGES = (
    "Advantages are not divided by the std, as in the paper's loss; the official scripts divide."
)
_OPTIMAL_BASELINE = (
    "The baseline uses the truncated weights and length-normalised norms of the update itself; the "
    "official code counts w twice, leaves it untruncated and multiplies the length back in.",
    "The baseline is max-shifted in log space without an epsilon; non-finite input is an error.",
)
_ESS_SCALE = (
    "ESS is max-shifted in log space without an epsilon, and of the trajectories with sampled tokens; "
    "non-finite input is an error.",
    "The step scale leaves decoupled weight decay alone.",
)

_VCPO = Algorithm(
    name="vcpo",
    summary="truncated sequence weights, the optimal baseline, the step scaled by ESS",
    source="VCPO, arXiv 2602.17616; truncation 8 and sequence mean as in its official scripts",
    importance=Importance(SEQUENCE, Truncated(8.0)),
    baseline=OPTIMAL,
    step_rule="sqrt",
    departures=(_OWN_ADVANTAGES, *_OPTIMAL_BASELINE, *_ESS_SCALE),
)

_GRPO = Algorithm(
    name="grpo",
    summary="group-normalised advantages and PPO's clip",
    source="GRPO, arXiv 2402.03300, with PPO's clip (arXiv 1707.06347)",
    importance=Importance(TOKEN),
    normalisation=STD,
    token_masks=(Clip(0.2, 0.2),),
    departures=(_NO_KL, _BEHAVIOUR_RATIO),
)

_TIS = Algorithm(
    name="tis",
    summary="importance sampling with truncated sequence weights",
    source="the baseline method of arXiv 2602.17616",
    importance=Importance(SEQUENCE, Truncated(8.0)),
    normalisation=STD,
    departures=("No KL term and no clip besides the truncation.",),
)

_MIS = Algorithm(
    name="mis",
    summary="importance sampling that leaves out trajectories with extreme weights",
    source="masked importance sampling (IcePop; verl's rollout correction), weights within [1/8, 8]",
    importance=Importance(SEQUENCE),
    normalisation=STD,
    token_masks=(Within(1 / 8, 8.0),),
    departures=("A trajectory that is left out still counts in the normaliser.",),
)

_STAPO_DEPARTURES = (
    "π and H are of the learner's policy, and the quantile is over all sampled tokens of the minibatch: "
    "the rule of the paper's first version.",
)

_PLAIN = (
    Algorithm(
        name="reinforce",
        summary="the plain policy gradient: no baseline, no correction",
        source="REINFORCE (Williams 1992)",
        baseline=ZERO,
        departures=(_OVER_LENGTH.format(""),),
    ),
    Algorithm(
        name="rloo",
        summary="the mean of the others in the group as baseline",
        source="RLOO, arXiv 2402.14740",
        baseline=LEAVE_ONE_OUT,
        aggregation=CONSTANT,
        departures=(
            "No correction for the behaviour policy: biased as soon as there is policy lag.",
            "The sum over tokens is divided by algorithm.constant_length, which only sets the scale.",
        ),
    ),
    Algorithm(
        name="opo",
        summary="the optimal baseline if score norms grow with length",
        source="OPO, arXiv 2505.23585",
        baseline=LENGTH_WEIGHTED,
        aggregation=TOKEN_MEAN,
        departures=("The paper is strictly on-policy; with policy lag it is biased, and runs all the same.",),
    ),
    Algorithm(
        name="otb",
        summary="an optimal baseline for each token, from the forward pass alone",
        source="OTB, arXiv 2602.07078, with its weights under importance sampling",
        importance=Importance(TOKEN, Truncated(2.0)),
        baseline=OPTIMAL_TOKEN,
        aggregation=TOKEN_MEAN,
        departures=(
            "Token weights are truncated at 2; the baseline counts the members that have a token there. So "
            "where one member alone goes on, its baseline is its own reward and its advantage 0, where verl "
            "sets the baseline to 0.",
        ),
    ),
    Algorithm(
        name="asymre",
        summary="the plain policy gradient with a baseline below the mean",
        source="AsymRE, arXiv 2506.20520; the baseline 0.1 below the group's mean",
        baseline=below_mean(MARGIN),
        departures=(
            "The mean is the group's, not of all problems. A group with equal rewards has advantage 0.1.",
            _OVER_LENGTH.format("; the paper's are of the whole answer"),
        ),
    ),
    Algorithm(
        name="topr",
        summary="successes at full weight, failures at min(w, 1)",
        source="TOPR, arXiv 2503.14286, canonical limits",
        importance=Importance(SEQUENCE, Tapered()),
        normalisation=STD,
        departures=(
            "Advantages are normalised by the group; the paper's are of one baseline, or none. A success is "
            "a reward above the group's mean.",
            _OVER_LENGTH.format("; the paper's are of the whole answer"),
        ),
    ),
)

_CLIPPED = (
    _GRPO,
    replace(
        _GRPO,
        name="dr-grpo",
        summary="GRPO without division by length and deviation",
        source="Dr.GRPO, arXiv 2503.20783",
        normalisation=NO_NORMALISATION,
        aggregation=CONSTANT,
        departures=(
            _NO_KL,
            _BEHAVIOUR_RATIO,
            "The constant is algorithm.constant_length, which only sets the scale.",
        ),
    ),
    Algorithm(
        name="dapo",
        summary="GRPO with clip-higher, token mean, no equal groups, a penalty for overlong answers",
        source="DAPO, arXiv 2503.14476; penalty over the last fifth (there 4096 of 20480 tokens)",
        importance=Importance(TOKEN),
        normalisation=STD,
        token_masks=(Clip(0.2, 0.28),),
        aggregation=TOKEN_MEAN,
        overlong=0.2,
        dynamic_sampling=True,
        departures=(_BEHAVIOUR_RATIO,),
    ),
    Algorithm(
        name="gspo",
        summary="the sequence's geometric mean ratio, clipped",
        source="GSPO, arXiv 2507.18071",
        importance=Importance(GEOMETRIC),
        normalisation=STD,
        token_masks=(Clip(3e-4, 4e-4),),
        departures=(_NO_KL, _BEHAVIOUR_RATIO),
    ),
    Algorithm(
        name="stapo",
        summary="DAPO's loss without spurious tokens of successes",
        source="STAPO, arXiv 2602.15620, τ_p 0.002, τ_h the 80th percentile",
        importance=Importance(TOKEN),
        normalisation=STD,
        token_masks=(Clip(0.2, 0.28), Spurious()),
        aggregation=TOKEN_MEAN,
        departures=(*_STAPO_DEPARTURES, _BEHAVIOUR_RATIO),
    ),
    Algorithm(
        name="decoupled-ppo",
        summary="PPO's clip against a recent policy, corrected from there to the behaviour policy",
        source="decoupled PPO, arXiv 2110.00641, as in AReaL, arXiv 2505.24298; behaviour weight at most 5",
        importance=Importance(TOKEN, Decoupled(5.0)),
        normalisation=STD,
        token_masks=(Clip(0.2, 0.2, level=PROXIMAL),),
        aggregation=TOKEN_MEAN,
        departures=(
            "log π_prox is interpolated between log μ and log π by the token's lag, after AReaL's log-linear "
            "approximation, and not computed by a pass of its own: with one update for each minibatch "
            "that policy would be π itself, and nothing would ever be clipped. π counts as the version that "
            "the step makes, so its ratio to π_prox is (π/μ)^(1/(1+lag)); in AReaL's code, as the version "
            "that the step begins with, (π/μ)^(1/max(lag, 1)).",
            "A behaviour weight above 5 is truncated; AReaL leaves the token out, and the first paper has no "
            "bound.",
        ),
    ),
)

_WITH_CRITIC = (
    Algorithm(
        name="ppo",
        summary="a critic with GAE, and PPO's clip",
        source="PPO, arXiv 1707.06347; γ = λ = 1, clip 0.2, dual clip 3",
        importance=Importance(TOKEN),
        baseline=Gae(),
        token_masks=(Clip(0.2, 0.2, dual=3.0),),
        aggregation=TOKEN_MEAN,
        departures=(
            _BEHAVIOUR_RATIO,
            "One update for each minibatch, so the clip of the critic's value (0.5) never acts.",
            "Advantages are not whitened.",
        ),
    ),
    Algorithm(
        name="vtrace",
        summary="a critic corrected for the behaviour policy",
        source="V-trace, arXiv 1802.01561; both thresholds 1",
        importance=Importance(TOKEN, Truncated(1.0)),
        baseline=VTrace(),
        aggregation=TOKEN_MEAN,
        departures=("No entropy bonus.",),
    ),
)

_WEIGHED = (
    Algorithm(
        name="cispo",
        summary="truncated token weights; no token loses its gradient",
        source="CISPO, arXiv 2506.13585; its ε_high of 5 taken as the ceiling of the ratio itself, no floor",
        importance=Importance(TOKEN, Truncated(5.0)),
        normalisation=STD,
        aggregation=TOKEN_MEAN,
        departures=(_BEHAVIOUR_RATIO,),
    ),
    _TIS,
    replace(
        _TIS,
        name="tis-token",
        summary="importance sampling with truncated token weights",
        source="truncated importance sampling as in verl and TRL, at most 2",
        importance=Importance(TOKEN, Truncated(2.0)),
        aggregation=TOKEN_MEAN,
    ),
    replace(
        _TIS,
        name="tis-geometric",
        summary="importance sampling with the truncated geometric mean ratio",
        source="truncated importance sampling at the geometric level, at most 2",
        importance=Importance(GEOMETRIC, Truncated(2.0)),
    ),
    _MIS,
    replace(
        _MIS,
        name="mis-token",
        summary="importance sampling that leaves out tokens with extreme weights",
        source="masked importance sampling (IcePop), weights within [1/2, 2]",
        importance=Importance(TOKEN),
        token_masks=(Within(1 / 2, 2.0),),
        aggregation=TOKEN_MEAN,
        departures=("A token that is left out still counts in the normaliser.",),
    ),
    replace(
        _MIS,
        name="mis-geometric",
        summary="importance sampling that leaves out trajectories whose mean ratio is not near 1",
        source="masked importance sampling at the geometric level, within [0.999, 1.001]",
        importance=Importance(GEOMETRIC),
        token_masks=(Within(0.999, 1.001),),
    ),
    Algorithm(
        name="m2po",
        summary="the largest squared log-ratios are left out",
        source="M2PO, arXiv 2510.01161; threshold 0.04",
        importance=Importance(TOKEN),
        normalisation=STD,
        token_masks=(SecondMoment(0.04),),
        aggregation=TOKEN_MEAN,
        departures=(
            "The mask is over the whole minibatch, and of tokens that PPO's clip could stop. The released "
            "code differs from the paper; this follows the paper.",
        ),
    ),
    Algorithm(
        name="vespo",
        summary="sequence weights softened to 0 on both sides",
        source="VESPO, arXiv 2602.10693",
        importance=Importance(SEQUENCE, Soft()),
        normalisation=STD,
        departures=(
            "The sign of the advantage is that of the reward minus the group's mean.",
            _OVER_LENGTH.format("; the paper's recipe takes the mean over the minibatch's tokens"),
        ),
    ),
    Algorithm(
        name="p3o",
        summary="the ESS of token ratios caps them and weighs a KL term",
        source="P3O, arXiv 2605.12380",
        importance=Importance(TOKEN, CappedByEss()),
        normalisation=STD,
        penalty=KlToBehaviour(),
        aggregation=TOKEN_MEAN,
        departures=(
            "KL(π ‖ μ) is estimated from the sampled tokens alone, by log ρ + 1/ρ − 1 as in FeynRL, the "
            "authors' code; 1/ρ is at most e^10, where that code drops its gradient.",
        ),
    ),
)

_VARIANCE_CONTROLLED = (
    _VCPO,
    replace(
        _VCPO,
        name="vcpo-ess",
        summary="half of VCPO: the step scaled by ESS, the group's mean as baseline",
        source="the ablation of VCPO, arXiv 2602.17616",
        baseline=GROUP_MEAN,
        departures=(_OWN_ADVANTAGES, *_ESS_SCALE),
    ),
    replace(
        _VCPO,
        name="vcpo-opob",
        summary="half of VCPO: the optimal baseline, steps not scaled",
        source="the ablation of VCPO, arXiv 2602.17616",
        step_rule="off",
        departures=(_OWN_ADVANTAGES, *_OPTIMAL_BASELINE),
    ),
    Algorithm(
        name="vcpo-taper",
        summary="TOPR's tapered weights, the step scaled by their ESS",
        source="this project: the weights of TOPR (2503.14286) under the step scale of VCPO (2602.17616); "
        "docs/evidence/lag.md says what it is worth",
        importance=Importance(SEQUENCE, Tapered()),
        normalisation=STD,
        step_rule="sqrt",
        ess_weights="used",
        departures=(
            "VCPO takes the ESS of untruncated weights: a brake on drift, which tapered weights do not need. "
            "Here it is of the weights used, an estimate of the variance of the update that is made.",
            "The baseline is the group's mean: the optimal one moves towards rewards with large weights and "
            "scores, and may lie above the mean.",
            _OVER_LENGTH.format("; TOPR's are of the whole answer"),
        ),
    ),
    replace(
        _VCPO,
        name="vcpo-clip-higher",
        summary="VCPO with DAPO's clip on token ratios",
        source="VCPO (arXiv 2602.17616) and the clip of DAPO (arXiv 2503.14476)",
        token_masks=(Clip(0.2, 0.28, level=TOKEN),),
        departures=(
            *_VCPO.departures,
            "Score norms are of all tokens of a trajectory, clipped or not: which are clipped depends on the "
            "advantage, and that on the norms.",
        ),
    ),
    replace(
        _VCPO,
        name="vcpo-stapo",
        summary="VCPO without spurious tokens of successes",
        source="VCPO (arXiv 2602.17616) and the mask of STAPO (arXiv 2602.15620)",
        token_masks=(Spurious(),),
        departures=(
            *_VCPO.departures,
            *_STAPO_DEPARTURES,
            "Score norms are of all tokens of a trajectory, left out or not.",
        ),
    ),
)

ALGORITHMS = MappingProxyType(
    {
        algorithm.name: algorithm
        for algorithm in (*_PLAIN, *_CLIPPED, *_WITH_CRITIC, *_WEIGHED, *_VARIANCE_CONTROLLED)
    }
)
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
