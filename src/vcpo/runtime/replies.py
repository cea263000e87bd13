"""Errors on their way between processes: a class of the vocabulary and a message, never a pickled object."""

from __future__ import annotations

import traceback
from typing import Any

from vcpo import errors
from vcpo.errors import VcpoError, WorkerError

Reply = dict[str, Any]


def error_reply(error: BaseException) -> Reply:
    """An error as a reply: its class, if it is in the vocabulary, and its message; the log has more."""
    traceback.print_exception(error)
    if isinstance(error, VcpoError):
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "WorkerError", "message": f"{type(error).__name__}: {error}"}


def error_of(reply: Reply, name: str, log: object) -> VcpoError:
    """The error that a reply of the process ``name`` tells of; one that nobody foresaw names its ``log``."""
    kind = getattr(errors, reply["error"], WorkerError)
    error = VcpoError.__new__(kind)  # the message is complete: not every class is made from one string
    unforeseen = f"{name}: {reply['message']}; see {log}"
    Exception.__init__(error, unforeseen if kind is WorkerError else reply["message"])
    return error
