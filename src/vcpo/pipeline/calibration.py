"""Calibrations: what ``vcpo calibrate`` measured, where it is kept, and how a run finds it.

A calibration is one JSON file. It belongs to the settings that decide the mismatch of sampler and learner:
model, adapters, sampler, and the environment whose text was sampled, less what only bounds lengths. Their
digest is its name in the cache, so a run with the same settings finds it. A run copies it to its own folder
and keeps to the copy when it is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcpo.config import Config, default_recipe, load_config
from vcpo.errors import ConfigError
from vcpo.monitor.sinks import write_atomically
from vcpo.pipeline.cache import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Version of the file; raised when a reader of the old one would misread the new one."""
CALIBRATION_FILE = "calibration.json"
"""Name of a run's copy."""

Settings = dict[str, dict[str, Any]]

_OF_NO_MATTER = {
    "model": {"context_length", "activation_checkpointing"},
    "environment": {
        "max_tokens", "max_turns", "timeout_seconds", "held_out_path", "held_out_split", "match",
    },
}  # fmt: skip
"""Settings that change lengths, memory or rewards, and not what a token's mismatch is."""
_OF_THE_SAMPLER = {"kind", "temperature", "top_p", "top_k", "dtype", "quantization", "options"}
_DEFINING = ("model", "lora", "sampler")
"""Sections that must agree with a calibration which the recipe names; its text may be another."""


@dataclass(frozen=True)
class Calibration:
    """A calibration that was read back or has just been made."""

    record: Mapping[str, Any]
    """What the file holds; ``docs/calibration.md`` describes it."""

    @property
    def rate(self) -> float:
        """Variance that each sampled token adds to the log importance weight at lag 0."""
        return self.record["rate"]["value"]

    @property
    def settings(self) -> Settings:
        return self.record["settings"]

    def on_policy_ratio(self, lengths: Tensor) -> float:
        """ρ_on of a minibatch whose trajectories have ``lengths`` [B] sampled tokens."""
        from vcpo.estimators.mismatch import expected_ess_ratio  # torch, which controllers do without

        return expected_ess_ratio(self.rate * lengths.double())

    def write(self, path: Path) -> None:
        """Write the file whole or not at all. Raises ConfigError if it cannot be written."""
        text = json.dumps(self.record, indent=2, ensure_ascii=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            raise _unwritable(path, error.strerror) from error


def check_writable(path: Path) -> None:
    """Raise ConfigError, before anything is measured, if a calibration could not be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror) from error
    if path.is_dir():
        raise _unwritable(path, "Is a directory")
    if not os.access(path.parent, os.W_OK):
        raise _unwritable(path, "Permission denied")


def _unwritable(path: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"cannot write {path}: {reason}; say --out FILE, or set VCPO_CACHE")


def calibrated_settings(config: Config) -> Settings:
    """The settings that a calibration belongs to."""
    settings: Settings = {
        name: section.model_dump(mode="json", exclude=_OF_NO_MATTER.get(name))
        for name, section in (
            ("model", config.model), ("lora", config.lora), ("environment", config.environment),
        )
    }  # fmt: skip
    settings["model"]["device"] = config.model.device.partition(":")[0]
    settings["sampler"] = config.sampler.model_dump(mode="json", include=_OF_THE_SAMPLER)
    if not config.model.name:  # a model made for the task is what its warm start makes of it
        settings["warm_start"] = config.warm_start.model_dump(mode="json", exclude={"cache"})
    return settings


def calibration_path(config: Config) -> Path:
    """Where the calibration of these settings is kept."""
    key = hashlib.sha256(json.dumps(calibrated_settings(config), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("calibration") / f"{key}.json"


def read_calibration(path: Path) -> Calibration:
    """Raises ConfigError if the file is not there, is no calibration, or one of another version."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind, rate = record["vcpo_calibration"], float(record["rate"]["value"])
        record["settings"]["model"]
    except OSError as error:
        raise ConfigError(f"cannot read the calibration {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no calibration: `vcpo calibrate --out FILE` writes one") from error
    if kind != FORMAT or not 0 <= rate < float("inf"):
        raise ConfigError(
            f"{path} is a calibration of format {kind}, and this vcpo reads {FORMAT}: make it anew"
        )
    return Calibration(record)


def find_calibration(config: Config, run_folder: Path | None = None) -> Calibration:
    """The calibration that a run uses: its own copy, else the file that ``algorithm.calibration`` names, else
    the cached one. Raises ConfigError that says how to make it.
    """
    if run_folder is not None and (run_folder / CALIBRATION_FILE).exists():
        kept = read_calibration(run_folder / CALIBRATION_FILE)
        if not list(_differences(kept.settings, calibrated_settings(config), _DEFINING)):
            return kept
    if config.algorithm.calibration:
        return _named(config, Path(config.algorithm.calibration))
    path = calibration_path(config)
    if not path.exists():
        raise ConfigError(
            "algorithm.on_policy_ratio is 'calibrated' and this model and sampler have no calibration: run "
            f"`{calibrate_command(config)}`"
        )
    return read_calibration(path)


def _named(config: Config, path: Path) -> Calibration:
    calibration = read_calibration(path)
    if different := next(_differences(calibration.settings, calibrated_settings(config), _DEFINING), None):
        name, was, wanted = different
        raise ConfigError(
            f"the calibration {path} is of {name} = {was!r}, and the run has {wanted!r}: run "
            f"`{calibrate_command(config)} --out {shlex.quote(str(path))}`"
        )
    return calibration


def _differences(
    recorded: Settings, wanted: Settings, sections: tuple[str, ...]
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, recorded and wanted value of every setting in which the two differ."""
    for section in sections:
        for name, value in wanted[section].items():
            if (was := recorded.get(section, {}).get(name)) != value:
                yield f"{section}.{name}", was, value


def calibrate_command(config: Config) -> str:
    """The ``vcpo calibrate`` command line that makes the calibration of this config."""
    recipe = default_recipe(["--environment.kind", config.environment.kind])
    usual, words = load_config(recipe).model_dump(mode="json"), ["vcpo", "calibrate", recipe]
    for section in ("model", "lora", "warm_start", "environment", "sampler"):
        for name, value in getattr(config, section).model_dump(mode="json").items():
            if value != usual[section][name]:
                option, argument = f"--{section}.{name}", _as_argument(value)
                # An option of vLLM must not stand alone: it would be read as one of ours.
                words += [f"{option}={argument}"] if argument.startswith("-") else [option, argument]
    return shlex.join(words)


def _as_argument(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
