"""What is played and trained on, chosen: whole runs in this process, repeatable and resumed to the byte."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exact_runs import At, Killed, column, config_of, kill, resumed, tiny_run, weights_of
from torch import Tensor

from vcpo.config import Config
from vcpo.errors import ConfigError, WorkerError
from vcpo.pipeline.build import build_learner, build_policy, build_rollout_loop
from vcpo.pipeline.rollout import GroupOrder
from vcpo.pipeline.services import LearnerService
from vcpo.policy.loading import Policy
from vcpo.runtime import train
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Group, Trajectory
from vcpo.weights import load_weights, weight_tensors

torch.set_num_threads(1)

SIFTED = {"environment.kind": "worlds:Half", "pipeline.dynamic_sampling": True, "pipeline.steps": 8}


# Dynamic sampling


def loop_that_skips(config: Config) -> tuple[dict[str, bytes], list[int]]:
    """DAPO as one would write it down: play what is missing until P groups have a signal, update, and again.
    The weights, and how many groups each step skipped."""
    policy = build_policy(config)
    served = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.context_length)
    learner, prompts, number = build_learner(config, policy), config.pipeline.prompts, 0
    skipped = []

    async def loop() -> None:
        nonlocal number
        sampler = LocalSampler(served.model, served.context_length, config.sampler)
        rollouts = build_rollout_loop(config, served, sampler)
        for step in range(config.pipeline.steps):
            first, groups = number, list[Group]()
            while missing := prompts - len(groups):
                orders = [GroupOrder(n, step) for n in range(number, number + missing)]
                number += missing
                played = await rollouts.play_groups(orders)
                groups += [group for group in played if len(set(group.rewards)) > 1]
            learner.step(groups)
            skipped.append(number - first - prompts)
            await sampler.update(step + 1, weight_tensors(policy.model))
        await sampler.close()

    asyncio.run(loop())
    tensors = policy.model.state_dict()
    return {name: t.numpy().tobytes() for name, t in sorted(tensors.items())}, skipped


def test_dynamic_sampling_at_lag_zero_is_the_plain_loop_to_the_bit(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", SIFTED | {"pipeline.lag": 0})
    assert train(config)["completed"]
    weights, skipped = loop_that_skips(config)
    assert weights_of(tmp_path / "run") == weights
    # What replaces the groups skipped for step t is counted there: before step 1, or after step t - 1.
    counted = column(tmp_path / "run", "skipped_groups")
    assert counted[0] == skipped[0] + skipped[1]
    assert counted[1:] == [*skipped[2:], 0]
    assert sum(skipped) >= 8, "one in two"
    assert column(tmp_path / "run", "equal_groups") == [0] * 8


@pytest.mark.parametrize(("lag", "checkpoint_every", "killed_at"), [(0, 3, 5), (2, 2, 3)])
def test_a_killed_run_with_dynamic_sampling_resumes_to_the_same_bytes(
    tmp_path: Path, lag: int, checkpoint_every: int, killed_at: int
) -> None:
    changes = SIFTED | {"pipeline.lag": lag, "learner.checkpoint_every": checkpoint_every}
    assert train(config_of(tmp_path, "straight", changes))["completed"]
    with pytest.raises(Killed):
        train(config_of(tmp_path, "killed", changes), progress=At(killed_at, kill))
    run, straight = resumed(tmp_path / "killed"), tmp_path / "straight"
    assert weights_of(run) == weights_of(straight)
    assert sum(column(straight, "skipped_tokens")) > 0
    for key in ("reward", "lag_histogram", "loss"):
        assert column(run, key) == column(straight, key), key


def test_a_run_that_gave_up_on_a_signal_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Nothing has a signal: how many were skipped in a row is part of the checkpoint."""
    changes = {"environment__kind": "worlds:Constant", "pipeline__dynamic_sampling": True, "pipeline__lag": 1}
    run = tiny_run(tmp_path, pipeline__steps=2, **changes)
    assert column(run, "skipped_groups") == [20, 0]
    resumed(run, pipeline__steps=4)
    assert column(run, "skipped_groups") == [20, 0, 0, 0]
    assert column(run, "equal_groups") == [1.0] * 4


