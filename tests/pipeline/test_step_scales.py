"""Step scales from a file: every way in which the file can be wrong is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcpo.config import load_config
from vcpo.errors import ConfigError
from vcpo.pipeline.step_scales import read_step_scales


def read(path: Path | str, steps: int = 3) -> tuple[float, ...] | None:
    return read_step_scales(
        load_config("maze", [f"--algorithm.step_scales={path}", f"--pipeline.steps={steps}"])
    )


def test_one_factor_a_step(tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_text("[0.5, 1, 0.25]")
    assert read(tmp_path / "scales.json") == (0.5, 1.0, 0.25)
    assert read("") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[0.5, 1]", "has 2 factors, and pipeline.steps is 3"),
        ("[0.5, 0, 1]", "the factor of step 2 is 0, not in (0, 1]"),
        ("[0.5, 0.5, 1.01]", "the factor of step 3 is 1.01, not in (0, 1]"),
        ("[true, 0.5, 1]", "the factor of step 1 is True, not in (0, 1]"),
        ("[NaN, 0.5, 1]", "the factor of step 1 is nan, not in (0, 1]"),
        ('{"a": 1}', "must be a list of numbers"),
        ("0.5 1", "is no JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "scales.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read(path)
    assert str(path) in str(raised.value) and told in str(raised.value)
