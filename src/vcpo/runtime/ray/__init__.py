"""Actors of a Ray cluster: ``runtime.kind = "ray"``. Needs the extra ``[ray]``.

The controller stays in the process of the command; the ranks of the learner and the samplers, each with its
environments, are actors. Ray places them, restarts samplers, carries their answers and keeps the weights.
"""

from __future__ import annotations

from typing import Any

from vcpo.config import Config
from vcpo.monitor.progress import Progress
from vcpo.pipeline.run_folder import RunFolder
from vcpo.runtime.ray.cluster import connected


def train_ray(config: Config, run: RunFolder, progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Train on a Ray cluster; the summary, ``completed`` false if interrupted."""
    progress.phase("connecting to Ray", None)
    with connected(config):  # which imports Ray: not before its environment is set
        from vcpo.runtime.ray.run import train_connected

        return train_connected(config, run, progress, resume=resume)
