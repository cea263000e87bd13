"""Where the answer is: in the field of a data set, and in what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Callable

_BOXES = re.compile(r"\\boxed\s*\{|\\boxed\s+(?P<bare>[^\s{}$\\]+)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def last_boxed(text: str) -> str | None:
    """What the last complete ``\\boxed{...}`` contains, braces inside it included; None if there is none.

    Of boxes inside boxes the innermost; ``\\boxed 7`` is one too. One pass, so that a text full of open boxes
    takes no longer.
    """
    last, last_start = None, -1
    opened: list[int | None] = []
    """For every open brace: where its box begins, None if it is no box's."""
    for found in _BOXES.finditer(text):
        if found["bare"]:
            last, last_start = found["bare"].rstrip(".,;"), found.start("bare")
        elif found["open"]:
            opened.append(None)
        elif found["close"]:
            start = opened.pop() if opened else None
            if start is not None and start > last_start:
                last, last_start = text[start : found.start()].strip(), start
        elif found[0].endswith("{") and found[0] != "\\{":
            opened.append(found.end())
    return last


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####``, as in GSM8K, without commas between thousands."""
    _, hashes, rest = text.rpartition("####")
    return _THOUSANDS.sub("", rest.strip().partition("\n")[0].strip()) if hashes else None


def plain(text: str) -> str | None:
    """All of it."""
    return text.strip()


ANSWER_FORMS: dict[str, tuple[Callable[[str], str | None], str]] = {
    "plain": (plain, "text"),
    "hashes": (after_hashes, "####, with the answer after it"),
    "boxed": (last_boxed, "\\boxed{}, with the answer in it"),
}
"""By ``environment.answer_form``: how to read a field, and what must be there."""
