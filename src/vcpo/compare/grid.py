"""The grid of a comparison: every method at every lag with every seed, each cell a run with its own config.

A method is the name of an algorithm, and may carry settings of its own in brackets, with semicolons between
them; as it is written, it is the method's label: ``vcpo[learner.learning_rate=2e-4;algorithm.truncation=4]``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import Config, apply_overrides
from vcpo.config.settings import SETTINGS
from vcpo.errors import ConfigError
from vcpo.pipeline.build import algorithm_of
from vcpo.pipeline.calibration import find_calibration
from vcpo.pipeline.engines import check_engine
from vcpo.pipeline.processes import check_processes
from vcpo.pipeline.step_scales import read_step_scales

RUNS_FOLDER = "runs"
CONTROLS_FOLDER = "controls"

OF_THE_GRID = {
    "run.name": "the cell names the run",
    "run.folder": "--out is where runs are made",
    "run.seed": "--seeds sets it",
    "pipeline.lag": "--lags sets it",
    "pipeline.mode": "runs are exact, so that each rollout is as old as the grid says",
    "algorithm.name": "--methods sets it",
}
"""Settings that the grid itself makes, and what does so."""

MOST_NUMBERS = 1000
"""The longest list of seeds, or of lags: more are a slip of the pen."""
MOST_RUNS = 20_000
_LONGEST_NAME = 180
"""Bytes of a label in the name of a folder: file systems take 255, with lag, seed and ending."""
_PLACES = ("run.name", "run.folder")
_METHOD = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<settings>[^\[\]]*)\])?")
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
_UNSAFE = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True)
class Method:
    """An algorithm with settings of its own."""

    name: str
    settings: tuple[tuple[str, str], ...] = ()
    """Dotted name and text of each."""

    @property
    def label(self) -> str:
        """As it is written on the command line."""
        inside = ";".join(f"{dotted}={text}" for dotted, text in self.settings)
        return f"{self.name}[{inside}]" if inside else self.name


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    """The method's label."""
    config: Config
    control_of: str = ""
    """Name of the run that this one is a control of."""

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def family(self) -> str:
        """The label of the method that this one is, or is a control of."""
        return self.method.rpartition("+")[0] if self.control_of else self.method

    @property
    def lag(self) -> int:
        return self.config.pipeline.lag

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def folder(self) -> Path:
        return self.config.run.folder / self.name

    def __str__(self) -> str:
        return f"{self.method}, lag {self.lag}, seed {self.seed}"


def parse_methods(text: str) -> list[Method]:
    """``vcpo,grpo[pipeline.group_size=16]``, each once, in order.

    Raises ConfigError for an unknown name (suggests the nearest), a setting that is none, and one that the
    grid makes itself.
    """
    methods = [_method(part.strip()) for part in _COMMA_OUTSIDE_BRACKETS.split(text) if part.strip()]
    if not methods:
        raise ConfigError("--methods needs at least one algorithm; `vcpo methods` lists them")
    return list(dict.fromkeys(methods))


def _method(text: str) -> Method:
    found = _METHOD.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--methods {text}: write NAME, or NAME[section.field=value;section.field=value] with the "
            "settings of this method"
        )
    name = found["name"].strip()
    get_algorithm(name)
    settings = [part.partition("=") for part in (found["settings"] or "").split(";") if part.strip()]
    for dotted, equals, _ in settings:
        if not equals:
            raise ConfigError(f"--methods {text}: {dotted.strip()} needs a value: {dotted.strip()}=VALUE")
        refuse_settings_of_the_grid([dotted.strip()], f"--methods {text}: ")
    return Method(name, tuple((dotted.strip(), value.strip()) for dotted, _, value in settings))


def refuse_settings_of_the_grid(names: Iterable[str], where: str = "--") -> None:
    """Raise ConfigError for the first dotted name that the grid makes itself."""
    for dotted in names:
        if dotted in OF_THE_GRID:
            raise ConfigError(f"{where}{dotted} cannot be set in a comparison: {OF_THE_GRID[dotted]}")


def parse_lags(text: str) -> list[int]:
    """``0,8,64``, each once, in order."""
    return _whole_numbers(text, "--lags", "0,8,64")


def parse_seeds(text: str) -> list[int]:
    """``4`` means 0 to 3, ``10-14`` a range with both ends, ``3,7`` a list, which may hold ranges; ``3,`` is
    seed 3 alone."""
    if text.strip().isdecimal():
        return list(range(_positive(int(text), text)))
    return _whole_numbers(text, "--seeds", "4 for seeds 0 to 3, 10-14, or 3,7")


def _positive(count: int, text: str) -> int:
    if count < 1:
        raise ConfigError(f"--seeds {text}: it takes at least one seed")
    if count > MOST_NUMBERS:
        raise ConfigError(
            f"--seeds {text} means {count} seeds, 0 to {count - 1}, and {MOST_NUMBERS} are the most; write "
            f"{count}, with a comma for seed {count} alone"
        )
    return count


