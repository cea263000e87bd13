"""How many samplers a running job is to have: a file in its folder, which the job reads every second."""

from __future__ import annotations

from pathlib import Path

from vcpo.config import load_config
from vcpo.errors import ConfigError
from vcpo.monitor.sinks import write_atomically
from vcpo.pipeline.run_folder import RunFolder

FILE = "samplers"


def wanted_samplers(run: RunFolder) -> int | None:
    """None if nobody has said so."""
    try:
        return int((run.path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def forget(run: RunFolder) -> None:
    """A job begins with the number of its config."""
    (run.path / FILE).unlink(missing_ok=True)


def scale(path: Path, samplers: int) -> None:
    """Ask a running job for so many samplers. Raises ConfigError if it is none that can."""
    run = RunFolder.open(path)
    config = load_config(path / "config.toml")
    if config.runtime.kind != "ray":
        raise ConfigError(
            f"{path} runs with runtime.kind = {config.runtime.kind!r}: only a ray run can be scaled"
        )
    if config.sampler.urls:
        raise ConfigError(
            f"{path} shares out the servers of sampler.urls: their number is that of the config"
        )
    if run.read_json("summary") is not None:
        raise ConfigError(f"{path} has ended: resume it with --runtime.samplers {samplers}")
    if samplers < 1:
        raise ConfigError(f"--samplers {samplers}: a run needs at least one")
    write_atomically(path / FILE, f"{samplers}\n")
