"""The named algorithms are what their papers say, and a wrong name gets the nearest one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from vcpo.algorithms import ALGORITHMS, get_algorithm
from vcpo.config import AlgorithmConfig
from vcpo.errors import ConfigError

torch.set_num_threads(1)


def recipe(**settings: Any) -> AlgorithmConfig:
    """The recipe's section with these fields set and the others left to their defaults."""
    return AlgorithmConfig.model_validate(settings)


def test_names_and_the_default() -> None:
    assert all(get_algorithm(name).name == name for name in ALGORITHMS)
    assert recipe().name in ALGORITHMS
    assert {a.name for a in ALGORITHMS.values() if a.step_rule != "off"} == {
        "vcpo",
        "vcpo-ess",
        "vcpo-taper",
        "vcpo-clip-higher",
        "vcpo-stapo",
    }


@pytest.mark.parametrize(
    ("typed", "meant"), [("vcop", "vcpo"), ("grop", "grpo"), ("reinforced", "reinforce")]
)
def test_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"{typed!r}; did you mean {meant!r}"):
        get_algorithm(typed)


def test_the_strangest_name_still_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="reinforce, rloo, opo"):
        get_algorithm("")


def test_descriptions_follow_the_settings() -> None:
    text = get_algorithm("vcpo").describe()
    assert "2602.17616" in text and "at most 8" in text and "sqrt(min(1, ρ / ρ_on))" in text
    changed = get_algorithm("vcpo").with_overrides(
        recipe(truncation=3.0, baseline="zero", aggregation="constant", constant_length=64, step_scale="off")
    )
    text = changed.describe()
    assert "at most 3" in text and "zero: b = 0" in text and "(B · 64)" in text and "sqrt" not in text
    assert "[0.8, 1.2]" in get_algorithm("grpo").describe()
    assert "No KL" in get_algorithm("grpo").describe()


def test_algorithms_load_without_transformers() -> None:
    program = "import sys, vcpo.algorithms; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
