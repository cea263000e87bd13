"""Compositions against float64 oracles written as one loop over trajectories; contradictions are refused."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vcpo.algorithms import Algorithm, Evidence, Update, get_algorithm
from vcpo.algorithms.parts import (
    GEOMETRIC,
    OPTIMAL,
    STD,
    TOKEN,
    UNCORRECTED,
    ZERO,
    Clip,
    Importance,
    Truncated,
)
from vcpo.config import AlgorithmConfig
from vcpo.errors import ConfigError, NonFiniteError, VcpoError

torch.set_num_threads(1)

B, T = 8, 5
NAMES = ["vcpo", "grpo", "rloo", "tis"]


def recipe(**settings: Any) -> AlgorithmConfig:
    """The recipe's section with these fields set and the others left to their defaults."""
    return AlgorithmConfig.model_validate(settings)


def evidence(seed: int = 0, spread: float = 1.5) -> Evidence:
    """Two groups of four, interleaved; one answer is empty; one weight is far above 8; garbage is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[0], mask[5] = True, False
    log_probs, behaviour = normal(B, T) - 2, normal(B, T) * spread - 2
    behaviour[0] = log_probs[0] - 1
    return Evidence(
        log_probs=log_probs.masked_fill(~mask, math.nan),
        behaviour_log_probs=behaviour.masked_fill(~mask, math.inf),
        mask=mask,
        rewards=normal(B),
        groups=torch.tensor([4, -1, 4, -1, 4, -1, 4, -1]),
        squared_score_norms=normal(B) ** 2,
    )


def rows(given: Evidence, order: Tensor) -> Evidence:
    known = {f.name: getattr(given, f.name) for f in fields(Evidence)}
    return replace(given, **{name: value[order] for name, value in known.items() if value is not None})


def group_of(given: Evidence, i: int) -> list[int]:
    return [j for j in range(B) if given.groups[j] == given.groups[i]]


def ratios_of(given: Evidence, i: int) -> list[float]:
    pairs = zip(given.log_probs[i].tolist(), given.behaviour_log_probs[i].tolist(), strict=True)
    return [math.exp(p - q) if m else 1.0 for (p, q), m in zip(pairs, given.mask[i].tolist(), strict=True)]


def sample_std(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def oracle(name: str, given: Evidence) -> list[list[float]]:
    """Coefficients of the four algorithms, each from its formula, one trajectory and token at a time."""
    rewards, norms = given.rewards.tolist(), given.squared_score_norms
    assert norms is not None
    weights = [min(math.prod(ratios_of(given, i)), 8.0) for i in range(B)]
    result = []
    for i in range(B):
        own = group_of(given, i)
        mean = math.fsum(rewards[j] for j in own) / len(own)
        standard = (rewards[i] - mean) / (sample_std([rewards[j] for j in own]) + 1e-6)
        if name == "vcpo":
            omega = {j: weights[j] ** 2 * norms[j].item() for j in own}
            best = math.fsum(omega[j] * rewards[j] for j in own) / math.fsum(omega.values())
            row = [weights[i] * (rewards[i] - best)] * T
        elif name == "tis":
            row = [weights[i] * standard] * T
        elif name == "rloo":
            others = [rewards[j] for j in own if j != i]
            row = [rewards[i] - math.fsum(others) / len(others)] * T
        else:
            row = [
                0.0 if standard * (r - 1) > 0.2 * abs(standard) else r * standard for r in ratios_of(given, i)
            ]
        result.append([c if m else 0.0 for c, m in zip(row, given.mask[i].tolist(), strict=True)])
    return result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_coefficients_equal_the_formula(name: str, seed: int) -> None:
    given = evidence(seed)
    update = get_algorithm(name).update(given)
    expected = torch.tensor(oracle(name, given), dtype=torch.float64)
    assert torch.allclose(update.coefficients, expected, rtol=1e-11, atol=1e-12)
    assert not update.coefficients.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_log_weights_of_every_algorithm_are_of_the_sequence_and_untruncated(name: str) -> None:
    given = evidence()
    update = get_algorithm(name).update(given)
    products = [math.prod(ratios_of(given, i)) for i in range(B)]
    assert update.log_weights.exp().tolist() == pytest.approx(products, rel=1e-12)
    assert products[0] == pytest.approx(math.exp(T)) and products[0] > 8
    assert update.log_ratios.exp()[given.mask].tolist() == pytest.approx(
        [r for i in range(B) for r, m in zip(ratios_of(given, i), given.mask[i].tolist(), strict=True) if m]
    )
    assert not update.log_ratios[~given.mask].any()


def test_where_limits_were_active() -> None:
    given = evidence()
    above = [math.prod(ratios_of(given, i)) > 8 for i in range(B)]
    assert get_algorithm("vcpo").update(given).limited.tolist() == above
    assert not get_algorithm("rloo").update(given).limited.any()
    clipped = get_algorithm("grpo").update(given)
    # A coefficient is zero inside the mask exactly where the clip stopped it.
    assert torch.equal(clipped.limited, (clipped.coefficients == 0) & given.mask)
    assert clipped.limited.any()


def test_token_and_geometric_levels() -> None:
    given, base = evidence(), get_algorithm("rloo")
    token = replace(base, importance=Importance(TOKEN, Truncated(0.9))).update(given)
    geometric = replace(base, importance=Importance(GEOMETRIC)).update(given)
    for i in range(B):
        ratios, kept = ratios_of(given, i), given.mask[i].tolist()
        gain, length = token.advantages[i].item(), max(sum(kept), 1)
        limited = [min(r, 0.9) * gain if m else 0.0 for r, m in zip(ratios, kept, strict=True)]
        mean = [math.prod(ratios) ** (1 / length) * gain if m else 0.0 for m in kept]
        assert token.coefficients[i].tolist() == pytest.approx(limited, rel=1e-11)
        assert geometric.coefficients[i].tolist() == pytest.approx(mean, rel=1e-11)
        assert token.limited[i].tolist() == [m and r > 0.9 for r, m in zip(ratios, kept, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_order_of_trajectories_and_split_into_groups_do_not_matter(name: str) -> None:
    given, algorithm = evidence(), get_algorithm(name)
    whole = algorithm.update(given)

    def compare(order: Tensor) -> None:
        part: Update = algorithm.update(rows(given, order))
        for field in fields(Update):
            expected = getattr(whole, field.name)
            if expected is not None:
                found = getattr(part, field.name)
                assert torch.allclose(found, expected[order], rtol=1e-12, atol=1e-13), field.name

    compare(torch.tensor([5, 2, 7, 0, 1, 6, 3, 4]))
    compare((given.groups == 4).nonzero()[:, 0])
    compare((given.groups == -1).nonzero()[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_move_nothing(name: str) -> None:
    given = replace(evidence(spread=4.0), rewards=torch.full((B,), 0.1))
    update = get_algorithm(name).update(given)
    assert not update.coefficients.any() and not update.advantages.any()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("topr", {"baseline": "zero"}, 0.75),
        ("asymre", {"normalise": "std"}, 0.1),
        ("dapo", {"baseline": "zero"}, 0.75),
    ],
)
def test_equal_rewards_are_not_divided_by_their_deviation(name: str, settings: Any, expected: float) -> None:
    given = replace(evidence(), rewards=torch.full((B,), 0.75))
    update = get_algorithm(name).with_overrides(recipe(**settings)).update(given)
    assert update.advantages.tolist() == pytest.approx([expected] * B)


@pytest.mark.parametrize("name", NAMES)
def test_broken_policy_is_named(name: str) -> None:
    given = evidence()
    given.mask[3, 1] = True
    given.log_probs[3, 1] = math.nan
    with pytest.raises(NonFiniteError, match="learner log-probability at trajectory index 3"):
        get_algorithm(name).update(given)


def test_score_norms_are_asked_for_and_missed() -> None:
    assert [name for name in NAMES if get_algorithm(name).needs_score_norms] == ["vcpo"]
    with pytest.raises(VcpoError, match="squared_score_norms"):
        get_algorithm("vcpo").update(replace(evidence(), squared_score_norms=None))
    get_algorithm("tis").update(replace(evidence(), squared_score_norms=None))


def test_scale_follows_the_rule_of_the_algorithm() -> None:
    assert get_algorithm("vcpo").scale(torch.tensor(0.16), 0.64) == pytest.approx(0.5)
    assert get_algorithm("grpo").scale(0.01, 0.64) == 1.0
    with pytest.raises(NonFiniteError):
        get_algorithm("grpo").scale(math.nan, 1.0)


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    vcpo = get_algorithm("vcpo")
    assert vcpo.with_overrides(recipe()) == vcpo
    changed = vcpo.with_overrides(
        recipe(truncation=2.0, baseline="zero", normalise="std", aggregation="constant", constant_length=4)
    )
    assert changed.importance == Importance(vcpo.importance.level, Truncated(2.0))
    assert (changed.baseline, changed.normalisation, changed.step_rule) == (ZERO, STD, "sqrt")
    assert changed.normalisers(torch.tensor([3, 0])).tolist() == [1 / 8, 0.0]
    assert not changed.needs_score_norms
    assert vcpo.with_overrides(recipe(step_scale="linear")).scale(0.25, 1.0) == 0.25
    assert vcpo.with_overrides(recipe(aggregation="token-mean")).normalisers(
        torch.tensor([3, 1])
    ).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("baseline", ["zero", "group-mean", "leave-one-out", "optimal"])
@pytest.mark.parametrize("normalise", ["none", "std"])
def test_baseline_and_normalisation_override(baseline, normalise) -> None:
    given = evidence()
    assert given.squared_score_norms is not None
    norms = given.squared_score_norms.tolist()
    config = recipe(name="tis", baseline=baseline, normalise=normalise)
    update = get_algorithm("tis").with_overrides(config).update(given)
    for i in range(B):
        own = group_of(given, i)
        weights = {
            "zero": lambda j: 0.0,
            "group-mean": lambda j: 1.0,
            "leave-one-out": lambda j, i=i: float(j != i),
            "optimal": lambda j: min(math.prod(ratios_of(given, j)), 8.0) ** 2 * norms[j],
        }[baseline]
        total = sum(weights(j) for j in own) or 1.0
        expected = given.rewards[i].item() - sum(weights(j) * given.rewards[j].item() for j in own) / total
        if normalise == "std":
            expected /= sample_std([given.rewards[j].item() for j in own]) + 1e-6
        assert update.advantages[i].item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("grpo", recipe(baseline="optimal")),
        ("grpo", recipe(truncation=2.0)),
        ("rloo", recipe(truncation=2.0)),
        ("tis", recipe(clip_high=0.3)),
        ("tis", recipe(margin=0.2)),
        ("mis", recipe(baseline="optimal")),
        ("vcpo", recipe(baseline="group-mean", margin=0.2)),
        ("vcpo", recipe(constant_length=64)),
        ("topr", recipe(truncation=2.0)),
        ("vespo", recipe(truncation=2.0)),
        ("p3o", recipe(truncation=2.0)),
        ("decoupled-ppo", recipe(truncation=2.0)),
        ("topr", recipe(level="token")),
        ("topr", recipe(level="none")),
        ("decoupled-ppo", recipe(level="sequence")),
        ("p3o", recipe(level="sequence")),
        ("mis", recipe(level="none")),
        ("ppo", recipe(normalise="std")),
    ],
)
def test_contradicting_overrides(name: str, config: AlgorithmConfig) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\."):
        get_algorithm(name).with_overrides(config)


@pytest.mark.parametrize(
    ("importance", "baseline", "masks"),
    [(Importance(TOKEN), OPTIMAL, ()), (Importance(UNCORRECTED), ZERO, (Clip(),))],
)
def test_contradicting_parts(importance, baseline, masks) -> None:
    with pytest.raises(ConfigError, match="mine: "):
        Algorithm("mine", "", "", importance, baseline, token_masks=masks)


def test_bfloat16_log_probs_are_weighed_in_float32() -> None:
    given = evidence()
    half = replace(
        given,
        log_probs=given.log_probs.bfloat16(),
        behaviour_log_probs=given.behaviour_log_probs.float(),
        rewards=given.rewards.float(),
    )
    for name in NAMES:
        update = get_algorithm(name).update(half)
        assert update.coefficients.dtype == update.log_weights.dtype == torch.float32
        exact = replace(given, log_probs=half.log_probs.double())
        expected = torch.tensor(oracle(name, exact), dtype=torch.float32)
        assert torch.allclose(update.coefficients, expected, rtol=1e-4, atol=1e-5)
