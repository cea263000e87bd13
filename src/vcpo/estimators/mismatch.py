"""What the sampler's numerics alone cost: the per-token mismatch, and the ESS ratio that follows from it.

At lag 0 learner π and sampler μ have the same weights and other kernels, number types or rounding. Then
δ_t = log π(y_t) − log μ(y_t) is small and not zero, a sequence of L tokens has the weight w = exp(Σ_t δ_t),
and the ESS ratio of on-policy data falls with length. This module measures the first and predicts the last.

Why one number for each token suffices. The sampler draws y_t from μ, so E[e^δ_t | y_<t] = 1, and
E[δ_t | y_<t] = −KL_t is of second order: to leading order the δ_t are martingale differences, uncorrelated
along a sequence, whatever the text is like. With tokens that are also alike, E w = 1 and

    E w² = exp(v L)         v = log E[e^(2δ)] − 2 log E[e^δ]        ρ → 1 / E w² = exp(−v L)

which is exact for independent, identically distributed tokens of any distribution: v is −log of the ESS ratio
of single tokens, and the variance of δ where that is small. What can break it: text whose mismatch differs
much from one sequence to the next (then E w² is larger), and a sampler that does not draw from the
distribution whose log-probs it records. ``correlation`` measures the first: Var(Σδ) over its value for
uncorrelated tokens. ``drift`` measures the second: log E[e^δ] is 0 for an honest sampler.

Source: this project's own derivation, checked by simulation in ``tests/estimators/test_mismatch.py``. That
log w ≈ normal gives E ρ ≈ exp(−σ²) is common knowledge; VCPO (arXiv 2602.17616) has ρ_on as a constant that
is tuned by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vcpo.errors import VcpoError
from vcpo.estimators.checks import require_finite, require_same_shape

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Num
    from torch import Tensor

RESAMPLINGS = 2000
SIMULATED = 4_000_000
"""The most weights that :func:`ess_ratio_interval` draws."""
BINS = 32
"""Sequences of nearly the same variance share their mean in :func:`expected_ess_ratio`."""
LARGEST_VARIANCE = 100.0
"""Beyond it one sequence owns the minibatch anyway: e^10 is one standard deviation."""
_TIME_STEP = 0.6
_REACH, _WIDEST_STEP, _STEP_TIMES_DEVIATION = 6.5, 0.4, 0.4
"""Of the normal variable. The rule's errors are e^(−π²/0.6), e^(−2π²/0.4²) and e^(−π²/(2·0.4)) or less."""


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mismatch:
    """How learner and sampler differ in the log-probs of the same tokens under the same weights."""

    sequences: int
    """Those with sampled tokens."""
    clusters: int
    """Prompts that they answer: what the intervals are over."""
    tokens: int
    longest: int
    """Sampled tokens of the longest sequence."""
    mean: Estimate
    """E δ, in nats: minus the KL divergence of the learner's policy from the sampler's."""
    rms: Estimate
    """√E δ², in nats."""
    variance: Estimate
    """Var δ, in nats²."""
    rate: Estimate
    """v = log E[e^(2δ)] − 2 log E[e^δ], nats² a token."""
    drift: Estimate
    """log E[e^δ], 0 for a sampler that draws from what it records."""
    correlation: Estimate
    """Var(Σδ) / (L Var δ), over all lengths: 1 where tokens are uncorrelated."""
    largest: float
    """max |δ|."""

    @property
    def uncorrelated(self) -> bool:
        """Whether the data agree with tokens that are uncorrelated along a sequence."""
        return self.correlation.low <= 1 <= self.correlation.high

    @property
    def honest(self) -> bool:
        """Whether the data agree with a sampler that draws from what it records."""
        return self.drift.low <= 0 <= self.drift.high

    @property
    def sequence_rate(self) -> Estimate:
        """Variance that each token adds to log w: ``rate``, times ``correlation`` where that is not 1."""
        if self.uncorrelated:
            return self.rate
        return Estimate(*(self.rate.value * factor for factor in self.correlation))


