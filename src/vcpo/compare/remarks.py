"""What a reader of a comparison must know before its figures: what failed, what is not as it seems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from vcpo.compare.results import COMPLETED, FAILED, Result, failures
from vcpo.monitor import words

TOLD_EPISODES = 0.01
"""A run is named if more than this part of its episodes failed."""


def remarks(results: Sequence[Result]) -> list[str]:
    """Failures, each with its reason, and then what else is unusual."""
    failures = [f"failed: {r.cell}: {r.error}" for r in results if r.status == FAILED]
    return [*failures, *_unreached_lags(results), *_failed_episodes(results), *_without_curves(results)]


def _unreached_lags(results: Sequence[Result]) -> Iterator[str]:
    """A rollout of step t is at most t − 1 steps old."""
    sizes = Counter((r.cell.lag, r.cell.config.pipeline.steps) for r in results)
    for lag, steps in sorted(sizes):
        if lag >= steps:
            yield (
                f"lag {lag} is never reached in {steps} steps: rollouts there are at most {steps - 1} "
                f"steps old, as at lag {steps - 1}"
            )


def _failed_episodes(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        for what, (failed, episodes) in failures(result.summary).items():
            if result.status == COMPLETED and failed > TOLD_EPISODES * episodes:
                yield (
                    f"{result.cell}: {words.amount(failed)} of {words.amount(episodes)} {what} failed "
                    "(reward 0, nothing to learn from); its log says why"
                )


def _without_curves(results: Sequence[Result]) -> Iterator[str]:
    count = sum(r.status == COMPLETED and not r.rows for r in results)
    if count:
        yield (
            f"{count} of {len(results)} runs are known by their figures alone, as their metrics are not "
            "here: they have no curves, and only a row that was kept knows whether they collapsed"
        )
