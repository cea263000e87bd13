"""The counter-based random numbers against a pure-Python SplitMix64 and known moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcpo.samplers.random import derive_seed, uniforms

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
WHOLE = st.integers(0, MASK)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(seed: int, position: int) -> float:
    return float(uniforms(np.array([seed], np.uint64), np.array([position], np.uint64))[0])


def test_seed_zero_gives_the_published_splitmix64_sequence() -> None:
    """The finaliser maps 0 to 0, so positions 1, 2, … of seed 0 are the generator's outputs from state 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [mix(GOLDEN * n & MASK) for n in range(1, 5)] == published
    assert [draw(0, n) for n in range(1, 5)] == [(z >> 11) / 2**53 for z in published]


@given(WHOLE, st.integers(0, 10**6))
def test_uniforms_equal_their_integer_twin(seed: int, position: int) -> None:
    assert draw(seed, position) == (mix((mix(seed) + position * GOLDEN) & MASK) >> 11) / 2**53


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_uniforms_have_the_moments_of_the_uniform_distribution(varied: str) -> None:
    """200,000 numbers: mean 1/2, variance 1/12, fourth central moment 1/80, no correlation with the next."""
    count = 200_000
    counter, fixed = np.arange(count, dtype=np.uint64), np.full(count, 3, np.uint64)
    u = uniforms(counter, fixed) if varied == "seed" else uniforms(fixed, counter)
    centred = u - 0.5
    assert (u.min() >= 0, u.max() < 1) == (True, True)
    assert abs(centred.mean()) < 4 * np.sqrt(1 / 12 / count)
    assert centred.var() == pytest.approx(1 / 12, abs=4 * np.sqrt((1 / 80 - 1 / 144) / count))
    assert (centred**4).mean() == pytest.approx(1 / 80, abs=4 * np.sqrt((1 / 2304 - 1 / 6400) / count))
    assert abs((centred[1:] * centred[:-1]).mean()) < 4 / 12 / np.sqrt(count)
    largest_gap = np.abs(np.sort(u) - (np.arange(count) + 0.5) / count).max()
    assert largest_gap < 1.95 / np.sqrt(count)  # Kolmogorov-Smirnov, one in a thousand


@given(st.lists(WHOLE, min_size=1, max_size=5))
def test_a_derived_seed_folds_its_parts_in_order(parts: list[int]) -> None:
    state = 0
    for part in parts:
        state = mix((state + part + GOLDEN) & MASK)
    assert derive_seed(*parts) == state


@given(WHOLE, WHOLE)
def test_the_order_and_number_of_parts_matter(a: int, b: int) -> None:
    assert (derive_seed(a, b) == derive_seed(b, a)) == (a == b)
    assert len({derive_seed(a), derive_seed(a, b), derive_seed(a, b, 0)}) == 3
