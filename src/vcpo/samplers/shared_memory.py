"""Where weights wait for the samplers: a folder in shared memory, or one that all of them see."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from vcpo.errors import ConfigError

SHARED = Path("/dev/shm")

TRANSFER_PREFIX = "vcpo-weights-"
"""Of folders for weights on their way; the process that made one follows, by id and namespace of ids."""


def transfer_folder(size: int, chosen: str = "") -> Path:
    """A new folder for weights on their way: in ``chosen``, else in shared memory if ``size`` bytes fit, else
    on disk. Folders of processes that were killed with their controller are removed: nobody else does."""
    if not chosen:
        _remove_left(SHARED)
    parent = Path(chosen or SHARED)
    fits = parent.is_dir() and os.access(parent, os.W_OK) and shutil.disk_usage(parent).free > size
    if chosen and not fits:
        raise ConfigError(
            f"runtime.weights_folder = {chosen!r} is no folder to write {size:,} bytes in: make it, or free "
            "space"
        )
    prefix = f"{TRANSFER_PREFIX}{os.getpid()}-{_namespace()}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent if fits else None))


def _remove_left(parent: Path) -> None:
    """Only in memory of this machine, and of processes that can be seen from here: those of other machines,
    and of other containers that share the memory, have the same ids."""
    for left in parent.glob(f"{TRANSFER_PREFIX}*-{_namespace()}-*"):
        pid = left.name.removeprefix(TRANSFER_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


def _namespace() -> int:
    """In which process ids mean something; 0 where the system does not tell."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
