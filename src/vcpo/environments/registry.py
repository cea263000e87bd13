"""Environments by name: the built-in ones, imported when asked for, and ``module:Class`` of your own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

from vcpo.errors import ConfigError

BUILT_IN = {
    "maze": "vcpo.environments.maze:Maze",
    "collect": "vcpo.environments.collect:Collect",
    "sort": "vcpo.environments.sort:Sort",
    "countdown": "vcpo.environments.countdown:Countdown",
    "jsonl": "vcpo.environments.jsonl:JsonLines",
    "math": "vcpo.environments.mathematics:Mathematics",
}


def environment_class(kind: str) -> type:
    """The class that ``environment.kind`` names.

    Raises ConfigError, in one line, for an unknown name, a module that cannot be imported, a class that
    is not in it, and a class without ``problem`` or ``play``.
    """
    path = BUILT_IN.get(kind, kind)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        raise ConfigError(f"environment.kind = {kind!r} is unknown{_nearest(kind)}")
    if not module_name or not class_name:
        raise ConfigError(f"environment.kind = {kind!r}: write it as module:Class")
    found = getattr(_import(module_name, kind), class_name, None)
    if not isinstance(found, type):
        what = "has no class" if found is None else "does not define as a class"
        raise ConfigError(f"environment.kind = {kind!r}: module {module_name} {what} {class_name!r}")
    missing = [name for name in ("problem", "play") if not callable(getattr(found, name, None))]
    if missing:
        raise ConfigError(
            f"environment.kind = {kind!r}: {class_name} lacks the method {' and '.join(missing)}; "
            "vcpo.environments.protocol shows a complete environment"
        )
    if inspect.isfunction(play := found.play) and not inspect.iscoroutinefunction(play):  # pyright: ignore
        raise ConfigError(f"environment.kind = {kind!r}: {class_name}.play must be written `async def play`")
    return found


def _nearest(kind: str) -> str:
    near = difflib.get_close_matches(kind.lower(), BUILT_IN, n=1)
    names = f"one of {', '.join(BUILT_IN)}, or module:Class of your own"
    return f"; did you mean {near[0]!r}? It is {names}" if near else f"; it is {names}"


def _import(module_name: str, kind: str) -> ModuleType:
    """Import a module, also one in the current folder, where an installed command does not look itself."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"environment.kind = {kind!r}: cannot import {module_name}: {reason}") from error
