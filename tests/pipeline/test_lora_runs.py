"""Whole runs with adapters: warm start, training, publication, merged export, evaluation, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vcpo.config import Config, load_config
from vcpo.errors import ConfigError, ModelError
from vcpo.learner.checkpoint import latest_checkpoint
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.plan import plan_text
from vcpo.runtime import evaluate, train

torch.set_num_threads(1)

TINY = {
    "lora.rank": 4,
    "model.hidden_size": 32,
    "model.layers": 1,
    "model.heads": 2,
    "model.intermediate_size": 32,
    "warm_start.steps": 30,
    "environment.kind": "maze",
    "learner.learning_rate": 0.01,
    "pipeline.prompts": 2,
    "pipeline.group_size": 4,
    "pipeline.steps": 4,
    "evaluation.every": 0,
    "evaluation.final_problems": 16,
}
EXACT = {"pipeline__mode": "exact", "pipeline__lag": 0}
TARGETS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def config_of(folder: Path, name: str, **changes: Any) -> Config:
    settings = TINY | {"run.folder": folder, "run.name": name}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


def run(folder: Path, name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    summary = train(config_of(folder, name, **changes))
    assert summary["completed"] is True
    return folder / name, summary


@torch.no_grad()
def log_probs(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("mode", ["exact", "async"])
def test_a_run_trains_adapters_and_ends_in_a_plain_model(mode: str, tmp_path: Path) -> None:
    path, summary = run(tmp_path, "run", pipeline__mode=mode)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    first = read_metrics(path)[0]
    assert first["lag_max"] == 0
    assert first["ess_ratio"] > 0.9999  # the sampler began with the learner's adapters

    initial, final = (load_file(path / name / "model.safetensors") for name in ("initial_model", "model"))
    changed = {name for name, tensor in final.items() if not torch.equal(tensor, initial[name])}
    assert changed == {f"model.layers.0.{target}.weight" for target in TARGETS}

    checkpoint = latest_checkpoint(path)
    assert checkpoint is not None
    weights = load_file(checkpoint / "weights.safetensors")
    assert {name.rpartition(".lora_")[0] for name in weights} == {f"model.layers.0.{t}" for t in TARGETS}

    base = AutoModelForCausalLM.from_pretrained(path / "initial_model")
    plain = AutoModelForCausalLM.from_pretrained(path / "model")
    expected = log_probs(plain)
    assert float((log_probs(base) - expected).abs().max()) > 1e-3
    peft = PeftModel.from_pretrained(base, str(path / "adapter"))
    torch.testing.assert_close(log_probs(peft), expected, rtol=0, atol=1e-5)

    found = evaluate(path)
    (path / "model").rename(path / "elsewhere")
    from_checkpoint = evaluate(path)
    assert found["greedy_accuracy"] == from_checkpoint["greedy_accuracy"] == summary["greedy_accuracy_after"]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    straight, _ = run(tmp_path, "straight", **EXACT, pipeline__steps=4)
    halted, _ = run(tmp_path, "halted", **EXACT, pipeline__steps=2)
    longer = config_of(tmp_path, "halted", **EXACT, pipeline__steps=4)
    assert train(longer, resume=halted)["completed"] is True
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (straight / file).read_bytes() == (halted / file).read_bytes()
    with pytest.raises(ConfigError, match=r"leave the \[lora\] settings"):
        train(config_of(tmp_path, "halted", pipeline__steps=8, lora__rank=2), resume=halted)


def test_a_model_in_bfloat16_with_checkpointing_trains(tmp_path: Path) -> None:
    changes = {"model__dtype": "bfloat16", "model__activation_checkpointing": "true"}
    path, _ = run(tmp_path, "run", pipeline__mode="exact", pipeline__steps=2, **changes)
    kept = load_file(path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    assert any(float(t.abs().max()) > 0 for name, t in kept.items() if ".lora_B." in name)


def test_a_target_that_matches_nothing_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ends in 'q_porj'; the nearest are q_proj"):
        run(tmp_path, "run", pipeline__mode="exact", lora__targets="q_porj")


def row(text: str, name: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(name)]
    return found.removeprefix(name).strip()


def test_the_plan_counts_what_is_trained_by_hand(tmp_path: Path) -> None:
    """Rank 4 of q, k, v, o (32 + 32 each) and three of the MLP (32 + 32): 4 · 7 · 64 = 1792 parameters, of
    4 bytes each when published and of 16 with gradient and two moments."""
    text = plan_text(config_of(tmp_path, "run"))
    parameters = int(row(text, "model").split(" parameters")[0].rpartition(" ")[2].replace(",", ""))
    assert "trained: 1,792 of adapters of rank 4, float32" in row(text, "model")
    assert row(text, "publication") == "7.17 kB a step, the adapters alone"
    assert row(text, "learner memory").startswith(f"{(4 * parameters + 16 * 1792) / 1000:.3g} kB")

    half = plan_text(
        config_of(tmp_path, "run", model__dtype="bfloat16", model__activation_checkpointing="true")
    )
    assert row(half, "learner memory").startswith(f"{(2 * parameters + 16 * 1792) / 1000:.3g} kB")
    assert "one layer's at a time (activation checkpointing)" in row(half, "learner memory")

    whole = plan_text(config_of(tmp_path, "run", lora__rank=0))
    assert "trained" not in row(whole, "model")
    assert row(whole, "publication") == f"{4 * parameters / 1000:.3g} kB a step"
    assert row(whole, "learner memory").startswith(f"{16 * parameters / 1000:.3g} kB")


def test_a_plan_needs_no_network_but_a_folder_that_is_there(tmp_path: Path) -> None:
    """Two prompts of four rollouts of at most 99 tokens; nothing is known of the model."""
    changes = {"model__name": "no-such-people/no-such-model", "model__context_length": 99}
    text = plan_text(config_of(tmp_path, "run", **changes))
    assert "out of its reach now" in row(text, "model")
    assert row(text, "a step").endswith("at most 792 tokens")
    assert "memory  " not in text
    with pytest.raises(ModelError, match="there is no such folder"):
        plan_text(config_of(tmp_path, "run", model__name=str(tmp_path / "nothing")))
