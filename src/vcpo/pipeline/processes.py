"""Which processes a run has: settings that do not go together, and what they ask a cluster for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
    if runtime.learner_ranks > 1:
        _check_torch()
    if runtime.kind == "ray":
        _check_ray(config)
    elif runtime.address:
        raise ConfigError(f"runtime.address = {runtime.address!r} is for runtime.kind = 'ray'")


def _check_torch() -> None:
    """Checkpoints of several ranks are safetensors, which torch writes since 2.8."""
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 8):
        raise ConfigError(f"runtime.learner_ranks > 1 needs torch 2.8 or newer, and {found} is installed")


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
    if sampler.kind == "vllm" and not sampler.urls and sampler.servers > 1:
        raise ConfigError(
            f"sampler.servers = {sampler.servers}, and under ray every sampler has one vLLM server: set "
            "runtime.samplers in its place"
        )


PATHS = {
    "model": ("name",),
    "environment": ("path", "held_out_path"),
    "algorithm": ("step_scales",),
    "sampler": ("python",),
    "runtime": ("weights_folder",),
}
"""Settings that may be paths."""


def elsewhere(config: Config) -> Config:
    """The config for processes with other working folders: paths of what is here are whole."""
    sections: dict[str, object] = {}
    for section, names in PATHS.items():
        values = {name: getattr(getattr(config, section), name) for name in names}
        # Not resolved: the Python of an environment is a link, and another one where the link leads.
        whole_paths = {name: str(Path(v).absolute()) for name, v in values.items() if v and Path(v).exists()}
        sections[section] = getattr(config, section).model_copy(update=whole_paths)
    return config.model_copy(update=sections)


@dataclass(frozen=True)
class Request:
    """What one actor asks for."""

    cpus: float
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        return {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value}

    def times(self, count: int) -> Request:
        return Request(count * self.cpus, count * self.gpus)

    def plus(self, other: Request) -> Request:
        return Request(self.cpus + other.cpus, self.gpus + other.gpus)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


def rank_request(config: Config) -> Request:
    runtime = config.runtime
    gpus = runtime.rank_gpus
    return Request(_cpus(config, runtime.rank_cpus), float(_on_cuda(config)) if gpus is None else gpus)


def sampler_request(config: Config) -> Request:
    runtime = config.runtime
    own = _on_cuda(config) and not config.sampler.urls
    server = 1 + max((devices.count("+") for devices in config.sampler.devices), default=0)
    gpus = runtime.sampler_gpus
    return Request(_cpus(config, runtime.sampler_cpus), float(server if own else 0) if gpus is None else gpus)


def _cpus(config: Config, asked: float) -> float:
    """Of a Ray of the run's own none: on a laptop processes may outnumber the cores, and take turns."""
    return asked if config.runtime.address else 0.0


def _on_cuda(config: Config) -> bool:
    return config.model.device.startswith("cuda")


def smallest(config: Config) -> Request:
    """What a run cannot begin without: all ranks of the learner and one sampler."""
    return rank_request(config).times(config.runtime.learner_ranks).plus(sampler_request(config))


def whole(config: Config) -> Request:
    """What all actors ask for."""
    ranks = rank_request(config).times(config.runtime.learner_ranks)
    return ranks.plus(sampler_request(config).times(config.runtime.samplers))
