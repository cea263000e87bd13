"""Where weights wait for the samplers: a folder in shared memory, or one that all of them see."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from vcpo.errors import ConfigError

SHARED = Path("/dev/shm")

TRANSFER_PREFIX = "vcpo-weights-"
"""Of folders for weights on their way; the id of the process that made one follows."""


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
    return Path(tempfile.mkdtemp(prefix=f"{TRANSFER_PREFIX}{os.getpid()}-", dir=parent if fits else None))


def _remove_left(parent: Path) -> None:
    """Only in memory of this machine: processes of other machines have the same ids."""
    for left in parent.glob(f"{TRANSFER_PREFIX}*"):
        pid = left.name.removeprefix(TRANSFER_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
