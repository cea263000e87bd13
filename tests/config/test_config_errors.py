"""Every mistake in a recipe or an override is one line that says where, what is allowed, what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcpo.config import Section, find_recipe, load_config
from vcpo.config.load import apply_overrides, from_text
from vcpo.config.settings import settings_of
from vcpo.errors import ConfigError


def message(recipe: Path | str | None, *overrides: str) -> str:
    """The error's text, which is one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # unknown names
        (["--pipeline.step", "3"], "unknown option --pipeline.step; did you mean --pipeline.steps?"),
        (["--pipline.steps=3"], "unknown option --pipline.steps; did you mean --pipeline.steps?"),
        (["--learning_rate", "1"], "did you mean --learner.learning_rate?"),
        (["--pipeline.beta1", "1"], "did you mean --learner.beta1?"),
        (["--algorithm.normalize", "std"], "did you mean --algorithm.normalise?"),
        (["--learner.qqq", "1"], "[learner] has learning_rate, critic_learning_rate, weight_decay,"),
        # values
        (["--pipeline.steps", "many"], "--pipeline.steps is 'many': it must be a whole number, at least 1"),
        (["--pipeline.steps", "1.5"], "--pipeline.steps is '1.5': it must be a whole number, at least 1"),
        (["--pipeline.steps=0"], "--pipeline.steps is '0': it must be a whole number, at least 1"),
        (["--pipeline.lag", "-1"], "--pipeline.lag is '-1': it must be a whole number, at least 0"),
        (["--environment.size", "27"], "it must be a whole number, at least 2 and at most 26"),
        (["--learner.beta1", "1"], "it must be a number, at least 0 and below 1"),
        (["--algorithm.on_policy_ratio", "0"], "it must be a number, above 0 and at most 1"),
        (
            ["--learner.learning_rate", "nan"],
            "--learner.learning_rate is 'nan': it must be a number, above 0",
        ),
        (
            ["--learner.learning_rate", "inf"],
            "--learner.learning_rate is 'inf': it must be a number, above 0",
        ),
        (["--algorithm.truncation", "-8"], "--algorithm.truncation is '-8': it must be a number, above 0"),
        (["--warm_start.cache", "maybe"], "--warm_start.cache is 'maybe': it must be true or false"),
        (["--pipeline.mode", "asinc"], "it must be one of async, exact; did you mean async?"),
        (["--pipeline.steps", "x\ny" * 99], "--pipeline.steps is 'x\\ny"),
        (["--pipeline.steps=0", "--pipeline.lag=-1"], "(and 1 more)"),
        (["--model.heads", "3"], "--model.heads: [model] hidden_size / heads must be an even whole number"),
        # shape of the list
        (["--pipeline.steps"], "--pipeline.steps needs a value: a whole number, at least 1"),
        (["--pipeline.steps", "--pipeline.lag"], "--pipeline.steps needs a value"),
        (["maze"], "unexpected argument 'maze': settings are written --section.field value"),
        (["--run.name", "a", "b"], "unexpected argument 'b'"),
        (["--"], "unknown option --;"),
    ],
)
def test_overrides(overrides: list[str], expected: str) -> None:
    assert expected in message(None, *overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps = 3", "unknown key steps; did you mean pipeline.steps?"),
        ("pipeline = 3", "pipeline must be a section: write [pipeline]"),
        ("[[pipeline]]\nsteps = 3", "pipeline must be a section"),
        ("[pipline]\nsteps = 3", "unknown section [pipline]; did you mean [pipeline]?"),
        ("[qqqq]\nsteps = 3", "unknown section [qqqq]; sections are run, model, lora, warm_start,"),
        ("[pipeline]\nstep = 3", "unknown key pipeline.step; did you mean pipeline.steps?"),
        ("[pipeline.steps]\nx = 3", "pipeline.steps is {'x': 3}: it must be a whole number, at least 1"),
        ("[pipeline]\nsteps = '3'", "pipeline.steps is '3': it must be a whole number"),
        ("[pipeline]\nsteps = true", "pipeline.steps is True: it must be a whole number"),
        ("[pipeline]\nsteps = 0", "pipeline.steps is 0: it must be a whole number, at least 1"),
        ("[warm_start]\ncache = 'true'", "warm_start.cache is 'true': it must be true or false"),
        ("[learner]\nlearning_rate = nan", "learner.learning_rate is nan: it must be a number, above 0"),
        ("[learner]\nlearning_rate = -inf", "learner.learning_rate is -inf: it must be a number, above 0"),
        ("[run]\nfolder = []", "run.folder is []: it must be text"),
        ("[algorithm]\nbaseline = 'optimum'", "did you mean optimal?"),
        ("[model]\nheads = 3", "[model] hidden_size / heads must be an even whole number"),
        ("[pipeline]\n\nsteps =", "broken TOML: Invalid value (at line 3, the end of the file)"),
        (
            "[pipeline]\nsteps = 3\nlag 4",
            "broken TOML: Expected '=' after a key in a key/value pair (at line 3,",
        ),
    ],
)
def test_recipes(recipe: Path, text: str, expected: str) -> None:
    recipe.write_text(text)
    found = message(recipe)
    assert expected in found
    assert found.startswith(f"{recipe}: ")


