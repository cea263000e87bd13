"""Settings of processes that do not go together, told before anything is started."""

from __future__ import annotations

from vcpo.config import Config
from vcpo.errors import ConfigError


def check_processes(config: Config) -> None:
    """Raise ConfigError for a number of processes that the mode has no place for."""
    if config.pipeline.mode == "exact" and config.runtime.learner_ranks > 1:
        raise ConfigError(
            f"runtime.learner_ranks = {config.runtime.learner_ranks} needs pipeline.mode = 'async': the "
            "exact mode runs in one process"
        )
