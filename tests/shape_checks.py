"""The run-time check of shape annotations that conftest.py puts on the estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is asked for


def after_the_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and result together, once the function has returned.

    jaxtyping asks for a check of the arguments before the call as well, and marks it by the result Any. It is
    left out, so that a bad shape meets what a user meets: the function's own error. What the function lets
    pass is checked afterwards.
    """
    return function if function.__annotations__.get("return") is Any else _check(function)
