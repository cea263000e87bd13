"""Every test process: one torch thread, no network, caches of its own, shapes checked."""

from __future__ import annotations

import importlib
import os
import pkgutil
import tempfile
import typing

# Before torch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

CACHE = tempfile.TemporaryDirectory(prefix="vcpo-tests-")
"""Warm-started models; removed when the process ends, so that no test passes on what another run left."""
os.environ["VCPO_CACHE"] = CACHE.name


def check_shapes_of(package: str) -> None:
    """Import every module of ``package`` with jaxtyping's and beartype's run-time checks.

    The modules import jaxtyping only under ``TYPE_CHECKING``, as it is no run-time dependency; here its
    names must exist, so the constant is true while they are imported. What they import from elsewhere
    comes first, as it should not see that.
    """
    import shape_checks  # noqa: F401
    import torch
    from jaxtyping import install_import_hook

    torch.set_num_threads(1)
    typing.TYPE_CHECKING = True
    try:
        with install_import_hook(package, "shape_checks.after_the_call"):
            root = importlib.import_module(package)
            for module in pkgutil.walk_packages(root.__path__, f"{package}."):
                importlib.import_module(module.name)
    finally:
        typing.TYPE_CHECKING = False


check_shapes_of("vcpo.estimators")
