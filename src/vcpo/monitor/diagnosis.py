"""What a run's metrics say, in plain words: a few simple rules, each with its threshold in the open.

The thresholds come from runs that collapsed and runs that did not: in every collapse of sequence-level
importance sampling the ESS ratio fell first (0.75 → 0.05), then KL per token rose above 0.5 (to 1 or 2)
while healthy and slow runs stayed below it, then the reward went, within 100 steps. The gradient norm gave
no warning. A rule that is silent proves nothing; it means that this sign was not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from vcpo.monitor.statistics import Row, ema, mean, series, time_spent, total

Severity = Literal["critical", "warning", "info"]

HALF_LIFE = 5.0
"""Smoothing of ESS ratio and KL, in steps: one bad minibatch is no collapse."""
REWARD_HALF_LIFE = 15.0
"""Smoothing of the reward, which is noisier: 128 episodes of 0 or 1 have a standard error of 0.04."""
EARLY_STEPS = 10
"""Steps that say what is normal for a run; a TIS run at lag 64 halved its ESS ratio in its first ten."""

ESS_COLLAPSED = 0.1
"""ESS ratio under which the step is mostly noise; runs that stalled at 0.15 still learned a little."""
ESS_FALL = 1 / 3
"""...and it must have fallen to this part of its early median, or it is the sampler's numerics, not lag."""
KL_HIGH = 0.5
"""KL per token, nats: collapsed runs showed 0.6 to 1.8, surviving ones 0.09 to 0.45."""
REWARD_LOST = 0.5
"""Part of the best smoothed reward whose loss counts as a fall."""
REWARD_FLOOR = 0.05
"""Best smoothed reward below which a fall is not told from noise."""
SPIKE_FACTOR = 10.0
"""A gradient norm this many times the run's median is a spike."""
SPIKES_ALLOWED = 0.01
"""Fraction of steps that may spike before it is mentioned, and never fewer than three."""
EQUAL_GROUPS_MANY = 0.8
"""Mean fraction of groups without any signal, over the later half of the run."""
FAILED_MANY = 0.02
"""Fraction of episodes whose environment failed twice."""
TRUNCATED_MANY = 0.25
"""Fraction of episodes cut by a length limit."""
WAITING_MOST = 0.5
"""Part of the learner's loop that it waits for groups."""
SAMPLING_LITTLE = 0.5
"""Part of the same time that the samplers work, below which the window holds them back."""
LAG_SLACK = 1.0
"""Steps by which the later mean lag may exceed the target: the windowed FIFO's own overshoot."""


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about a run."""

    severity: Severity
    sentence: str
    """What was seen, with its numbers."""
    advice: str
    """What to try."""


def diagnose(
    rows: Sequence[Row], *, target_lag: int | None = None, overlapping: bool = True
) -> list[Finding]:
    """Findings of every rule, the most severe first; empty if no rule has anything to say.

    ``target_lag`` is ``pipeline.lag``; without it the lag is not judged. ``overlapping`` is false for
    ``pipeline.mode`` exact, where one process samples and learns in turn and nobody waits for another.
    """
    findings = [finding for rule in _RULES for finding in rule(rows)]
    if overlapping:
        findings += _idle_time(rows)
    if target_lag is not None:
        findings += _lag_above_target(rows, target_lag)
    order = ("critical", "warning", "info")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _first_step(steps: Sequence[int], hits: Sequence[bool]) -> int | None:
    return next((step for step, hit in zip(steps, hits, strict=True) if hit), None)


def _ess_collapse(rows: Sequence[Row]) -> Iterator[Finding]:
    steps, ratios = series(rows, "ess_ratio")
    if len(ratios) <= EARLY_STEPS:
        return
    early = median(ratios[:EARLY_STEPS])
    threshold = min(ESS_COLLAPSED, ESS_FALL * early)
    smooth = ema(ratios, HALF_LIFE)
    step = _first_step(steps, [value < threshold for value in smooth])
    if step is not None:
        yield Finding(
            "critical",
            f"The ESS ratio fell from {early:.2f} to below {threshold:.2f} at step {step} (lowest "
            f"{min(smooth):.3f}): a handful of trajectories decide each step.",
            "Lower pipeline.lag or learner.learning_rate; with algorithm.step_scale off, turn it on.",
        )


def _kl_high(rows: Sequence[Row]) -> Iterator[Finding]:
    steps, values = series(rows, "kl")
    smooth = ema(values, HALF_LIFE)
    step = _first_step(steps, [value > KL_HIGH for value in smooth])
    if step is not None:
        yield Finding(
            "warning",
            f"KL per token from behaviour to current policy passed {KL_HIGH} at step {step} (highest "
            f"{max(smooth):.2f}): rollouts come from a policy that the learner has left.",
            "Lower pipeline.lag or learner.learning_rate.",
        )


@dataclass(frozen=True)
class Fall:
    """A reward that was lost and not found again."""

    best: float
    best_step: int
    last: float
    step: int
    """From here on the smoothed reward stayed below the bound."""


def reward_fall(rows: Sequence[Row]) -> Fall | None:
    """The fall of the smoothed training reward, if it ends below (1 − REWARD_LOST) of its best."""
    steps, rewards = series(rows, "reward")
    smooth = ema(rewards, REWARD_HALF_LIFE)
    settled = range(EARLY_STEPS, len(smooth))  # the first averages are of too few steps to be a best
    best = max(settled, key=lambda i: smooth[i], default=None)
    if best is None or smooth[best] < REWARD_FLOOR:
        return None
    bound = (1 - REWARD_LOST) * smooth[best]
    if smooth[-1] >= bound:
        return None
    last_above = max(i for i in settled if smooth[i] >= bound)
    return Fall(smooth[best], steps[best], smooth[-1], steps[last_above + 1])


def _reward_fell(rows: Sequence[Row]) -> Iterator[Finding]:
    if fall := reward_fall(rows):
        yield Finding(
            "critical",
            f"The reward fell from {fall.best:.2f} at step {fall.best_step} to {fall.last:.2f} at the end.",
            "Resume from a checkpoint before the fall with a lower learning rate or a smaller lag.",
        )


def _gradient_spikes(rows: Sequence[Row]) -> Iterator[Finding]:
    steps, norms = series(rows, "grad_norm")
    if not norms:
        return
    typical = median(norms)
    spikes = [step for step, norm in zip(steps, norms, strict=True) if norm > SPIKE_FACTOR * typical]
    if typical > 0 and len(spikes) >= max(3, SPIKES_ALLOWED * len(norms)):
        yield Finding(
            "warning",
            f"{len(spikes)} of {len(norms)} gradient norms were more than {SPIKE_FACTOR:.0f} times the "
            f"median {typical:.3g}, first at step {spikes[0]}.",
            "A few weights or scores dominate: try algorithm.baseline optimal or a lower truncation.",
        )


def _no_signal(rows: Sequence[Row]) -> Iterator[Finding]:
    later = rows[len(rows) // 2 :]
    equal, reward = mean(later, "equal_groups"), mean(later, "reward")
    if equal is None or equal <= EQUAL_GROUPS_MANY:
        return
    level = "" if reward is None else f", at a mean reward of {reward:.2f}"
    yield Finding(
        "warning",
        f"In {equal:.0%} of the groups all rewards were equal{level}: they teach nothing.",
        "Choose easier problems if the reward is low, harder ones if it is high, or a larger group.",
    )


def _lost_episodes(rows: Sequence[Row]) -> Iterator[Finding]:
    # ESS over ESS ratio is the number of trajectories in a minibatch, also when all of them failed.
    episodes = sum(row["ess"] / row["ess_ratio"] for row in rows if row.get("ess") and row.get("ess_ratio"))
    if not episodes:
        return
    failed, truncated = (total(rows, f"{kind}_episodes") / episodes for kind in ("failed", "truncated"))
    if failed > FAILED_MANY:
        yield Finding(
            "warning",
            f"The environment failed in {failed:.1%} of the episodes; they were rewarded as failed.",
            "Read the notes of the failed episodes; after timeouts, raise environment.timeout_seconds.",
        )
    if truncated > TRUNCATED_MANY:
        yield Finding(
            "warning",
            f"{truncated:.0%} of the episodes were cut by a length limit.",
            "Raise environment.max_tokens or model.context_length.",
        )


def _idle_time(rows: Sequence[Row]) -> Iterator[Finding]:
    spent = time_spent(rows)
    if spent.learning <= 0:
        return
    waiting, sampling = spent.waiting / spent.learning, spent.sampling / spent.learning
    if waiting > WAITING_MOST:
        yield Finding(
            "info",
            f"The learner waited for samplers {waiting:.0%} of the time.",
            "Sampling is the bottleneck: add samplers; raise pipeline.lag if episodes wait for tools.",
        )
    elif 0 < sampling < SAMPLING_LITTLE:
        yield Finding(
            "info",
            f"The samplers worked only {sampling:.0%} of the time: the window of groups was full.",
            "The learner is the bottleneck: use fewer samplers, or give the learner the faster device.",
        )


def _lag_above_target(rows: Sequence[Row], target: int) -> Iterator[Finding]:
    later = mean(rows[len(rows) // 2 :], "lag_mean")
    if later is not None and later > target + LAG_SLACK:
        yield Finding(
            "warning",
            f"The mean policy lag was {later:.1f} steps in the later half, above the target of {target}.",
            "Lower pipeline.window, or look for episodes that take far longer than the others.",
        )


_RULES = (_ess_collapse, _reward_fell, _kl_high, _gradient_spikes, _no_signal, _lost_episodes)
