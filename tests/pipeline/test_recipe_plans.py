"""The recipes of the paper: their settings, and a plan without network, model and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from vcpo.cli import main
from vcpo.config import load_config
from vcpo.config.recipes import recipe_folder
from vcpo.policy.tokens import character_tokenizer

PAPER = ["gsm8k", "math", "countdown-large"]
SIZES: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "math": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""Shapes of Qwen2-1.5B and Qwen2.5-7B, both of 28 layers."""

FIELDS = {"gsm8k": ("question", "answer", "#### {}"), "math": ("problem", "solution", "\\boxed{{{}}}")}


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(["train", *arguments, "--dry-run"]) == 0
    rows = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {name: text.strip() for name, text in rows}


def test_settings_of_the_paper() -> None:
    """Section by section what the official scripts have, restated."""
    configs = {name: load_config(name) for name in PAPER}
    for config in configs.values():
        learner, sampler, algorithm = config.learner, config.sampler, config.algorithm
        assert (learner.learning_rate, learner.warmup_steps) == (1e-6, 0)
        assert (learner.weight_decay, learner.max_grad_norm) == (0.1, 1.0)
        assert (sampler.kind, sampler.temperature, sampler.top_p, sampler.top_k) == ("vllm", 1.0, 1.0, 0)
        assert (algorithm.name, algorithm.truncation, algorithm.on_policy_ratio) == ("vcpo", 8.0, 1.0)
        assert (config.model.dtype, config.lora.rank) == ("bfloat16", 0)
        assert config.model.context_length > config.environment.max_tokens
    shape = {
        name: (c.model.name, c.pipeline.lag, c.pipeline.prompts, c.pipeline.group_size, c.pipeline.steps)
        for name, c in configs.items()
    }
    assert shape == {
        "gsm8k": ("Qwen/Qwen2-1.5B", 12, 8, 8, 500),
        "math": ("Qwen/Qwen2.5-7B", 10, 32, 16, 500),
        "countdown-large": ("Qwen/Qwen2.5-7B", 10, 32, 16, 400),
    }
    tokens = {name: (c.model.context_length, c.environment.max_tokens) for name, c in configs.items()}
    assert (tokens["gsm8k"], tokens["math"]) == ((4096, 2048), (3072, 2048))


@pytest.mark.parametrize("name", PAPER)
def test_the_header_says_what_is_needed(name: str) -> None:
    header = (recipe_folder() / f"{name}.toml").read_text().split("[model]")[0]
    for line in ("# GPUs, an estimate by arithmetic, not measured: ", "# Data: "):
        assert line in header
    assert f"vcpo train {name}\n" in header


@pytest.mark.parametrize("name", PAPER)
def test_a_plan_without_network_model_and_data(capsys: pytest.CaptureFixture[str], name: str) -> None:
    config = load_config(name)
    rows = plan(capsys, name)
    assert f"hf download {config.model.name} where there is a network" in rows["model"]
    if name == "countdown-large":
        assert "data" not in rows
    else:
        assert rows["data"].startswith(
            f"not looked at: the data set '{config.environment.dataset}' is not on"
        )
        assert f"hf download {config.environment.dataset} --repo-type dataset" in rows["data"]
    pipeline = config.pipeline
    episodes = pipeline.prompts * pipeline.group_size
    assert rows["a step"].startswith(
        f"{pipeline.prompts} prompts × {pipeline.group_size} rollouts = {episodes} episodes"
    )
    assert rows["policy lag"].startswith(f"target {pipeline.lag}, never above {pipeline.lag + 1}")


@pytest.mark.parametrize(("name", "learner", "weights"), [("gsm8k", 24.7, 3.09), ("math", 122, 15.2)])
def test_the_headers_estimates_are_the_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, learner: float, weights: float
) -> None:
    """With the model's config and the data here, weights and optimizer are those of the header."""
    model = tmp_path / "model"
    Qwen2Config(**SIZES[name], num_hidden_layers=28, max_position_embeddings=32_768).save_pretrained(model)
    character_tokenizer("".join(map(chr, range(32, 127))) + "\n").save_pretrained(model)
    prompt, answer, form = FIELDS[name]
    rows = [{prompt: f"What is {i}?", answer: form.format(i)} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:]))
    files = [
        f"--environment.path={tmp_path}/train.jsonl",
        f"--environment.held_out_path={tmp_path}/test.jsonl",
    ]
    shown = plan(capsys, name, f"--model.name={model}", *files)
    assert shown["data"] == f"{tmp_path}/train.jsonl: 30 problems to train on, 10 held out"
    assert shown["learner memory"].startswith(f"{learner} GB for weights, gradients and optimizer")
    assert shown["sampler memory"].startswith(f"{weights} GB for weights")
    header = (recipe_folder() / f"{name}.toml").read_text()
    assert f"two\n#            moments in float32) = {learner:.0f} GB" in header
    assert f"× 2 bytes = {weights:.0f} GB; cache" in header


def test_a_file_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "math", "--dry-run", f"--environment.path={tmp_path}/none.jsonl"]) == 2
    assert "none.jsonl: cannot be read (No such file or directory)" in capsys.readouterr().err
