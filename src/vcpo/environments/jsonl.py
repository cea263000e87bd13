"""Problems of your own from a JSON-lines file with the fields ``prompt`` and ``answer``.

The whole file is read and validated at construction, so that a broken line is found before any work is
done. One prompt in eight is held out by the same stable hash as elsewhere; equal prompts stay together.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vcpo.config import EnvironmentConfig
from vcpo.environments.protocol import Codec, Episode, Problem, Split
from vcpo.environments.splits import HELD_OUT_ONE_IN, split_of
from vcpo.errors import ConfigError, DataError

log = logging.getLogger(__name__)

NUMBER = re.compile(
    r"""(?: (?<! [\w).] ) [-+] )?                                  # a sign, unless it joins two operands
        (?: (?: [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
          | (?<! [0-9] ) \.[0-9]+ )
        (?: [eE][-+]?[0-9]{1,3} (?![0-9]) )?""",
    re.VERBOSE | re.ASCII,
)


class Line(NamedTuple):
    """One problem of the file."""

    number: int
    prompt: str
    answer: str


class JsonLines:
    """Single-turn questions with known answers, judged by ``environment.match``."""

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        self._codec, self._max_tokens = codec, config.max_tokens
        self._matches = MATCHES[config.match]
        self._path = config.path
        lines = read_lines(config)
        held_out = _held_out_prompts([line.prompt for line in lines], config.path)
        self._splits: dict[Split, list[Line]] = {
            "train": [line for line in lines if line.prompt not in held_out],
            "held_out": [line for line in lines if line.prompt in held_out],
        }
        if not held_out:
            self._splits = {"train": lines, "held_out": lines}

    @classmethod
    def alphabet(cls, config: EnvironmentConfig) -> str:
        """The characters of the file's prompts and answers."""
        return "".join(sorted({char for line in read_lines(config) for char in line.prompt + line.answer}))

    def problem(self, index: int, split: Split) -> Problem:
        """Held out: the file's order, over and over. Train: every line once an epoch, each epoch in an
        order of its own."""
        lines = self._splits[split]
        epoch, place = divmod(index, len(lines))
        if split == "train":
            place = int(_order(len(lines), epoch)[place])
        return Problem(index, lines[place].prompt, lines[place].answer)

    def problem_count(self, split: Split) -> int:
        """Lines of the split."""
        return len(self._splits[split])

    def check_context(self, context_length: int) -> None:
        """Raise DataError for the first prompt that leaves no room for even one token of an answer."""
        for line in sorted({*self._splits["train"], *self._splits["held_out"]}):
            used = len(self._codec.encode_prompt(line.prompt))
            if used >= context_length:
                raise DataError(
                    f"{self._path}, line {line.number}: the prompt takes {used} tokens and the context "
                    f"holds {context_length}, answer included; shorten it or raise model.context_length"
                )

    async def play(self, problem: Problem, episode: Episode) -> float:
        """One answer of at most ``environment.max_tokens`` tokens."""
        episode.observe(self._codec.encode_prompt(problem.prompt))
        response = self._codec.decode(await episode.act(self._max_tokens))
        return float(self._matches(response, problem.answer))


def matches_exactly(response: str, answer: str) -> bool:
    """Equal but for white space around them."""
    return response.strip() == answer.strip()


def contains(response: str, answer: str) -> bool:
    """The answer occurs in the response."""
    return answer.strip() in response


def matches_number(response: str, answer: str) -> bool:
    """The last number of the response equals the answer, exactly, as decimals: 1,234.0 is 1234."""
    return (last := last_number(response)) is not None and last == last_number(answer)


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": matches_exactly,
    "contains": contains,
    "number": matches_number,
}


def last_number(text: str) -> Decimal | None:
    """The last number in ``text``; a sign counts where it does not follow a word, a digit or a bracket,
    a comma only between groups of three digits."""
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def read_lines(config: EnvironmentConfig) -> list[Line]:
    """Every problem of the file, in order; blank lines are passed over.

    Raises ConfigError without a path, DataError (file, line, what to do) for anything that is not a
    problem and for a file without any.
    """
    if not config.path:
        raise ConfigError("environment.kind = 'jsonl' needs a data file; set environment.path")
    try:
        raw_lines = Path(config.path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{config.path}: cannot be read ({reason}); check environment.path") from error
    lines = [_parse_line(raw, number, config) for number, raw in enumerate(raw_lines, start=1) if raw.strip()]
    if not lines:
        raise DataError(
            f"{config.path}: has no problems; write one JSON object a line, with prompt and answer"
        )
    return lines


def _parse_line(raw: bytes, number: int, config: EnvironmentConfig) -> Line:
    def fail(what: str) -> NoReturn:
        raise DataError(f"{config.path}, line {number}: {what}; correct or remove the line") from None

    try:
        # Decimal keeps the digits that were written: 1.50 becomes the text "1.50".
        record = json.loads(raw.decode(), parse_int=Decimal, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        fail(f"is not JSON in UTF-8 ({where})")
    if not isinstance(record, dict):
        fail("is not a JSON object with prompt and answer")
    prompt, answer = (_text_field(record, name, fail) for name in ("prompt", "answer"))
    if config.match == "number" and last_number(answer) is None:
        fail(f"answer {answer!r} holds no number, and environment.match is number")
    return Line(number, prompt, answer)


def _text_field(record: dict[str, Any], name: str, fail: Callable[[str], NoReturn]) -> str:
    if name not in record:
        fail(f"has no field {name!r}")
    value = record[name]
    text = str(value) if isinstance(value, Decimal) else value
    if not isinstance(text, str):
        fail(f"{name} must be a string or a number")
    if not text.strip():
        fail(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        fail(f"{name} holds half of a surrogate pair, which is not text")
    return text


def _held_out_prompts(prompts: list[str], path: str) -> set[str]:
    """Prompts to hold out: by hash; of few prompts, or where that leaves a split empty, the last ones.
    Empty for a single prompt, which both splits then share."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) == 1:
        log.warning("%s has a single prompt: it is trained on and evaluated on", path)
        return set()
    held_out = {prompt for prompt in distinct if split_of(prompt) == "held_out"}
    if len(distinct) < HELD_OUT_ONE_IN or not 0 < len(held_out) < len(distinct):
        held_out = set(distinct[-max(1, len(distinct) // HELD_OUT_ONE_IN) :])
    return held_out


@lru_cache(maxsize=4)
def _order(count: int, epoch: int) -> np.ndarray:
    """[count]: the order of one epoch. Rollouts near an epoch's end ask for two epochs in turn."""
    return np.random.default_rng(epoch).permutation(count)
