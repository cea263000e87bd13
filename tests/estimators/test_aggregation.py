"""Normalisers against the means that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.errors import ConfigError
from vcpo.estimators.aggregation import constant, sequence_mean, token_mean

torch.set_num_threads(1)
examples = settings(deadline=None, max_examples=60)

answers = st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=6)


def weighted(terms: list[list[float]], normalisers: torch.Tensor) -> float:
    return math.fsum(n * math.fsum(row) for n, row in zip(normalisers.tolist(), terms, strict=True))


def counts(terms: list[list[float]]) -> torch.Tensor:
    return torch.tensor([len(row) for row in terms], dtype=torch.float64)


@examples
@given(answers)
def test_each_is_its_mean(terms: list[list[float]]) -> None:
    means = [math.fsum(row) / len(row) if row else 0.0 for row in terms]
    assert weighted(terms, sequence_mean(counts(terms))) == pytest.approx(math.fsum(means) / len(terms))
    total, everything = sum(map(len, terms)), math.fsum(x for row in terms for x in row)
    assert weighted(terms, token_mean(counts(terms))) == pytest.approx(everything / max(total, 1))
    assert weighted(terms, constant(counts(terms), 7.0)) == pytest.approx(everything / (7 * len(terms)))


def test_hand_worked_with_an_empty_answer() -> None:
    lengths = torch.tensor([4, 0, 1, 3])
    assert sequence_mean(lengths).tolist() == pytest.approx([1 / 16, 0, 1 / 4, 1 / 12])
    assert token_mean(lengths).tolist() == pytest.approx([1 / 8, 0, 1 / 8, 1 / 8])
    assert constant(lengths, 5).tolist() == pytest.approx([1 / 20, 0, 1 / 20, 1 / 20])
    assert sequence_mean(lengths).dtype == constant(lengths, 5).dtype == torch.float32


def test_only_empty_answers() -> None:
    for normalisers in (sequence_mean, token_mean, lambda lengths: constant(lengths, 2)):
        assert normalisers(torch.zeros(3, dtype=torch.long)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("length", [0.0, -1.0, math.nan])
def test_bad_constant(length: float) -> None:
    with pytest.raises(ConfigError, match="constant length"):
        constant(torch.ones(2), length)
