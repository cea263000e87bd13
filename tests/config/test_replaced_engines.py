"""Servers that run take the place of those that a recipe starts, and the local sampler that of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcpo.config import load_config
from vcpo.errors import ConfigError

STARTS_TWO = """
[sampler]
kind = "vllm"
servers = 2
devices = ["1", "2"]
python = "other/python"
options = ["--swap-space=1"]
transfer = "collective"
top_k = 5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(STARTS_TWO)
    return path


def test_servers_that_run_already(recipe: Path) -> None:
    sampler = load_config(recipe, ["--sampler.urls", "http://a:1,http://b:2"]).sampler
    assert sampler.urls == ["http://a:1", "http://b:2"]
    assert (sampler.servers, sampler.devices, sampler.python, sampler.options) == (1, [], "", [])
    assert (sampler.kind, sampler.transfer, sampler.top_k) == ("vllm", "collective", 5)


def test_the_local_sampler(recipe: Path) -> None:
    sampler = load_config(recipe, ["--sampler.kind", "local"]).sampler
    assert (sampler.servers, sampler.devices, sampler.python, sampler.options) == (1, [], "", [])
    assert (sampler.kind, sampler.transfer, sampler.top_k) == ("local", "files", 5)


def test_what_is_given_too_is_not_forgotten(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="urls are servers that run already"):
        load_config(recipe, ["--sampler.urls", "http://a:1", "--sampler.servers", "2"])


@pytest.mark.parametrize("name", ["gsm8k", "qerl"])
def test_shipped_recipes_go_with_servers_that_run(name: str) -> None:
    assert load_config(name, ["--sampler.urls", "http://127.0.0.1:8001"]).sampler.devices == []
    assert load_config(name, ["--sampler.kind", "local"]).sampler.devices == []