def measure_mismatch(
    log_ratios: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clusters: Int[Tensor, " B"],
) -> Mismatch:
    """The mismatch from the token log-ratios of sequences sampled at lag 0.

    With sums over all N sampled tokens, and S_i = Σ_t δ_it, L_i over those of sequence i:

        mean  m = Σδ / N                 variance  s² = Σδ² / N − m²
        rate  v = log(Σe^(2δ) / N) − 2 log(Σe^δ / N)
        correlation  Σ_i (S_i − m L_i)² / (N s²)

    The last is the slope of Var(S) on L through the origin, over s². Intervals are percentiles of a bootstrap
    that draws whole clusters (the rollouts of a prompt) with replacement, with random numbers of its own.
    ``log_ratios`` outside ``mask`` never matter; ``clusters`` has the prompt of each sequence. float64
    inside; no gradient.

    Raises:
        NonFiniteError: a log-ratio inside the mask is not finite; names the sequence.
        VcpoError: fewer than two clusters have sampled tokens, or the shapes differ.
    """
    require_same_shape(log_ratios=log_ratios, mask=mask)
    sampled = mask.any(-1)
    deltas = torch.where(mask, log_ratios.detach().double(), 0.0)
    require_finite(deltas, "log-ratio", "learner or sampler gave an unusable log-probability")
    deltas, mask = deltas[sampled], mask[sampled]
    names, members = clusters[sampled].unique(return_inverse=True)
    if len(names) < 2:
        raise VcpoError(
            f"a mismatch is measured on two prompts or more with sampled tokens, got {len(names)}"
        )
    sums = deltas.new_zeros(len(names), 8).index_add(0, members, _sequence_sums(deltas, mask))
    whole, drawn = _figures(sums.sum(0)), _figures(_resampled(sums))
    low, high = drawn.quantile(deltas.new_tensor([0.025, 0.975]), dim=-1)
    figures = zip(whole.tolist(), low.tolist(), high.tolist(), strict=True)
    mean, rms, variance, rate, drift, correlation = (Estimate(*figure) for figure in figures)
    return Mismatch(
        sequences=len(deltas),
        clusters=len(names),
        tokens=int(mask.sum()),
        longest=int(mask.sum(-1).max()),
        mean=mean,
        rms=rms,
        variance=variance,
        rate=rate,
        drift=drift,
        correlation=correlation,
        largest=float(deltas.abs().max()),
    )


def _sequence_sums(deltas: Tensor, mask: Tensor) -> Tensor:
    """[B, 8]: everything that :func:`_figures` needs is a sum over sequences of these. e^δ − 1 instead of
    e^δ, because the mismatch of equal numerics is at the last digit."""
    length, total = mask.sum(-1).double(), deltas.sum(-1)
    columns = (
        length,
        total,
        deltas.square().sum(-1),
        deltas.expm1().sum(-1),
        (2 * deltas).expm1().sum(-1),
        total.square(),
        total * length,
        length.square(),
    )
    return torch.stack(columns, -1)


def _figures(sums: Float64[Tensor, "... 8"]) -> Float64[Tensor, "6 ..."]:
    """Mean, RMS, variance, rate, drift, correlation from sums over sequences."""
    tokens, total, squares, first, second, square_sums, cross, square_lengths = sums.unbind(-1)
    mean = total / tokens
    variance = (squares / tokens - mean.square()).clamp(min=0)
    drift = (first / tokens).log1p()
    rate = ((second / tokens).log1p() - 2 * drift).clamp(min=0)
    of_sequences = (square_sums - 2 * mean * cross + mean.square() * square_lengths) / tokens
    correlation = torch.where(variance > 0, of_sequences / variance, 1.0)
    return torch.stack([mean, (squares / tokens).sqrt(), variance, rate, drift, correlation])


