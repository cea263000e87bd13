"""Masks over a minibatch, by hand and against slow twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.errors import ConfigError, NonFiniteError
from vcpo.estimators.masks import not_spurious, second_moment

torch.set_num_threads(1)


def test_second_moment_by_hand() -> None:
    """(log ρ)² are 1, 4, 9 | 16, 0: candidates are 1, 4 and 9 (A > 0 and ρ > 1); 16 has A < 0 and ρ > 1."""
    ratios = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, math.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    gain = torch.tensor([1.0, -1.0])
    # Means with 0, 1, 2, 3 candidates: 16/2, 17/3, 21/4, 30/5.
    for threshold, kept in [(8.5, 3), (6.0, 3), (5.9, 2), (5.3, 2), (5.2, 0)]:
        found = second_moment(ratios, mask, gain, threshold)
        assert found.tolist() == [[place < kept for place in range(3)], [True, True, False]], threshold


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.001, 2.0))
def test_second_moment_against_leaving_out_one_at_a_time(seed: int, threshold: float) -> None:
    """The largest candidates go first; what is left is the largest such set whose mean fits."""
    generator = torch.Generator().manual_seed(seed)
    ratios = 0.6 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator) < 0.8
    gain = torch.randn(4, generator=generator, dtype=torch.float64)
    places = [(i, t) for i in range(4) for t in range(5) if mask[i, t]]
    could = sorted((p for p in places if ratios[p] * gain[p[0]] > 0), key=lambda p: -(float(ratios[p]) ** 2))
    left = set(places)
    for out in [None, *could]:
        left -= {out}
        if left and sum(float(ratios[p]) ** 2 for p in left) / len(left) <= threshold:
            break
    found = second_moment(ratios, mask, gain, threshold)
    assert {(i, t) for i, t in found.nonzero().tolist()} == left


def test_spurious_by_hand() -> None:
    """Of five entropies the 60 % quantile is the fourth, 0.7: only entropies strictly below it are low."""
    logs = torch.tensor([[0.001, 0.001, 0.5], [0.001, 0.5, 1.0]]).log()
    entropies = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.9, math.inf]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kept = not_spurious(logs, entropies, mask, torch.tensor([1.0, -1.0]), 0.002, 0.6)
    assert kept.tolist() == [[False, True, True], [True, True, False]]
    assert not not_spurious(logs, entropies, torch.zeros_like(mask), torch.ones(2)).any()


def test_bad_input_is_named() -> None:
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="threshold"):
        second_moment(ones, mask, torch.ones(2), 0.0)
    with pytest.raises(ConfigError, match="percentile"):
        not_spurious(ones, ones, mask, torch.ones(2), 0.1, 1.5)
    broken = torch.tensor([[1.0, 1.0], [math.nan, 1.0]])
    with pytest.raises(NonFiniteError, match="trajectory index 1"):
        second_moment(broken, mask, torch.ones(2))
    with pytest.raises(NonFiniteError, match="entropy at trajectory index 1"):
        not_spurious(ones, broken, mask, torch.ones(2))
