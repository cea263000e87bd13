"""Answers checked by math-verify, in processes of their own.

A model can write expressions that keep a computer algebra system busy for ever, or that fill the memory, and
math-verify's own time limit needs the signals of the main thread. So each check runs in a child process with
a limit on its CPU time and on its memory, which the operating system enforces: nothing in it can hold up the
sampler. A child that was ended is replaced by the next check that needs one.

Parent and child talk in lines of JSON; nothing is pickled. The child is
:mod:`vcpo.environments.checking_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vcpo.environments import checking_process
from vcpo.environments.answers import after_hashes, last_boxed
from vcpo.errors import ConfigError, EnvironmentFailure

log = logging.getLogger(__name__)

CPU_SECONDS = 5.0
"""CPU time of one check; ordinary answers take milliseconds, the first ones of a process up to a second."""

PROCESSES = 4
"""The most checks at once; a process is started when it is needed."""

LONGEST_ANSWER = 1000
"""Characters of an answer that is checked; a longer one is wrong."""

END_OF_RESPONSE = 300
"""Characters at the end of a response without a box in which ``the answer is`` is looked for."""


class AnswerChecker:
    """Says whether a response gives an answer, without blocking the event loop it is awaited in.

    Raises ConfigError at construction if math-verify is not installed.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        missing = [name for name in ("math_verify", "antlr4") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"checking answers needs math-verify ({missing[0]} is not installed): "
                "pip install 'vcpo[math]'"
            )
        self._cpu_seconds = cpu_seconds
        self._idle: list[_Process] = []
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="checking")
        self._finalizer = weakref.finalize(self, _end_all, self._idle)

    async def is_right(self, response: str, reference: str) -> bool:
        """Whether math-verify finds the answer of ``response`` equal to ``reference``.

        The answer is what the last ``\\boxed{}`` contains; without a box what follows the last ``####``;
        without that too what math-verify finds after words such as ``the answer is``. A number that merely
        stands at the end is no answer: it may be the middle of an argument that was cut off.

        A check that exceeds its time is logged and counts as wrong. Raises EnvironmentFailure if the process
        cannot check at all.
        """
        found = last_boxed(response)
        answer = after_hashes(response) if found is None else found
        if answer is not None and (not answer or len(answer) > LONGEST_ANSWER):
            return False
        if answer == reference:
            return True
        text = response[-END_OF_RESPONSE:] if answer is None else f"\\boxed{{{answer}}}"
        if (
            answer is None and "answer" not in text.lower()
        ):  # none of math-verify's words are without this one
            return False
        request = {"reference": f"\\boxed{{{reference}}}", "text": text, "cpu_seconds": self._cpu_seconds}
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._check, request)

    def _check(self, request: dict[str, Any]) -> bool:
        """In a thread, which waits."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = _Process()
        try:
            right = process.ask(request)
        except _EndedError as error:
            if not error.took_too_long:
                raise EnvironmentFailure(f"{error}; it is started anew") from None
            log.warning(
                "checking an answer took more than %g s of CPU time, so it counts as wrong: %.80r",
                request["cpu_seconds"],
                request["text"],
            )
            return False
        self._idle.append(process)
        return right


class _EndedError(Exception):
    """The process that checks answers is no more."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the process that checks answers ended with code {code}")
        self.took_too_long = code in (-signal.SIGPROF, -signal.SIGALRM)


class _Process:
    """One child; it ends itself when its input does."""

    def __init__(self) -> None:
        # By its path, so that nothing of vcpo is imported in it; -P: nor from the folder it is in.
        self._child = subprocess.Popen(
            [sys.executable, "-P", checking_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
        )
        try:
            ready = self._read()
        except _EndedError as error:
            ready = {"error": error}
        if "error" in ready:
            self.end()
            raise EnvironmentFailure(
                f"math-verify cannot be used: {ready['error']}; pip install 'vcpo[math]'"
            )

    def ask(self, request: dict[str, Any]) -> bool:
        """The reply to ``request``; raises _EndedError."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so will reading say, and with which code
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return bool(self._read()["right"])

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        if line := self._child.stdout.readline():
            return json.loads(line)
        code = self._child.wait()
        self.end()
        raise _EndedError(code)

    def end(self) -> None:
        """Whatever it is doing."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was not written any more has nobody to read it
                if pipe is not None:
                    pipe.close()


def _end_all(processes: list[_Process]) -> None:
    for process in processes:
        process.end()
