"""A whole training run over ports that are ready: evaluate, train, evaluate, export, sum up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vcpo.config import Config
from vcpo.monitor.progress import Progress
from vcpo.monitor.sinks import METRICS_FILE, MetricsWriter, read_metrics
from vcpo.monitor.statistics import run_totals, time_spent, total
from vcpo.pipeline.controller import Controller, GivenUpError
from vcpo.pipeline.dynamic_sampling import Sieve
from vcpo.pipeline.evaluation import success_figures
from vcpo.pipeline.fleet import Fleet
from vcpo.pipeline.journal import Journal
from vcpo.pipeline.ports import Arrivals, Begun, LearnerPort, Publication
from vcpo.pipeline.run_folder import RunFolder
from vcpo.pipeline.window import Window, lag_bound


@dataclass(frozen=True)
class Parts:
    """What a runtime has made ready."""

    learner: LearnerPort
    fleet: Fleet
    arrivals: Arrivals
    begun: Begun
    initial: Publication
    """The learner's weights as they are; a resumed run's differ from the samplers' initial ones."""
    begun_at: float
    """``time.perf_counter()`` when the command began."""


class WarmStartPhase:
    """Shows a warm start if there is one: a cached one takes no step, and no phase."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps
        self._begun = False

    def __call__(self, loss: float) -> None:
        """One more step was taken, with this loss."""
        if not self._begun:
            self._progress.phase("warm start", self._steps)
            self._begun = True
        self._progress.advance({"loss": loss})


def make_controller(
    config: Config, run: RunFolder, parts: Parts, writer: MetricsWriter, progress: Progress
) -> Controller:
    """A controller that goes on where the learner's checkpoint says."""
    journal = Journal(run.journal)
    journal.rewind(parts.begun.version)
    position = dict(parts.begun.position)
    sieve = position.pop("sieve", {})  # also there if dynamic sampling was switched off since
    unheard = [(problem, reward) for problem, reward in position.pop("unheard", [])]
    return Controller(
        config=config,
        learner=parts.learner,
        fleet=parts.fleet,
        arrivals=parts.arrivals,
        journal=journal,
        writer=writer,
        progress=progress,
        window=Window(
            config.pipeline.prompts,
            config.pipeline.lag,
            window_width(config),
            over_provision=config.pipeline.over_provision,
            **position,
        ),
        version=parts.begun.version,
        sieve=Sieve(config.pipeline.prompts, **sieve) if parts.begun.dynamic_sampling else None,
        unheard=unheard,
    )


async def train_session(
    config: Config,
    run: RunFolder,
    parts: Parts,
    progress: Progress,
    on_controller: Callable[[Controller], None] = lambda controller: None,
) -> dict[str, Any]:
    """Run to the end (or until the controller is stopped) and return the summary, also in summary.json."""
    with MetricsWriter(run.path, resume_step=parts.begun.version) as writer:
        controller = make_controller(config, run, parts, writer, progress)
        on_controller(controller)
        collecting = asyncio.ensure_future(controller.collect())
        try:
            await controller.publish_initial(parts.initial)
            before = run.read_json("evaluation_before")
            if before is None:
                progress.phase("evaluation before", None)
                before = await _evaluation(controller, "before")
                run.write_json("evaluation_before", before)
            steps_left = config.pipeline.steps - parts.begun.version
            progress.phase("training", max(steps_left, 0))
            completed = await controller.run()
            if not completed:
                return interrupted_summary(run)
            progress.phase("evaluation after", None)
            after = await _evaluation(controller, "after")
            await parts.learner.export(run.model)
        except GivenUpError:
            return interrupted_summary(run)
        finally:
            collecting.cancel()
            controller.journal.close()
    summary = before | after | _figures(config, run, parts, controller)
    run.write_json("summary", summary)
    return summary


def interrupted_summary(run: RunFolder) -> dict[str, Any]:
    """What there is to say about a run that was stopped, wherever that was."""
    rows = read_metrics(run.path) if (run.path / METRICS_FILE).exists() else []
    return {"completed": False, "steps": rows[-1]["step"] if rows else 0, "run_folder": str(run.path)}


async def _evaluation(controller: Controller, when: str) -> dict[str, Any]:
    """Sampled and greedy accuracy on held-out problems with 95 % intervals."""
    figures: dict[str, Any] = {}
    for name, greedy in (("accuracy", False), ("greedy_accuracy", True)):
        rewards = await controller.evaluate(controller.config.evaluation.final_problems, greedy=greedy)
        figures |= success_figures(f"{name}_{when}", rewards) | {"held_out_problems": len(rewards)}
    return figures


def _figures(config: Config, run: RunFolder, parts: Parts, controller: Controller) -> dict[str, Any]:
    pipeline, rows = config.pipeline, read_metrics(run.path)
    before_resume = time_spent([row for row in rows if row["step"] <= parts.begun.version]).elapsed
    return {
        "completed": True,
        "algorithm": config.algorithm.name,
        "environment": config.environment.kind,
        "model": config.model.name or "small Llama",
        "parameters": parts.begun.parameters,
        "mode": pipeline.mode,
        "seed": config.run.seed,
        "lag": pipeline.lag,
        "lag_bound": lag_bound_of(config),
        **run_totals(rows),
        "episodes": (len(rows) * pipeline.prompts + int(total(rows, "skipped_groups"))) * pipeline.group_size,
        "failed_episodes": int(total(rows, "failed_episodes") + total(rows, "skipped_failed_episodes")),
        "action_tokens": int(total(rows, "action_tokens")),
        "seconds_evaluating": controller.seconds_evaluating,
        "wall_seconds": before_resume + time.perf_counter() - parts.begun_at,
        "run_folder": str(run.path),
        "report": str(run.path / "report.html"),
        "model_folder": str(run.model),
    }


def window_width(config: Config) -> int:
    """W; the exact mode is strictly first in, first out, unless groups are begun beyond those needed."""
    pipeline = config.pipeline
    return pipeline.window if pipeline.mode == "async" or pipeline.over_provision else 1


def lag_bound_of(config: Config) -> int:
    """The largest policy lag any group of the run can have."""
    pipeline = config.pipeline
    return lag_bound(pipeline.lag, window_width(config), pipeline.prompts, pipeline.over_provision)
