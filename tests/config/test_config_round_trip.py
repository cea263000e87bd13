"""Every valid config survives being written and read, and every recipe says what it seems to say."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcpo.config import Config, ModelConfig, dump_toml, load_config, recipe_names
from vcpo.config.settings import SETTINGS, Setting

# Text that a UTF-8 file can hold: everything but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def value_of(setting: Setting) -> st.SearchStrategy[Any]:
    """Any value that the setting's own range allows."""
    schema = setting.schema
    if setting.choices:
        values: st.SearchStrategy[Any] = st.sampled_from(setting.choices)
    elif schema["type"] == "boolean":
        values = st.booleans()
    elif schema["type"] == "integer":
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        values = st.integers(low, schema.get("maximum", 10**12))
    elif schema["type"] == "number":
        values = st.floats(
            min_value=schema.get("minimum", schema.get("exclusiveMinimum")),
            max_value=schema.get("maximum", schema.get("exclusiveMaximum", 1e300)),
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
        )
    elif schema["type"] == "array":
        values = st.lists(TEXT.map(lambda text: text.replace(",", "") or "a"), max_size=3)
    else:
        values = (
            TEXT.map(lambda text: Path(text.replace("\0", ""))) if schema.get("format") == "path" else TEXT
        )
    if setting.words:
        values |= st.sampled_from(setting.words)
    return st.none() | values if setting.may_be_unset else values


def without_contradictions(data: dict[str, dict[str, Any]]) -> None:
    """Take out fields that only mean something beside others."""
    sampler, environment = data.get("sampler", {}), data.get("environment", {})
    for name in ("urls", "python", "devices", "options"):
        if sampler.get("kind") != "vllm" or (sampler.get("urls") and name != "urls"):
            sampler.pop(name, None)
    if sampler.get("urls"):
        sampler.pop("servers", None)
    if sampler.get("devices"):
        sampler["servers"] = len(sampler["devices"])
    wanted = {"path": "held_out_path", "dataset": "dataset_config split held_out_split"}
    if environment.get("path"):
        environment.pop("dataset", None)
    for source, names in wanted.items():
        for name in names.split():
            if not environment.get(source):
                environment.pop(name, None)
    if environment.get("split", "train") == environment.get("held_out_split"):
        environment.pop("held_out_split")


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Random values for a random choice of fields, in range; the small model's width fits its heads."""
    chosen = draw(st.lists(st.sampled_from(list(SETTINGS)), unique=True, max_size=20))
    data: dict[str, dict[str, Any]] = {}
    for dotted in chosen:
        setting = SETTINGS[dotted]
        data.setdefault(setting.section, {})[setting.name] = draw(value_of(setting))
    heads = draw(st.integers(1, 32))
    data.setdefault("model", {}).update(heads=heads, hidden_size=2 * heads * draw(st.integers(1, 64)))
    without_contradictions(data)
    return Config.model_validate(data)


@given(configs(), st.booleans())
def test_written_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, config: Config, explain: bool
) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(dump_toml(config, explain=explain), encoding="utf-8", newline="")
    assert load_config(path) == config


@given(configs())
def test_every_field_is_an_override(config: Config) -> None:
    overrides = []
    for dotted, setting in SETTINGS.items():
        value = getattr(getattr(config, setting.section), setting.name)
        text = ",".join(value) if isinstance(value, list) else "" if value is None else str(value)
        overrides.append(f"--{dotted}={text}")
    assert load_config(None, overrides) == config


def test_a_dump_has_every_field_and_marks_the_unset_ones() -> None:
    config = load_config("sort", ["--algorithm.truncation", "8", "--run.name", 'a "b"\\\x7f\n'])
    text = dump_toml(config)
    data = tomllib.loads(text)
    assert data["algorithm"]["truncation"] == 8.0
    assert data["run"] == {"name": 'a "b"\\\x7f\n', "folder": "runs", "seed": 0}
    written = {f"{section}.{name}" for section, values in data.items() for name in values}
    of_algorithm = "level clip_low clip_high baseline margin normalise aggregation constant_length step_scale"
    unset = {f"algorithm.{name}" for name in [*of_algorithm.split(), "ess_weights"]}
    unset |= {"sampler.probe_tolerance", "learner.critic_learning_rate", "pipeline.dynamic_sampling"}
    unset |= {"runtime.sampler_gpus", "runtime.rank_gpus"}
    assert set(SETTINGS) - written == unset
    assert all(f"# {name.partition('.')[2]} is unset" in text for name in unset)


def test_every_field_has_a_sentence() -> None:
    assert not [dotted for dotted, setting in SETTINGS.items() if not setting.sentence.endswith(".")]


def test_recipes_that_come_with_vcpo() -> None:
    shipped = "collect countdown countdown-large gsm8k jet-rl jsonl math maze qerl sort"
    assert " ".join(recipe_names()) == shipped
    assert load_config("maze") == Config(model=ModelConfig(context_length=32))
    sort, countdown = load_config("sort"), load_config("countdown")
    assert (sort.environment.kind, sort.environment.size, sort.learner.learning_rate) == ("sort", 12, 2e-4)
    assert (countdown.environment.kind, countdown.environment.size) == ("countdown", 3)
    assert countdown.learner.learning_rate == 1.5e-4
    for config in (sort, countdown):
        pipeline = config.pipeline
        assert (pipeline.prompts, pipeline.group_size, pipeline.steps) == (8, 8, 400)
        assert config.model.context_length == 32


def test_countdowns_model_has_about_339_thousand_parameters() -> None:
    """Embedding, untied head, norm; per layer four projections, three matrices of the MLP, two norms."""
    model = load_config("countdown").model
    width, mlp, vocabulary = model.hidden_size, model.intermediate_size, len("0123456789+-*/() =:") + 2
    layer = 4 * width**2 + 3 * width * mlp + 2 * width
    assert math.isclose(2 * vocabulary * width + model.layers * layer + width, 339_000, rel_tol=0.02)
