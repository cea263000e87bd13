"""A run is a folder: config.toml, metrics, journal, checkpoints, logs, model, summary.json, report.html."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcpo.config import Config, dump_toml, load_config
from vcpo.errors import CheckpointError, ConfigError
from vcpo.monitor.sinks import write_atomically
from vcpo.pipeline.calibration import CALIBRATION_FILE


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run is."""

    path: Path

    @staticmethod
    def create(config: Config) -> RunFolder:
        """Make a new run's folder. A name that was asked for must be free, a made-up one gets a number."""
        path = config.run.folder / (config.run.name or _made_up_name(config))
        number = 1
        while path.exists() and not config.run.name:
            number += 1
            path = config.run.folder / f"{_made_up_name(config)}-{number}"
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path} is there already: choose another run.name, or continue a run with --resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / "config.toml", dump_toml(config))
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error.strerror}; set run.folder") from error
        return RunFolder(path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """The folder of a run that exists."""
        if not (path / "config.toml").exists():
            raise CheckpointError(f"{path} is not a run folder: it has no config.toml")
        return RunFolder(path)

    @staticmethod
    def reopen(path: Path, config: Config) -> RunFolder:
        """The folder of a run that goes on with ``config``, which is written down beside the first one."""
        run = RunFolder.open(path)
        _refuse_another_run(load_config(path / "config.toml"), config)
        run._refuse_nothing_to_do(config.pipeline.steps)
        (path / "summary.json").unlink(missing_ok=True)  # of an earlier end, which is none any more
        previous, current = (path / "config.toml").read_text(encoding="utf-8"), dump_toml(config)
        if previous != current:
            number = len(list(path.glob("config.before-resume-*.toml"))) + 1
            (path / f"config.before-resume-{number}.toml").write_text(previous, encoding="utf-8")
            (path / "config.toml").write_text(current, encoding="utf-8")
        return run

    def _refuse_nothing_to_do(self, wanted: int) -> None:
        names = (p.name.removeprefix("step-") for p in (self.path / "checkpoints").glob("step-*"))
        done = max((int(name) for name in names if name.isdigit()), default=0)
        ended = self.read_json("summary") is not None
        if done > wanted or (done == wanted and ended):
            raise ConfigError(
                f"{self.path} has taken {done} steps and pipeline.steps is {wanted}: nothing is left to do; "
                f"to go on, say --pipeline.steps {2 * done}"
            )

    @property
    def has_begun(self) -> bool:
        """Whether anything was played or trained."""
        return (self.path / "evaluation_before.json").exists()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def calibration(self) -> Path:
        return self.path / CALIBRATION_FILE

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write NAME.json whole or not at all."""
        write_atomically(self.path / f"{name}.json", json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def _refuse_another_run(before: Config, now: Config) -> None:
    """A resumed run has the model, the prompts and the groups it began with; the rest may change."""
    if before.model != now.model:
        raise ConfigError(
            "--resume goes on with the run's own model: leave the [model] settings as they were"
        )
    if before.lora != now.lora:
        raise ConfigError(
            "--resume goes on with the run's own adapters: leave the [lora] settings as they were"
        )
    for section, field in (
        ("run", "seed"),
        ("environment", "kind"),
        ("pipeline", "group_size"),
        ("pipeline", "selection"),
        ("pipeline", "candidates"),
    ):
        was, wanted = (getattr(getattr(config, section), field) for config in (before, now))
        if was != wanted:
            raise ConfigError(
                f"--resume goes on with {section}.{field} = {was}, not {wanted}: start a new run"
            )


def _made_up_name(config: Config) -> str:
    environment = config.environment.kind.replace(":", "-").replace("/", "-")
    return f"{environment}-{config.algorithm.name}-{time.strftime('%m%d-%H%M%S')}"
