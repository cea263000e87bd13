"""A command that names no recipe takes that of the environment it asks for."""

from __future__ import annotations

import pytest

from vcpo.config import default_recipe


@pytest.mark.parametrize(
    ("overrides", "recipe"),
    [
        ([], "maze"),
        (["--pipeline.lag", "3"], "maze"),
        (["--environment.kind", "jsonl", "--environment.path", "x"], "jsonl"),
        (["--environment.kind=countdown"], "countdown"),
        (["--environment.kind", "my_module:Mine"], "maze"),
    ],
)
def test_the_environment_chooses_the_recipe(overrides: list[str], recipe: str) -> None:
    assert default_recipe(overrides) == recipe
