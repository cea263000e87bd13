"""Where vcpo keeps what later runs can use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """``name`` below ``VCPO_CACHE``, which by default is ``~/.cache/vcpo``. Not made here."""
    root = (
        os.environ.get("VCPO_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcpo"
    )
    return Path(root) / name
