"""Checkpoints put a learner back to the bit, and say what is wrong when they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vcpo.algorithms.catalog import get_algorithm
from vcpo.config import LearnerConfig
from vcpo.errors import CheckpointError, VcpoError
from vcpo.learner.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vcpo.learner.learner import Learner
from vcpo.policy.loading import Policy
from vcpo.policy.tokens import character_tokenizer
from vcpo.trajectory import Group, Trajectory
from vcpo.weights import checksum, weight_tensors

torch.set_num_threads(1)


def new_learner(seed: int, hidden: int = 16) -> Learner:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=9, hidden_size=hidden, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    policy = Policy(LlamaForCausalLM(config).eval(), character_tokenizer("abcdef"), 32)
    return Learner(policy, get_algorithm("vcpo"), LearnerConfig.model_validate({"learning_rate": 0.01}))


def minibatch(seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    members = tuple(
        Trajectory(
            tokens=rng.integers(0, 9, 7).astype(np.int32),
            action_mask=np.array([False, False, True, True, False, True, True]),
            log_probs=np.full(7, -2.2, np.float32),
            versions=np.zeros(7, np.int32),
            reward=float(i % 2),
        )
        for i in range(4)
    )
    return [Group(0, 0, members)]


def fingerprint(learner: Learner) -> str:
    return checksum(weight_tensors(learner.policy.model))


def test_a_resumed_learner_takes_the_same_steps_to_the_bit(tmp_path: Path) -> None:
    straight, interrupted = new_learner(1), new_learner(1)
    for i in range(3):
        straight.step(minibatch(i))
        interrupted.step(minibatch(i))
    save_checkpoint(tmp_path, interrupted, {"position": {"anchor": 7, "trained": [9]}})
    torch.manual_seed(123)
    expected_noise = torch.rand(1)
    torch.manual_seed(123)
    save_checkpoint(tmp_path, interrupted, {"position": {"anchor": 7, "trained": [9]}})
    resumed = new_learner(2)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    state = load_checkpoint(checkpoint, resumed)
    assert torch.equal(torch.rand(1), expected_noise)
    assert state == {"position": {"anchor": 7, "trained": [9]}, "step": 3}
    assert resumed.version == 3
    for i in range(3, 6):
        straight.step(minibatch(i))
        resumed.step(minibatch(i))
    assert fingerprint(resumed) == fingerprint(straight)


def test_only_the_newest_two_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    learner = new_learner(1)
    assert latest_checkpoint(tmp_path) is None
    for i in range(4):
        learner.step(minibatch(i))
        save_checkpoint(tmp_path, learner, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-000004"


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    learner = new_learner(1)
    learner.step(minibatch(0))
    folder = save_checkpoint(tmp_path, learner, {"position": {}})
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "state.json").read_text()) == {"position": {}, "step": 1}


def test_a_half_written_checkpoint_is_not_a_checkpoint(tmp_path: Path) -> None:
    learner = new_learner(1)
    learner.step(minibatch(0))
    good = save_checkpoint(tmp_path, learner, {})
    (tmp_path / "checkpoints" / ".partial-step-000009").mkdir()
    assert latest_checkpoint(tmp_path) == good


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    learner = new_learner(1)
    learner.step(minibatch(0))
    folder = save_checkpoint(tmp_path, learner, {})
    (folder / name).write_bytes(b"\x00\x01 not what it was")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(folder, new_learner(1))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    learner = new_learner(1)
    learner.step(minibatch(0))
    folder = save_checkpoint(tmp_path, learner, {})
    with pytest.raises(VcpoError, match="another model"):
        load_checkpoint(folder, new_learner(1, hidden=8))
