"""The child of :mod:`vcpo.environments.checking`: one line of JSON in, one line out, until its input ends.

Time limits are timers whose signals are not handled, so that the operating system ends the process even
inside a computation that never returns to Python. CPU time counts, so that a busy machine changes no reward;
wall time ends what waits without computing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

START_SECONDS = 120.0
"""Wall time for importing math-verify."""

WALL = 20.0
"""Wall time of a check, as a multiple of its CPU time."""

MEMORY = 4 * 2**30
"""Bytes of address space; beyond, Python raises MemoryError, and the answer counts as wrong."""


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which lets episodes finish
    for ending in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    replies = _own_stdout()
    with contextlib.suppress(ValueError, OSError):  # some systems do not let a process limit its memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    try:
        equal = _checker()
    except Exception as error:
        _reply(replies, error=f"{type(error).__name__}: {error}")
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    _reply(replies, ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request["cpu_seconds"])
        right = equal(request["reference"], request["text"])
        _limit(0)
        _reply(replies, right=right)


def _own_stdout() -> TextIO:
    """What libraries print goes to stderr, and the pipe is for replies alone."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, **record: Any) -> None:
    replies.write(json.dumps(record) + "\n")
    replies.flush()


def _limit(cpu_seconds: float) -> None:
    """End this process after so much computing from now; 0: do not."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL * cpu_seconds)


def _checker() -> Callable[[str, str], bool]:
    """(reference, text with an answer) → equal; what cannot be read or compared is not."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.WARNING)  # it warns that its own time limits are off
    forms = [
        LatexExtractionConfig(try_extract_without_anchor=False),
        ExprExtractionConfig(try_extract_without_anchor=False),
    ]

    def equal(reference: str, text: str) -> bool:
        try:
            answer = parse(text, forms, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
            known = parse(reference, forms, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
            return bool(answer) and bool(verify(known, answer, timeout_seconds=None))
        except (Exception, MemoryError):
            return False

    return equal


if __name__ == "__main__":
    main()
