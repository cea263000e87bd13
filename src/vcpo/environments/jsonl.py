"""Problems of your own with an answer that is compared as text or as a number: JSON lines with the fields
``prompt`` and ``answer``, or whatever :mod:`vcpo.environments.data` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from vcpo.config import EnvironmentConfig
from vcpo.environments.data import Line
from vcpo.environments.protocol import Codec
from vcpo.environments.single_turn import SingleTurn
from vcpo.errors import DataError

NUMBER = re.compile(
    r"""(?: (?<! [\w).] ) [-+] )?                                  # a sign, unless it joins two operands
        (?: (?: [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
          | (?<! [0-9] ) \.[0-9]+ )
        (?: [eE][-+]?[0-9]{1,3} (?![0-9]) )?""",
    re.VERBOSE | re.ASCII,
)


class JsonLines(SingleTurn):
    """Single-turn questions with known answers, judged by ``environment.match``."""

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        super().__init__(codec, config)
        self._matches = MATCHES[config.match]
        if config.match == "number":
            for line in sorted({line for lines in self._splits.values() for line in lines}):
                _check_number(line)

    async def is_right(self, response: str, answer: str) -> bool:
        """Whether they match."""
        return self._matches(response, answer)


def _check_number(line: Line) -> None:
    if last_number(line.answer) is None:
        raise DataError(
            f"{line.place}: answer {line.answer!r} holds no number, and environment.match is number; correct "
            "or remove it"
        )


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
