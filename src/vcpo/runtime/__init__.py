"""Where things run: ``inline`` (this process), ``local`` (child processes of this machine) and ``ray``.

Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vcpo.config import Config
from vcpo.errors import ConfigError
from vcpo.monitor.progress import Progress, SilentProgress


def train(config: Config, *, resume: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recipe from prompts to the trained model; the summary that is also in ``summary.json``.

    ``resume`` is the folder of a run to go on with. If the run was interrupted, ``completed`` is false.
    """
    from vcpo.pipeline.calibration import find_calibration
    from vcpo.pipeline.engines import check_engine
    from vcpo.pipeline.processes import check_processes
    from vcpo.pipeline.run_folder import RunFolder
    from vcpo.pipeline.step_scales import read_step_scales

    check_engine(config)
    check_processes(config)
    read_step_scales(config)
    calibrated = config.algorithm.on_policy_ratio == "calibrated"
    calibration = find_calibration(config, resume) if calibrated else None
    run = RunFolder.create(config) if resume is None else RunFolder.reopen(resume, config)
    if calibration is not None:
        calibration.write(run.calibration)
    progress = progress or SilentProgress()
    if config.pipeline.mode == "exact":
        from vcpo.runtime.inline import train_inline as train_here
    elif config.runtime.kind == "ray":
        from vcpo.runtime.ray import train_ray as train_here
    else:
        from vcpo.runtime.local import train_local as train_here
    completed = False
    try:
        summary = train_here(config, run, progress, resume=resume is not None)
        completed = summary["completed"]
    except (ConfigError, KeyboardInterrupt):
        if resume is None and not run.has_begun:
            run.remove()  # nothing was done: do not leave a folder that blocks the corrected command
        raise
    finally:
        progress.close(completed)
    if completed:
        from vcpo.monitor.report import write_report

        write_report(run.path)
    return summary


def calibrate(
    config: Config,
    *,
    groups: int = 64,
    tokens: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Path]:
    """Measure the mismatch of sampler and learner at lag 0; the record, and the file that it was written to.

    The file is ``out``, or else the one in the cache where runs with these settings look for it. See
    :mod:`vcpo.runtime.calibration`.
    """
    from vcpo.pipeline.calibration import calibration_path, check_writable
    from vcpo.runtime.calibration import calibrate_inline

    progress = progress or SilentProgress()
    path, completed = out or calibration_path(config), False
    check_writable(path)
    try:
        calibration = calibrate_inline(config, groups, tokens, progress)
        completed = True
    finally:
        progress.close(completed)
    calibration.write(path)
    return dict(calibration.record), path


def evaluate(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    problems: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy of a run or a model on held-out problems: see :mod:`vcpo.runtime.evaluation`."""
    from vcpo.runtime.evaluation import evaluate_path

    progress = progress or SilentProgress()
    try:
        return evaluate_path(path, overrides, problems, progress)
    finally:
        progress.close()