def test_not_text(recipe: Path) -> None:
    recipe.write_bytes(b"[run]\nname = '\xff'")
    assert message(recipe) == f"{recipe} is not UTF-8 text: a recipe is a TOML file"


def test_missing_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    assert message("maize") == "no recipe 'maize'; did you mean maze?"
    assert message("recipes/sorted.toml") == "no recipe 'recipes/sorted.toml'; did you mean sort?"
    names = "collect, countdown, countdown-large, gsm8k, jet-rl, jsonl, math, maze, qerl, sort"
    assert message("qq") == f"no recipe 'qq'; recipes that come with vcpo: {names}"
    recipe.write_text("")
    assert (
        message(recipe.with_name("mind.toml"))
        == f"no recipe '{recipe.parent}/mind.toml'; did you mean {recipe}?"
    )
    assert "no recipe" in message(recipe.parent)


def test_a_recipe_in_another_folder_is_not_mistaken_for_a_shipped_one(tmp_path: Path) -> None:
    assert "no recipe" in message(tmp_path / "maze.toml")


def test_where_a_recipe_is_found(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    shipped = find_recipe("maze")
    assert shipped.is_absolute()
    assert find_recipe("maze.toml") == find_recipe("recipes/maze.toml") == find_recipe(shipped) == shipped
    Path("maze.toml").write_text("[pipeline]\nsteps = 7")
    assert load_config("maze.toml").pipeline.steps == 7
    assert load_config("maze").pipeline.steps == 600


def test_overrides_win_over_the_recipe_and_the_last_one_wins(recipe: Path) -> None:
    recipe.write_text("[pipeline]\nsteps = 7\nlag = 3\n[algorithm]\ntruncation = 8")
    overrides = [
        "--pipeline.steps",
        "1",
        "--pipeline.steps=2",
        "--algorithm.truncation=",
        "--run.name",
        "-x=1",
    ]
    config = load_config(recipe, overrides)
    assert (config.pipeline.steps, config.pipeline.lag) == (2, 3)
    assert config.algorithm.truncation is None
    assert config.run.name == "-x=1"


def test_fields_that_only_fit_together_are_changed_together() -> None:
    """Neither half of this would be right alone: 64 / 5 is not whole, and 70 / 4 neither."""
    model = load_config(None, ["--model.heads", "5", "--model.hidden_size", "70"]).model
    assert (model.heads, model.hidden_size) == (5, 70)


def test_lists_are_written_with_commas() -> None:
    """No setting is a list yet: this is the rule for those that come."""

    class Listing(Section):
        sizes: tuple[int, ...] = ()
        """Some numbers."""

    (setting,) = settings_of("listing", Listing)
    assert setting.allowed == "a list, with commas between its values"
    assert Listing.model_validate({"sizes": from_text(setting, "1,2,3")}).sizes == (1, 2, 3)


def test_applying_nothing_changes_nothing() -> None:
    config = load_config("sort")
    assert apply_overrides(config, []) == config
