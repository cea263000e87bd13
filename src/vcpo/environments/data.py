"""Problems with known answers from where people have them: JSON lines, Parquet, a data set of a hub.

All of it is read and validated at once, so that a broken line is found before any work is done. What is held
out never occurs in training: equal prompts are on one side, whatever file or split they came from. A data set
is data alone: no program that comes with one is ever run.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vcpo.config import EnvironmentConfig
from vcpo.environments.answers import ANSWER_FORMS
from vcpo.environments.splits import HELD_OUT_ONE_IN, split_of
from vcpo.errors import ConfigError, DataError, UnreachableDataError

log = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")
"""Splits of a data set that are held out if none is named: the first that there is."""

PARQUET = b"PAR1"
"""How every Parquet file begins."""


class Line(NamedTuple):
    """One problem."""

    number: int
    """Of its line or row in the file, from 1."""
    prompt: str
    answer: str
    place: str
    """For people: ``problems.jsonl, line 3``."""


class Problems(NamedTuple):
    """Every problem there is; no prompt is on both sides, unless there is only one."""

    train: list[Line]
    """In the order of the file."""
    held_out: list[Line]
    """In an order that mixes the file and is always the same, so that the first ones are a fair sample."""
    source: str
    """Where they come from, for people."""


def read_problems(config: EnvironmentConfig) -> Problems:
    """The problems that ``config`` names.

    Raises ConfigError if it names none; DataError (file, line, what to do) for anything that is not a
    problem, a file without any, an unknown split; UnreachableDataError for a data set that cannot be had now.
    """
    if not config.path and not config.dataset:
        raise ConfigError(
            f"environment.kind = {config.kind!r} needs problems: set environment.path (a file of JSON lines "
            "or Parquet) or environment.dataset (a data set on a hub)"
        )
    train, held_out, source = _from_files(config) if config.path else _from_data_set(config)
    if held_out is None:
        return _divided(train, source)
    prompts = {line.prompt for line in held_out}
    kept = [line for line in train if line.prompt not in prompts]
    if not kept:
        raise DataError(f"{source}: every problem is held out; give other problems to train on")
    if len(kept) < len(train):
        log.warning(
            "%s: %d problems are held out too and left out of training", source, len(train) - len(kept)
        )
    return Problems(kept, _mixed(held_out), source)


def _divided(lines: list[Line], source: str) -> Problems:
    """Held out by the hash of the prompt."""
    prompts = _held_out_prompts([line.prompt for line in lines], source)
    if not prompts:
        return Problems(lines, lines, source)
    train = [line for line in lines if line.prompt not in prompts]
    return Problems(train, _mixed(line for line in lines if line.prompt in prompts), source)


def _held_out_prompts(prompts: list[str], source: str) -> set[str]:
    """Prompts to hold out: by hash; of few prompts, or where that leaves a split empty, the last ones.
    Empty for a single prompt, which both splits then share."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) == 1:
        log.warning("%s has a single prompt: it is trained on and evaluated on", source)
        return set()
    held_out = {prompt for prompt in distinct if split_of(prompt) == "held_out"}
    if len(distinct) < HELD_OUT_ONE_IN or not 0 < len(held_out) < len(distinct):
        held_out = set(distinct[-max(1, len(distinct) // HELD_OUT_ONE_IN) :])
    return held_out


def _mixed(lines: Iterable[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: blake2b(line.prompt.encode(), digest_size=8).digest())


def _from_files(config: EnvironmentConfig) -> tuple[list[Line], list[Line] | None, str]:
    train = _read_file(config.path, "path", config)
    if not config.held_out_path:
        return train, None, config.path
    return train, _read_file(config.held_out_path, "held_out_path", config), config.path


def _read_file(path: str, setting: str, config: EnvironmentConfig) -> list[Line]:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be read ({reason}); check environment.{setting}") from error
    if raw.startswith(PARQUET):
        lines = list(_parquet_lines(raw, path, config))
    else:
        raw_lines = enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        lines = [_json_line(line, f"{path}, line {n}", n, config) for n, line in raw_lines if line.strip()]
    if not lines:
        fields = f"{config.prompt_field} and {config.answer_field}"
        raise DataError(f"{path}: has no problems; write one JSON object a line, with {fields}")
    return lines


def _json_line(raw: bytes, place: str, number: int, config: EnvironmentConfig) -> Line:
    fail = _failing(place, "line")
    try:
        # Decimal keeps the digits that were written: 1.50 becomes the text "1.50".
        record = json.loads(raw.decode(), parse_int=Decimal, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        fail(f"is not JSON in UTF-8 ({where})")
    if not isinstance(record, dict):
        fail(f"is not a JSON object with {config.prompt_field} and {config.answer_field}")
    for setting in ("prompt_field", "answer_field"):
        if (name := getattr(config, setting)) not in record:
            fail(
                f"has no field {name!r} (environment.{setting}); its fields are {', '.join(record) or 'none'}"
            )
    return _line(record, place, number, config, fail)


def _parquet_lines(raw: bytes, path: str, config: EnvironmentConfig) -> Iterator[Line]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path} is Parquet, which needs pyarrow: pip install 'vcpo[data]'") from error
    try:
        file = ParquetFile(io.BytesIO(raw))
        _check_columns(file.schema_arrow.names, path, config)
        rows = file.read(columns=[config.prompt_field, config.answer_field]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: is not readable as Parquet ({reason}); check environment.path") from error
    yield from _rows(rows, path, config)


def _check_columns(columns: list[str], source: str, config: EnvironmentConfig) -> None:
    for setting in ("prompt_field", "answer_field"):
        if (name := getattr(config, setting)) not in columns:
            raise DataError(
                f"{source}: has no field {name!r}; its fields are {', '.join(columns)}: "
                f"set environment.{setting}"
            )


def _rows(rows: Iterable[Mapping[str, Any]], source: str, config: EnvironmentConfig) -> Iterator[Line]:
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        yield _line(row, place, number, config, _failing(place, "row"))


def _failing(place: str, what: str) -> Callable[[str], NoReturn]:
    def fail(reason: str) -> NoReturn:
        raise DataError(f"{place}: {reason}; correct or remove the {what}") from None

    return fail


def _line(
    record: Mapping[str, Any],
    place: str,
    number: int,
    config: EnvironmentConfig,
    fail: Callable[[str], NoReturn],
) -> Line:
    prompt, field = (_text(record, name, fail) for name in (config.prompt_field, config.answer_field))
    read, wanted = ANSWER_FORMS[config.answer_form]
    answer = field if config.answer_form == "plain" else read(field)
    if not answer:
        fail(f"{config.answer_field} has no {wanted} (environment.answer_form = {config.answer_form!r})")
    return Line(number, prompt, answer, place)


def _text(record: Mapping[str, Any], name: str, fail: Callable[[str], NoReturn]) -> str:
    value = record[name]
    is_number = (
        isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    )
    text = str(value) if is_number else value
    if not isinstance(text, str):
        fail(f"{name} must be a string or a number")
    if not text.strip():
        fail(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        fail(f"{name} holds half of a surrogate pair, which is not text")
    return text


def _from_data_set(config: EnvironmentConfig) -> tuple[list[Line], list[Line] | None, str]:
    splits = _load(config)
    if config.split not in splits:
        raise DataError(_no_split(config, "split", splits))
    held_out = config.held_out_split
    if held_out and held_out not in splits:
        raise DataError(_no_split(config, "held_out_split", splits))
    if not held_out:
        usual = [name for name in HELD_OUT_SPLITS if name in splits and name != config.split]
        held_out = usual[0] if usual else ""
    train = _split_lines(splits[config.split], f"{config.dataset} ({config.split})", config)
    if not held_out:
        return train, None, config.dataset
    return train, _split_lines(splits[held_out], f"{config.dataset} ({held_out})", config), config.dataset


def _no_split(config: EnvironmentConfig, setting: str, splits: Mapping[str, Any]) -> str:
    name, known = getattr(config, setting), ", ".join(splits)
    return f"the data set {config.dataset!r} has no split {name!r}; it has {known}: set environment.{setting}"


def _split_lines(rows: Any, source: str, config: EnvironmentConfig) -> list[Line]:
    _check_columns(rows.column_names, source, config)
    chosen = rows.select_columns(list({config.prompt_field, config.answer_field}))
    lines = list(_rows(chosen, source, config))
    if not lines:
        raise DataError(f"{source}: has no problems; choose another split")
    return lines


def _load(config: EnvironmentConfig) -> Mapping[str, Any]:
    """The splits of a data set by name: from the hub, from what was downloaded before, or from a folder."""
    name = config.dataset
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise UnreachableDataError(
            f"the data set {name!r} needs the package datasets: pip install 'vcpo[data]'"
        ) from error
    datasets.disable_progress_bars()  # a run has one bar, and it is ours
    try:
        return datasets.load_dataset(name, config.dataset_config or None)  # pyright: ignore[reportReturnType]
    except DatasetNotFoundError as error:
        reason = _first_sentence(error)
        raise DataError(f"no data set {name!r}: {reason}; check environment.dataset") from error
    except OSError as error:
        raise UnreachableDataError(
            f"the data set {name!r} is not on this machine and out of its reach now; download it where there "
            f"is a network (hf download {name} --repo-type dataset --local-dir FOLDER) and set "
            "environment.dataset to the folder, or environment.path to a file of it"
        ) from error
    except Exception as error:  # whatever a reader of tables says of a table
        reason = _first_sentence(error)
        raise DataError(
            f"cannot load the data set {name!r}: {reason}; check environment.dataset and dataset_config"
        ) from error


def _first_sentence(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
