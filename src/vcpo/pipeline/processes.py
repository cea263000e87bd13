"""Settings of processes that do not go together, told before anything is started."""

from __future__ import annotations

from vcpo.config import Config
from vcpo.errors import ConfigError


def check_processes(config: Config) -> None:
    """Raise ConfigError for processes that the mode, or the runtime, has no place for."""
    runtime = config.runtime
    if config.pipeline.mode == "exact" and runtime.learner_ranks > 1:
        raise ConfigError(
            f"runtime.learner_ranks = {runtime.learner_ranks} needs pipeline.mode = 'async': the "
            "exact mode runs in one process"
        )
    if runtime.kind == "ray":
        _check_ray(config)
    elif runtime.address:
        raise ConfigError(f"runtime.address = {runtime.address!r} is for runtime.kind = 'ray'")


def _check_ray(config: Config) -> None:
    runtime, sampler = config.runtime, config.sampler
    if config.pipeline.mode == "exact":
        raise ConfigError(
            "runtime.kind = 'ray' needs pipeline.mode = 'async': the exact mode runs in one process"
        )
    if runtime.address.startswith("ray://"):
        raise ConfigError(
            f"runtime.address = {runtime.address!r} is of Ray Client, which cannot hold a run: start the "
            "command on a machine of the cluster with runtime.address = 'auto', or ray job submit it there"
        )
    if sampler.kind == "vllm" and sampler.transfer == "collective":
        raise ConfigError(
            "sampler.transfer = 'collective' needs runtime.kind = 'local': under ray weights go through the "
            "object store"
        )
    if sampler.kind == "vllm" and not sampler.urls and sampler.servers > 1:
        raise ConfigError(
            f"sampler.servers = {sampler.servers}, and under ray every sampler has one vLLM server: set "
            "runtime.samplers in its place"
        )
