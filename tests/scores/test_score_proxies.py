"""The proxies of the score norm against hand-worked numbers, autograd and rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vcpo.errors import NonFiniteError, VcpoError
from vcpo.scores.proxies import logit_energies, token_counts

torch.set_num_threads(1)
examples = settings(deadline=None, max_examples=60)


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """logits (float64), chosen, owners in any order, count and normalisers; some trajectories are empty."""
    count, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    tokens = draw(st.integers(0, 12))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.1, 3.0, 40.0, 500.0]))
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, vocabulary, generator=random, dtype=torch.float64)
    chosen = torch.randint(vocabulary, (tokens,), generator=random)
    owners = torch.randint(count, (tokens,), generator=random)
    normalisers = torch.rand(count, generator=random, dtype=torch.float64) + 0.01
    return logits, chosen, owners, count, normalisers


def logit_gradient_norms(
    logits: Tensor, chosen: Tensor, owners: Tensor, count: int, normalisers: Tensor
) -> list[float]:
    """‖∂ n_i Σ_t log π(y_t) / ∂ logits‖² of each trajectory by autograd, one trajectory after another."""
    norms = []
    for i in range(count):
        mine = (owners == i).nonzero()[:, 0]
        own = logits[mine].requires_grad_()
        log_probs = own.log_softmax(-1)[torch.arange(len(mine)), chosen[mine]]
        (gradient,) = torch.autograd.grad(normalisers[i] * log_probs.sum(), own)
        norms.append(float(gradient.square().sum()))
    return norms


def test_lengths_by_hand() -> None:
    """Trajectory 0 has two tokens and n = 1/2, 1 none, 2 three and n = 2: 2/4, 0, 3·4."""
    owners = torch.tensor([2, 0, 2, 0, 2])
    counts = token_counts(owners, 3, torch.tensor([0.5, 7.0, 2.0]))
    assert counts.tolist() == [0.5, 0.0, 12.0]


def test_energies_by_hand() -> None:
    """Two words with π = (3/4, 1/4). The first chosen: (1/4)² + (1/4)² = 1/8; the second: 2 (3/4)² = 9/8."""
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64).repeat(3, 1)
    chosen, owners = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2])
    energies = logit_energies(logits, chosen, owners, 3, torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64))
    assert energies.tolist() == pytest.approx([10 / 8, 0.0, 4 * 9 / 8], rel=1e-14)


def test_uniform_policy_by_hand() -> None:
    """V equal words: 1 − 2/V + V/V² = 1 − 1/V, whatever was chosen and however large the logits are."""
    for vocabulary in (2, 5, 1000):
        logits = torch.full((1, vocabulary), -3e4)
        one = torch.ones(1)
        energy = logit_energies(logits, torch.tensor([vocabulary - 1]), torch.tensor([0]), 1, one)
        assert energy.item() == pytest.approx(1 - 1 / vocabulary, rel=1e-6)


@examples
@given(rollouts())
def test_energies_equal_autograd(batch: tuple[Tensor, Tensor, Tensor, int, Tensor]) -> None:
    """To 1e-12 of what autograd subtracts from: its own 1 − π(y) has no more digits."""
    energies = logit_energies(*batch)
    scale = float(batch[4].square().max()) * max(len(batch[0]), 1)
    assert energies.tolist() == pytest.approx(logit_gradient_norms(*batch), rel=1e-10, abs=1e-13 * scale)


@examples
@given(rollouts(), st.integers(1, 40))
def test_chunks_do_not_change_the_energies(
    batch: tuple[Tensor, Tensor, Tensor, int, Tensor], budget: int
) -> None:
    whole = logit_energies(*batch, budget=10**6)
    assert torch.allclose(logit_energies(*batch, budget=budget), whole, rtol=1e-13, atol=0)


@examples
@given(rollouts(), st.randoms())
def test_order_of_tokens_does_not_matter(batch: tuple[Tensor, Tensor, Tensor, int, Tensor], random) -> None:
    logits, chosen, owners, count, normalisers = batch
    order = random.sample(range(len(owners)), len(owners))
    moved = logit_energies(logits[order], chosen[order], owners[order], count, normalisers)
    assert torch.allclose(moved, logit_energies(*batch), rtol=1e-12, atol=0)
    assert token_counts(owners[order], count, normalisers).equal(token_counts(owners, count, normalisers))


@examples
@given(rollouts(), st.sampled_from([0.125, 4.0, 2.0**-20]))
def test_normalisers_enter_squared(batch: tuple[Tensor, Tensor, Tensor, int, Tensor], factor: float) -> None:
    """A power of two, so that the products are exact."""
    logits, chosen, owners, count, normalisers = batch
    scaled = logit_energies(logits, chosen, owners, count, factor * normalisers)
    assert scaled.equal(factor**2 * logit_energies(*batch))
    counts = token_counts(owners, count, factor * normalisers)
    assert counts.equal(factor**2 * token_counts(owners, count, normalisers))


@examples
@given(rollouts())
def test_lengths_equal_rational_arithmetic(batch: tuple[Tensor, Tensor, Tensor, int, Tensor]) -> None:
    _, _, owners, count, normalisers = batch
    exact = [float(Fraction(n) ** 2 * owners.tolist().count(i)) for i, n in enumerate(normalisers.tolist())]
    assert token_counts(owners, count, normalisers).tolist() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0])
def test_a_sure_policy_keeps_its_digits_in_float32(gap: float) -> None:
    """Three words, y ahead by ``gap`` nats: with q = e^-gap / (1 + 2 e^-gap), (2q)² + 2q² = 6 q²."""
    logits = torch.tensor([[0.0, gap, 0.0]])
    energy = logit_energies(logits, torch.tensor([1]), torch.tensor([0]), 1, torch.ones(1))
    other = math.exp(-gap) / (1 + 2 * math.exp(-gap))
    assert energy.item() == pytest.approx(6 * other**2, rel=1e-5)


def test_half_precision_logits_are_worked_on_in_float32() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 50, generator=random).bfloat16()
    chosen, owners = torch.arange(9), torch.arange(9) // 5
    energies = logit_energies(logits, chosen, owners, 2, torch.full((2,), 1 / 3, dtype=torch.float64))
    reference = logit_gradient_norms(logits.double(), chosen, owners, 2, torch.full((2,), 1 / 3))
    assert energies.tolist() == pytest.approx(reference, rel=1e-6)


def test_an_impossible_word_is_fine_and_no_gradient_is_recorded() -> None:
    """π = (1/2, 0, 1/2): choosing the first gives 1/4 + 1/4."""
    logits = torch.tensor([[1.0, -math.inf, 1.0]], requires_grad=True)
    energy = logit_energies(logits, torch.tensor([0]), torch.tensor([0]), 1, torch.ones(1))
    assert energy.item() == pytest.approx(0.5)
    assert not energy.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_name_the_trajectory(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(NonFiniteError, match="logit energy at trajectory index 1") as caught:
        logit_energies(logits, torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, 2]), 3, torch.ones(3))
    assert caught.value.index == 1


def test_wrong_shapes_and_indices_are_named() -> None:
    one, zero = torch.ones(1), torch.tensor([0])
    with pytest.raises(VcpoError, match=r"one a trajectory, \[2\], got \(1,\)"):
        token_counts(zero, 2, one)
    with pytest.raises(VcpoError, match="without padding"):
        token_counts(torch.tensor([0, -1]), 1, one)
    with pytest.raises(VcpoError, match="trajectories 0 to 0, got 0 to 1"):
        logit_energies(torch.zeros(2, 3), torch.tensor([0, 0]), torch.tensor([0, 1]), 1, one)
    with pytest.raises(VcpoError, match="do not fit together"):
        logit_energies(torch.zeros(2, 3), zero, zero, 1, one)
    with pytest.raises(VcpoError, match="vocabulary of 3, got 3 to 3"):
        logit_energies(torch.zeros(1, 3), torch.tensor([3]), zero, 1, one)
