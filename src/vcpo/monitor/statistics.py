"""Small statistics of a run: intervals, smoothing, and totals over the rows of metrics.jsonl."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from vcpo.errors import VcpoError
from vcpo.monitor.glossary import HISTOGRAM, SAMPLERS

Row = Mapping[str, Any]
"""One line of metrics.jsonl; a value is None where it was not finite."""


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n), p = successes/n (Wilson 1927, JASA 22).
    Unlike p ± z·σ it stays in [0, 1] and is sensible at p = 0 and p = 1. Without a trial it is (0, 1).
    Raises :class:`VcpoError` unless 0 ≤ successes ≤ n and 0 < confidence < 1.
    """
    if not (0 <= successes <= n and 0 < confidence < 1):
        raise VcpoError(
            f"no interval of {successes} successes in {n} trials at confidence {confidence}: "
            "give 0 <= successes <= n and 0 < confidence < 1"
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The bounds at p = 0 and p = 1 are exactly 0 and 1; rounding must not move them.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + half) / scale)
    return low, high


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with ``freedom`` degrees, for 0.5 <= probability < 1.

    The distribution function has a closed form for whole degrees of freedom ν, in θ = atan(t / sqrt(ν))
    (Abramowitz & Stegun 26.7.3 and 26.7.4), which rises in θ and is solved by bisection.
    """
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise VcpoError(f"no quantile {probability} of Student's t with {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = (1 + _within(middle, freedom)) / 2 < probability
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(theta: float, freedom: int) -> float:
    """Probability of |t| <= sqrt(ν) tan θ."""
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom, 2):  # factors (k − 1) / k of cos²θ
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (theta + (sine * total if freedom > 1 else 0.0))


def student_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of normal values with unknown variance.

    mean ± t · s / sqrt(n), with the sample deviation s and the quantile t of Student's t of n − 1 degrees
    (Student 1908). A single value says nothing about its spread: it is returned twice. Raises
    :class:`VcpoError` for no value.
    """
    if not values:
        raise VcpoError("no interval of no values")
    centre, n = math.fsum(values) / len(values), len(values)
    if n == 1:
        return centre, centre
    deviation = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1))
    half = student_quantile(0.5 + confidence / 2, n - 1) * deviation / math.sqrt(n)
    return centre - half, centre + half


def ema(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average, free of start-up bias.

    s_t = Σ_i a^(t−i) x_i / Σ_i a^(t−i) over i ≤ t, with a = 2^(−1/half_life): the first value is x_0, a
    constant stays itself, and a value ``half_life`` entries ago counts half as much as the newest.
    """
    decay = 2.0 ** (-1.0 / half_life)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        smooth.append(total / weight)
    return smooth


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``key``, rows without a finite value left out."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def total(rows: Sequence[Row], key: str) -> float:
    """Sum of ``key`` over the rows that have it."""
    return math.fsum(series(rows, key)[1])


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of ``key`` over the rows that have it; None if none has."""
    values = series(rows, key)[1]
    return math.fsum(values) / len(values) if values else None


def lag_counts(rows: Sequence[Row]) -> dict[int, int]:
    """Groups consumed at each policy lag, over the whole run, by rising lag."""
    counts: Counter[int] = Counter()
    for row in rows:
        for lag, groups in (row.get(HISTOGRAM) or {}).items():
            counts[int(lag)] += groups
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class TimeSpent:
    """Where the wall time of a run's steps went, in seconds."""

    sampling: float
    training: float
    waiting: float
    publishing: float
    elapsed: float

    @property
    def learning(self) -> float:
        """The learner's loop: training, waiting and publishing."""
        return self.training + self.waiting + self.publishing

    @property
    def rest(self) -> float:
        """What the learner's process spent on anything else: evaluations, checkpoints."""
        return max(0.0, self.elapsed - self.learning)


def time_spent(rows: Sequence[Row]) -> TimeSpent:
    """Totals over ``rows``. ``elapsed`` starts over when a run is resumed, so its stretches are added."""
    sampling, training, waiting, publishing = (
        total(rows, f"seconds_{part}") for part in ("sampling", "training", "waiting", "publishing")
    )
    clock = series(rows, "elapsed")[1]
    stretches = [now for now, after in zip(clock, [*clock[1:], 0.0], strict=False) if after < now]
    elapsed = max(math.fsum(stretches), training + waiting + publishing)
    return TimeSpent(sampling, training, waiting, publishing, elapsed)


def run_totals(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """The part of summary.json that follows from the rows alone.

    Keys: steps, tokens, tokens_per_second (of the learner's loop), lag_mean, lag_max, ess_ratio_mean,
    step_scale_mean, seconds_sampling, seconds_training, seconds_waiting, seconds_publishing. A figure that
    no row has is None.
    """
    spent = time_spent(rows)
    tokens = total(rows, "tokens")
    return {
        "steps": max(series(rows, "step")[1], default=0),
        "tokens": int(tokens),
        "tokens_per_second": tokens / spent.learning if spent.learning > 0 else None,
        "lag_mean": mean(rows, "lag_mean"),
        "lag_max": max(series(rows, "lag_max")[1], default=None),
        "ess_ratio_mean": mean(rows, "ess_ratio"),
        "step_scale_mean": mean(rows, "step_scale"),
        "seconds_sampling": spent.sampling,
        "seconds_training": spent.training,
        "seconds_waiting": spent.waiting,
        "seconds_publishing": spent.publishing,
    }


@dataclass(frozen=True)
class SamplerShare:
    """What one sampler did in a run."""

    name: str
    steps: int
    """At whose end it was there."""
    last: int
    """The last of them."""
    tokens_per_second: float | None
    """Mean over those steps; None if it finished nothing."""
    lag_mean: float
    """Of the weights it served behind the learner's, mean and largest."""
    lag_max: int
    outstanding_max: int
    """The most groups that waited for it."""


def sampler_shares(rows: Sequence[Row]) -> list[SamplerShare]:
    """In the order of their names; none for runs that do not tell."""
    seen: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        for name, figures in row.get(SAMPLERS, {}).items():
            seen.setdefault(name, []).append((row["step"], figures))
    shares = []
    for name, told in sorted(seen.items()):
        rates = [f["tokens_per_second"] for _, f in told if f["tokens_per_second"]]
        lags = [f["lag"] for _, f in told if f["version"] >= 0]
        shares.append(
            SamplerShare(
                name=name,
                steps=len(told),
                last=told[-1][0],
                tokens_per_second=sum(rates) / len(rates) if rates else None,
                lag_mean=sum(lags) / max(len(lags), 1),
                lag_max=max(lags, default=0),
                outstanding_max=max(f["outstanding_groups"] for _, f in told),
            )
        )
    return shares