# Over-provision (APRIL)

BEGUN_BEFORE = {
    "environment.kind": "worlds:Tailed",
    "pipeline.lag": 0,
    "pipeline.over_provision": 3,
    "pipeline.window": 6,
    "pipeline.steps": 9,
}


@dataclass
class Overheard:
    """What a learner was given, and its weights before each step."""

    groups: list[list[Group]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: list[list[tuple[int, float]]] = field(default_factory=list)

    @staticmethod
    def of(monkeypatch: pytest.MonkeyPatch) -> Overheard:
        heard, step = Overheard(), LearnerService.step

        def listening(
            service: LearnerService, records: Sequence[bytes], skipped: Sequence[tuple[int, float]] = ()
        ) -> dict[str, Any]:
            heard.groups.append([Group.from_bytes(record) for record in records])
            heard.weights.append({name: t.clone() for name, t in service.tensors()})
            heard.skipped.append(list(skipped))
            return step(service, records, skipped)

        monkeypatch.setattr(LearnerService, "step", listening)
        return heard

    @property
    def numbers(self) -> list[int]:
        return [group.index for groups in self.groups for group in groups]


def test_unfinished_groups_go_on_under_the_next_weights_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Overheard.of(monkeypatch)
    config = config_of(tmp_path, "run", BEGUN_BEFORE)
    summary = train(config)
    assert sorted(heard.numbers) == list(range(18)), "each once; nothing that is begun is dropped"
    assert heard.numbers != sorted(heard.numbers), "a slow group was passed"
    assert 1 <= summary["lag_max"] <= summary["lag_bound"] == 0 + 1 + (3 + 6 - 2) // 2
    mixed = [
        t
        for groups in heard.groups
        for group in groups
        for t in group.trajectories
        if len(set(t.versions[t.action_mask])) > 1
    ]
    assert len(mixed) >= 4
    model = build_policy(config).model
    for trajectory in mixed:
        versions = trajectory.versions[trajectory.action_mask]
        assert (np.diff(versions) >= 0).all()
        for version in set(versions):
            load_weights(model, heard.weights[version])
            expected = log_probs_of(model, trajectory)[versions == version]
            recorded = trajectory.log_probs[trajectory.action_mask][versions == version]
            np.testing.assert_allclose(recorded, expected, atol=1e-5)


def log_probs_of(model: Any, trajectory: Trajectory) -> np.ndarray:
    """log π of the sampled tokens under one version, in one forward pass."""
    ids = torch.from_numpy(trajectory.tokens.astype(np.int64))
    with torch.no_grad():
        every = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    places = torch.from_numpy(np.flatnonzero(trajectory.action_mask))
    return every[places - 1, ids[places]].numpy()


@pytest.mark.parametrize("lag", [0, 2])
def test_a_run_that_over_provisions_is_the_same_to_the_bit_twice(tmp_path: Path, lag: int) -> None:
    changes = BEGUN_BEFORE | {"pipeline.lag": lag, "learner.mask_off_policy_prefix": True}
    for name in ("once", "again"):
        assert train(config_of(tmp_path, name, changes))["completed"]
    assert weights_of(tmp_path / "once") == weights_of(tmp_path / "again")
    for key in ("reward", "lag_histogram", "loss", "masked_tokens", "token_lag_mean"):
        assert column(tmp_path / "once", key) == column(tmp_path / "again", key), key
    assert sum(column(tmp_path / "once", "masked_tokens")) > 0
    plain = changes | {"pipeline.over_provision": 0}
    assert train(config_of(tmp_path, "plain", plain))["completed"]
    assert sum(column(tmp_path / "plain", "masked_tokens")) == 0


def test_a_killed_run_that_over_provisions_plays_unfinished_groups_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = BEGUN_BEFORE | {"learner.checkpoint_every": 4}
    before = Overheard.of(monkeypatch)
    with pytest.raises(Killed):
        train(config_of(tmp_path, "run", changes), progress=At(5, kill))
    after = Overheard.of(monkeypatch)
    resumed(tmp_path / "run")
    assert sorted(before.numbers[:8] + after.numbers) == list(range(18))


def test_an_error_while_groups_are_left_over_ends_the_run_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = LearnerService.step, []

    def breaking(service: LearnerService, records: Sequence[bytes], skipped: Any) -> dict[str, Any]:
        steps.append(1)
        if len(steps) == 2:
            monkeypatch.setattr(LocalSampler, "_tick", broken)
        return step(service, records, skipped)

    def broken(sampler: LocalSampler) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(LearnerService, "step", breaking)
    with pytest.raises(WorkerError, match="no room"):
        train(config_of(tmp_path, "run", BEGUN_BEFORE))
    assert len(steps) == 2


# Goldilocks

CHOSEN = {
    "environment.kind": "worlds:Half",
    "pipeline.selection": "goldilocks",
    "pipeline.exploration": 0.0,
    "pipeline.replay": 12,
    "pipeline.lag": 0,
    "pipeline.steps": 10,
    "pipeline.group_size": 4,
}


def test_the_teacher_finds_the_problems_with_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four candidates, one for each letter, those with an odd number are always solved."""
    heard = Overheard.of(monkeypatch)
    assert train(config_of(tmp_path, "run", CHOSEN))["completed"]
    groups = [group for groups in heard.groups for group in groups]
    assert [group.problem // 4 for group in groups] == list(range(20)), "each among its own candidates"
    assert [group.problem % 4 for group in groups[:2]] == [0, 0], "all predictions are equal at first"
    assert all(group.problem % 2 == 0 for group in groups[12:]), "each odd letter was tried, and left alone"
    errors, predictions = (column(tmp_path / "run", f"teacher_{key}") for key in ("error", "prediction"))
    assert predictions[0] == 0.25
    # What was predicted first was 1/4 for every prompt.
    spread = [np.sqrt(p * (1 - p)) for g in groups[:2] for p in [np.mean(g.rewards).clip(0, 1)]]
    assert errors[0] == pytest.approx(np.sqrt(np.mean((0.25 - np.array(spread)) ** 2)), rel=1e-4)


def test_a_teacher_hears_of_groups_that_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of odd letters, which it could not learn to avoid from what is trained on."""
    heard = Overheard.of(monkeypatch)
    assert train(config_of(tmp_path, "run", CHOSEN | {"pipeline.dynamic_sampling": True}))["completed"]
    skipped = [outcome for outcomes in heard.skipped for outcome in outcomes]
    assert len(skipped) == sum(column(tmp_path / "run", "skipped_groups")) > 0
    assert {(problem % 2, reward) for problem, reward in skipped} == {(1, 1.0)}
    assert sum(map(len, heard.skipped[4:])) <= 2, "it has learned"


@pytest.mark.parametrize("lag", [0, 2])
def test_a_killed_run_with_a_teacher_resumes_to_the_same_bytes(tmp_path: Path, lag: int) -> None:
    changes = CHOSEN | {
        "pipeline.lag": lag,
        "pipeline.exploration": 0.3,
        "pipeline.dynamic_sampling": True,
        "learner.checkpoint_every": 3,
    }
    assert train(config_of(tmp_path, "straight", changes))["completed"]
    with pytest.raises(Killed):
        train(config_of(tmp_path, "killed", changes), progress=At(8, kill))
    run, straight = resumed(tmp_path / "killed"), tmp_path / "straight"
    assert weights_of(run) == weights_of(straight)
    for key in ("reward", "teacher_error", "teacher_prediction", "skipped_groups"):
        assert column(run, key) == column(straight, key), key
    last = [r / "checkpoints" / "step-000010" / "teacher.safetensors" for r in (run, straight)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_run_is_not_resumed_with_other_candidates(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, pipeline__steps=1)
    changes = {"pipeline.steps": 2, "pipeline.selection": "goldilocks"}
    with pytest.raises(ConfigError, match=r"pipeline\.selection = all, not goldilocks"):
        train(config_of(tmp_path, "run", changes), resume=run)
