"""From a recipe and the command line to a config. Every error is one line of :class:`ConfigError`."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vcpo.config.recipes import find_recipe, recipe_names
from vcpo.config.sections import Config, EnvironmentConfig, SamplerConfig
from vcpo.config.settings import SETTINGS, Setting, hint
from vcpo.errors import ConfigError

LONGEST_QUOTE = 60
"""Characters of a wrong value that an error repeats."""

SOURCES = {
    "path": ("dataset", "dataset_config", "split", "held_out_split"),
    "dataset": ("path", "held_out_path"),
}
"""Settings that say where problems come from, and those of [environment] that go with the other one."""

STARTED = ("servers", "python", "devices", "options")
"""Settings of [sampler] that say how to start servers."""


def load_config(recipe: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, then apply overrides.

    Args:
        recipe: a TOML file, or the name of a recipe that comes with vcpo; None: the defaults.
        overrides: ``["--section.field", "value", "--section.field=value", ...]``; the last one wins.

    Raises:
        ConfigError: no such file, broken TOML, an unknown name, a value of wrong type or out of range.
    """
    return apply_overrides(_read(find_recipe(recipe)) if recipe is not None else Config(), overrides)


def default_recipe(overrides: Sequence[str]) -> str:
    """The recipe of a command that names none: that of the environment it asks for, else the maze."""
    kind = dict(_pairs(overrides)).get("environment.kind")
    return kind if kind in recipe_names() else "maze"


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with the given fields replaced, all checked together.

    The text of a value is read as its field's type: ``true`` and ``false``, lists with commas, and nothing
    (``--algorithm.truncation=``) for a field that may be unset and for an empty list.
    """
    data = config.model_dump()
    given = dict(_pairs(overrides))
    _forget_replaced_source(data["environment"], given)
    _forget_replaced_engine(data["sampler"], given)
    for dotted, text in given.items():
        setting = SETTINGS[dotted]
        data[setting.section][setting.name] = from_text(setting, text)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_describe(error, [f"--{dotted}" for dotted in given], "--")) from error


def _forget_replaced_source(environment: dict[str, Any], given: Mapping[str, str]) -> None:
    """A file that is given takes the place of a recipe's data set, and a data set that of its file: what
    belongs to the other one goes back to its default, unless it is given too."""
    defaults = EnvironmentConfig()
    for source, of_the_other in SOURCES.items():
        if given.get(f"environment.{source}"):
            for name in of_the_other:
                environment[name] = getattr(defaults, name)


def _forget_replaced_engine(sampler: dict[str, Any], given: Mapping[str, str]) -> None:
    """Servers that run already take the place of those that a recipe starts, and the local sampler that of
    all servers: what belongs to these goes back to its default, unless it is given too."""
    replaced: tuple[str, ...] = ()
    if given.get("sampler.kind") == "local":
        replaced = ("urls", "transfer", *STARTED)
    elif given.get("sampler.urls"):
        replaced = STARTED
    for name in replaced:
        sampler[name] = getattr(SamplerConfig(), name)


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Dotted name and text of every override."""
    rest = iter(overrides)
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}: settings are written --section.field value")
        dotted, equals, text = argument[2:].partition("=")
        if dotted not in SETTINGS:
            raise ConfigError(f"unknown option --{dotted}; {hint(dotted, '--')}")
        value = text if equals else next(rest, None)
        if value is None or (not equals and value.startswith("--")):
            raise ConfigError(f"--{dotted} needs a value: {SETTINGS[dotted].allowed}")
        yield dotted, value


def from_text(setting: Setting, text: str) -> Any:
    """The text itself for all but unset fields and lists: pydantic reads numbers and booleans."""
    if setting.may_be_unset and not text:
        return None
    if setting.schema.get("type") == "array":
        return text.split(",") if text else []
    return text


def _read(path: Path) -> Config:
    data = _parse(path)
    _check_names(path, data)
    try:
        # Through JSON, because there strict means TOML's own types, with text for paths.
        return Config.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_describe(error, [str(path)], f"{path}: ")) from error


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = f"line {len(text.splitlines())}, the end of the file"
        raise ConfigError(f"{path}: broken TOML: {str(error).replace('end of document', last)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: a recipe is a TOML file") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _check_names(path: Path, data: Mapping[str, Any]) -> None:
    for section, values in data.items():
        if section in Config.model_fields and not isinstance(values, dict):
            raise ConfigError(f"{path}: {section} must be a section: write [{section}] and its fields below")
        if section not in Config.model_fields and isinstance(values, dict):
            raise ConfigError(f"{path}: unknown section [{section}]; {_section_hint(section)}")
        names = [f"{section}.{name}" for name in values] if isinstance(values, dict) else [section]
        for dotted in names:
            if dotted not in SETTINGS:
                raise ConfigError(f"{path}: unknown key {dotted}; {hint(dotted)}")


def _section_hint(section: str) -> str:
    near = difflib.get_close_matches(section, Config.model_fields, 1)
    return f"did you mean [{near[0]}]?" if near else f"sections are {', '.join(Config.model_fields)}"


def _describe(error: ValidationError, sources: Sequence[str], prefix: str) -> str:
    """The first error in one line, and how many more there are."""
    first, *more = error.errors(include_url=False)
    setting = SETTINGS.get(".".join(map(str, first["loc"][:2])))
    text = _contradiction(first, sources) if setting is None else _bad_value(setting, first, prefix)
    return text + (f" (and {len(more)} more)" if more else "")


def _bad_value(setting: Setting, error: ErrorDetails, prefix: str) -> str:
    quoted = repr(error["input"])
    if len(quoted) > LONGEST_QUOTE:
        quoted = f"{quoted[:LONGEST_QUOTE]}…"
    near = difflib.get_close_matches(str(error["input"]), [*setting.choices, *setting.words], 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{prefix}{setting.dotted} is {quoted}: it must be {setting.allowed}{meant}"


def _contradiction(error: ErrorDetails, sources: Sequence[str]) -> str:
    """Fields that are each right and do not go together; ``sources`` that touch the section are named."""
    section = str(error["loc"][0])
    options = [source for source in sources if source.startswith(f"--{section}.")]
    reason = error["msg"].removeprefix("Value error, ")
    return f"{', '.join(options or sources)}: [{section}] {reason}"
