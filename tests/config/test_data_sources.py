"""A file that is given takes the place of a recipe's data set, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcpo.config import load_config
from vcpo.errors import ConfigError


def test_a_file_in_place_of_the_recipes_data_set() -> None:
    environment = load_config(
        "gsm8k", ["--environment.path", "a.jsonl", "--environment.held_out_path", "b.jsonl"]
    )
    given = environment.environment
    assert (given.path, given.held_out_path) == ("a.jsonl", "b.jsonl")
    assert (given.dataset, given.dataset_config, given.split, given.held_out_split) == ("", "", "train", "")
    assert (given.prompt_field, given.answer_form) == ("question", "hashes")


def test_a_data_set_in_place_of_the_recipes_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[environment]\nkind = "math"\npath = "a.jsonl"\nheld_out_path = "b.jsonl"\n')
    given = load_config(recipe, ["--environment.dataset", "who/what", "--environment.held_out_split", "dev"])
    assert (given.environment.path, given.environment.held_out_path) == ("", "")
    assert (given.environment.dataset, given.environment.held_out_split) == ("who/what", "dev")


def test_both_are_still_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="path is a file and dataset is on a hub: give one of them"):
        load_config("gsm8k", ["--environment.path", "a", "--environment.dataset", "b"])


def test_nothing_given_changes_nothing() -> None:
    assert load_config("gsm8k", ["--environment.path="]) == load_config("gsm8k")


def test_an_empty_list() -> None:
    local = load_config("gsm8k", ["--sampler.kind", "local", "--sampler.devices="])
    assert local.sampler.devices == []
