"""Real vLLM servers on the CPU. ``make test-engines`` makes the environment that they run in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, and inherited by the servers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A server imports thousands of files in each of its processes: only the first one shall compile them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

CACHE = tempfile.TemporaryDirectory(prefix="vcpo-tests-")
os.environ["VCPO_CACHE"] = CACHE.name


@pytest.fixture(scope="session")
def engine_python() -> str:
    """Of the environment with vLLM."""
    python = Path(__file__).parents[1] / ".venv-engines" / "bin" / "python"
    assert python.exists(), "no environment with vLLM: run `make test-engines`"
    return str(python)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, seed 0."""
    import tiny

    return tiny.save(tiny.llama(0), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def served(engine_python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of that model, started as a person does. Its weights are what the test before left."""
    import playing

    with playing.vcpo_serve(engine_python, model, tmp_path_factory.mktemp("serve") / "log") as url:
        yield url