def _whole_numbers(text: str, option: str, example: str) -> list[int]:
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"{option} {text}: {part!r} is no whole number; write {example}")
        begin, end = int(first), int(last or first) + 1
        if len(numbers) + end - begin > MOST_NUMBERS:
            raise ConfigError(f"{option} {text}: that is more than {MOST_NUMBERS} numbers; write {example}")
        numbers += range(begin, end)
    if not numbers:
        raise ConfigError(f"{option} {text}: there is no number in it; write {example}")
    return list(dict.fromkeys(numbers))


def make_grid(
    base: Config, methods: Sequence[Method], lags: Sequence[int], seeds: Sequence[int], out: Path
) -> list[Cell]:
    """Every cell once, seeds outermost: what is there at any time compares all methods.

    A cell whose config is that of an earlier one is left out. Nothing is run or written.

    Raises ConfigError that names the cell, for settings and parts that do not go together; and for more cells
    than anybody can mean.
    """
    if (count := len(methods) * len(lags) * len(seeds)) > MOST_RUNS:
        raise ConfigError(
            f"{len(methods)} methods, {len(lags)} lags and {len(seeds)} seeds are {count} runs, and "
            f"{MOST_RUNS} are the most: ask for fewer at once, in the same --out"
        )
    grid = [
        make_cell(base, method.label, ((("algorithm.name", method.name)), *method.settings), lag, seed, out)
        for seed in seeds
        for method in methods
        for lag in lags
    ]
    return without_duplicates(grid)


def make_cell(
    base: Config,
    label: str,
    settings: Iterable[tuple[str, object]],
    lag: int,
    seed: int,
    out: Path,
    control_of: str = "",
) -> Cell:
    """The cell of a method at a lag with a seed, its parts checked."""
    made = {
        "pipeline.mode": "exact",
        "pipeline.lag": lag,
        "run.seed": seed,
        "run.folder": out / RUNS_FOLDER,
        "run.name": f"{_file_name(label)}-lag{lag}-seed{seed}",
    }
    overrides = [f"--{dotted}={value}" for dotted, value in (*settings, *made.items())]
    try:
        config = apply_overrides(base, overrides)
        algorithm_of(config)
        check_engine(config)
        check_processes(config)
    except ConfigError as error:
        raise type(error)(f"{label} at lag {lag}: {error}") from error
    return Cell(label, config, control_of)


def check_files(cells: Iterable[Cell]) -> None:
    """Read what the runs will read: the data of every environment, which is made as a plan makes it, step
    scales, calibrations; each once.

    Raises ConfigError that names the cell.
    """
    from vcpo.pipeline.plan import check_environment  # imports transformers

    seen = set()
    for cell in cells:
        parts = ("environment", "model", "lora")
        key = json.dumps([getattr(cell.config, part).model_dump(mode="json") for part in parts])
        try:
            if key not in seen:
                check_environment(cell.config)
                seen.add(key)
            read_step_scales(cell.config)
            if cell.config.algorithm.on_policy_ratio == "calibrated":
                find_calibration(cell.config, None)
        except ConfigError as error:
            raise type(error)(f"{cell.method} at lag {cell.lag}: {error}") from error


def _file_name(label: str) -> str:
    """``label`` without what is awkward in a path; two labels never share one."""
    plain = _UNSAFE.sub("_", label).strip("_").encode()[:_LONGEST_NAME].decode(errors="ignore")
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def without_duplicates(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of every config, where it stands."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(identity(cell.config), cell)
    return list(found.values())


def identity(config: Config) -> str:
    """Equal for configs of the same run: all settings but its name, its place, and how it is run."""
    settings = config.model_dump(mode="json", exclude={"run": {"name", "folder"}, "runtime": True})
    settings["algorithm"]["step_scales"] = _step_scales(config)
    return json.dumps(settings, sort_keys=True)


def fingerprint(config: Config) -> str:
    """Equal for configs of the same run, as :func:`identity`, and kept by later versions that have settings
    more: it is of the settings that are not the defaults."""
    changed = differences(Config(), config)
    settings = {k: v for k, v in changed.items() if k not in _PLACES and not k.startswith("runtime.")}
    if config.algorithm.step_scales:
        settings["algorithm.step_scales"] = _step_scales(config)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _step_scales(config: Config) -> str:
    """The file of a control is the same one wherever the command is given; one of the user's is not."""
    name = Path(config.algorithm.step_scales)
    return name.name if name.parent.name == CONTROLS_FOLDER else config.algorithm.step_scales


def differences(before: Config, after: Config) -> dict[str, Any]:
    """Dotted name and new value of every setting in which ``after`` differs."""
    was, now = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        setting.dotted: now[setting.section][setting.name]
        for setting in SETTINGS.values()
        if now[setting.section][setting.name] != was[setting.section][setting.name]
    }


def warm_start_key(config: Config) -> str | None:
    """Equal for runs that share a warm-started model; None for those that need none."""
    if config.model.name or not (config.warm_start.steps and config.warm_start.cache):
        return None
    parts = {
        part: getattr(config, part).model_dump(mode="json") for part in ("model", "warm_start", "environment")
    }
    return json.dumps({"seed": config.run.seed, **parts}, sort_keys=True)