def _resampled(sums: Float64[Tensor, "P 8"]) -> Float64[Tensor, "R 8"]:
    """Sums of P clusters drawn with replacement, R times."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLINGS, len(sums)), generator=generator)
    counts = sums.new_zeros(RESAMPLINGS, len(sums))
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return counts @ sums.cpu()


def expected_ess_ratio(variances: Num[Tensor, " B"]) -> float:
    """E ρ of a minibatch of B sequences whose log-weights are normal with these variances and E w = 1.

    For variances v L_i it is the on-policy ESS ratio of a minibatch with these response lengths. For large
    minibatches it tends to

        ρ = B / Σ_i exp(s_i)                            as E w_i = 1 and E w_i² = exp(s_i)

    which is wrong where one weight can own the sum: it falls below 1/B, the floor of any ESS ratio. So the
    expectation itself is computed. With 1/q = ∫ e^(−tq) dt for q = Σ w², and for each sequence
    φ_i(t) = E e^(−t w_i²) and g_i(t) = E w_i e^(−t w_i²),

        B · E ρ = E[(Σw)² / Σw²] = 1 + ∫₀^∞ [(Σ g_i/φ_i)² − Σ (g_i/φ_i)²] Π φ_j dt

    where the 1 is the integral of the terms i = j. Both integrals by the trapezoidal rule, which is exact to
    all digits for such smooth functions: over log t, and over the normal variable inside φ and g. Sequences
    share :data:`BINS` variances, and none counts as more than :data:`LARGEST_VARIANCE`. Source: this
    project's own derivation. Returns a number between 1/B and 1.

    Raises:
        VcpoError: there is no sequence, or a variance is negative.
        NonFiniteError: a variance is not finite; names the sequence.
    """
    if not len(variances):
        raise VcpoError("the ESS of no trajectories is undefined; skip the step")
    values = require_finite(variances.detach().double().cpu(), "variance of a log-weight")
    if values.min() < 0:
        raise VcpoError(f"the variance of a log-weight is at least 0, got {float(values.min())}")
    bins = [part for part in values.clamp(max=LARGEST_VARIANCE).sort()[0].tensor_split(BINS) if len(part)]
    means, places = torch.stack([part.mean() for part in bins]).unique(return_inverse=True)
    sizes = values.new_tensor([len(part) for part in bins])
    size = 1 + _distinct_pairs(means, torch.zeros_like(means).index_add(0, places, sizes))
    return min(max(size / len(values), 1 / len(values)), 1.0)


def ess_ratio_interval(variances: Num[Tensor, " B"]) -> tuple[float, float]:
    """Where 95 % of ESS ratios are, of minibatches as in :func:`expected_ess_ratio`: by simulation, always
    with the same random numbers. Variances are finite and not negative."""
    values = variances.detach().double().cpu()
    generator = torch.Generator().manual_seed(0)
    count = min(RESAMPLINGS, SIMULATED // len(values) + 1)
    normal = torch.randn(count, len(values), generator=generator, dtype=torch.float64)
    log_weights = normal * values.sqrt() - values / 2
    sizes = (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()
    low, high = (sizes / len(values)).quantile(values.new_tensor([0.025, 0.975]))
    return float(low), min(float(high), 1.0)


def _distinct_pairs(variances: Float64[Tensor, " K"], counts: Float64[Tensor, " K"]) -> float:
    """The integral over the pairs i ≠ j, where ``counts`` sequences have each of the K variances."""
    total, narrowest = float(counts.sum()), float(variances[0])
    # Below, the integrand is under (B t)²; above, e^(−t w²) is 0 even of the smallest weights of one kind.
    begin = -2 * math.log(total) - 16
    end = narrowest + 12 * math.sqrt(narrowest) + 4
    log_times = torch.arange(begin, end + _TIME_STEP, _TIME_STEP, dtype=torch.float64)
    powers, slopes = zip(*(_transforms(variance, log_times) for variance in variances), strict=True)
    log_product = counts @ torch.stack(powers)
    ratios = torch.stack(slopes)
    pairs = (counts @ ratios).square() - counts @ ratios.square()
    return float((pairs * (log_product + log_times).exp()).sum() * _TIME_STEP)


def _transforms(variance: Tensor, log_times: Float64[Tensor, " N"]) -> tuple[Tensor, Tensor]:
    """log φ(t) and g(t)/φ(t) of a log-normal weight with E w = 1."""
    deviation = math.sqrt(float(variance))
    step = min(_WIDEST_STEP, _STEP_TIMES_DEVIATION / max(deviation, 1.0))
    z = torch.arange(-_REACH, _REACH + deviation, step, dtype=torch.float64)  # w times the density peaks at σ
    log_weights = deviation * z - variance / 2
    density = step / math.sqrt(2 * math.pi) * (-z.square() / 2).exp()
    kept = (log_times[:, None] + 2 * log_weights).exp().neg().exp()
    power = kept @ density
    return power.log(), kept @ (density * log_weights.exp()) / power
