"""GAE and V-trace against the sums of their papers, written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.errors import ConfigError, NonFiniteError, VcpoError
from vcpo.estimators.critic import gae, vtrace

torch.set_num_threads(1)


def case(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (5,), generator=generator)
    mask = torch.arange(5)[None] < lengths[:, None]
    values, ratios = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    return rewards, values.masked_fill(~mask, math.nan), ratios.masked_fill(~mask, math.inf), mask


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), discount=st.floats(0, 1), decay=st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_differences(seed: int, discount: float, decay: float) -> None:
    rewards, values, _, mask = case(seed)
    advantages, targets = gae(rewards, values, mask, discount, decay)
    for i in range(5):
        v = [*values[i][mask[i]].tolist(), 0.0]
        r = [0.0] * (len(v) - 2) + [rewards[i].item()]
        deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(len(v) - 1)]
        for t in range(len(deltas)):
            expected = sum((discount * decay) ** k * d for k, d in enumerate(deltas[t:]))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert targets[i, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert not advantages[~mask].any() and not targets[~mask].any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), discount=st.floats(0, 1), ceiling=st.floats(0.1, 3.0))
def test_vtrace_is_the_sum_of_its_definition(seed: int, discount: float, ceiling: float) -> None:
    rewards, values, ratios, mask = case(seed)
    advantages, targets = vtrace(rewards, values, ratios, mask, discount, ceiling, ceiling / 2)
    for i in range(5):
        v, w = [*values[i][mask[i]].tolist(), 0.0], ratios[i][mask[i]].exp().tolist()
        rho, c = [min(ceiling, x) for x in w], [min(ceiling / 2, x) for x in w]
        r = [0.0] * (len(w) - 1) + [rewards[i].item()] if w else []

        def target(s: int, v=v, rho=rho, c=c, r=r) -> float:
            terms = (
                discount ** (t - s) * math.prod(c[s:t]) * rho[t] * (r[t] + discount * v[t + 1] - v[t])
                for t in range(s, len(r))
            )
            return v[s] + sum(terms)

        for s in range(len(w)):
            assert targets[i, s].item() == pytest.approx(target(s), abs=1e-11)
            following = target(s + 1) if s + 1 < len(w) else 0.0
            assert advantages[i, s].item() == pytest.approx(r[s] + discount * following - v[s], abs=1e-11)


def test_on_policy_vtrace_with_no_discount_is_gae_with_lambda_one() -> None:
    rewards, values, _, mask = case(3)
    traced = vtrace(rewards, values, torch.zeros_like(values), mask)
    for found, expected in zip(traced, gae(rewards, values, mask), strict=True):
        torch.testing.assert_close(found, expected)


def test_bad_input_is_named() -> None:
    rewards, mask = torch.ones(2), torch.ones(2, 2, dtype=torch.bool)
    values = torch.zeros(2, 2)
    with pytest.raises(ConfigError, match=r"decay is between 0 and 1, got 1\.5"):
        gae(rewards, values, mask, 1.0, 1.5)
    with pytest.raises(ConfigError, match="trace ceiling"):
        vtrace(rewards, values, values, mask, 1.0, 0.5, 1.0)
    with pytest.raises(VcpoError, match="come first"):
        gae(rewards, values, torch.tensor([[False, True], [True, True]]))
    with pytest.raises(NonFiniteError, match="value at trajectory index 1"):
        gae(rewards, torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), mask)
