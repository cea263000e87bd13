"""How many samplers a running job is to have: a file in its folder, which the job takes away when it has read
it. So whoever asks knows whether a job has heard it."""

from __future__ import annotations

import time
from pathlib import Path

from vcpo.config import load_config
from vcpo.errors import ConfigError
from vcpo.monitor.sinks import write_atomically
from vcpo.pipeline.run_folder import RunFolder

FILE = "samplers"
HEARD_SECONDS = 15.0
"""How long a job may take to hear it; it listens every second."""


def heard(run: RunFolder) -> int | None:
    """What was asked for since the last time; None if nothing was."""
    try:
        asked = int((run.path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    (run.path / FILE).unlink(missing_ok=True)
    return asked


def scale(path: Path, samplers: int, seconds: float = HEARD_SECONDS) -> None:
    """Ask a running job for so many samplers; returns when it has heard it. Raises ConfigError if it is none
    that can, or if none hears it within ``seconds``."""
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
    end = time.monotonic() + seconds
    while (path / FILE).exists():
        if time.monotonic() > end:
            (path / FILE).unlink(missing_ok=True)
            raise ConfigError(
                f"no job of {path} heard it within {seconds:g} s: it does not run (resume it with "
                f"--runtime.samplers {samplers}), or is about to begin or to begin anew (ask again)"
            )
        time.sleep(0.1)
