"""What is played and trained on, chosen: whole runs in this process, repeatable and resumed to the byte."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import pytest
import torch
from test_exact_runs import At, Killed, column, config_of, kill, resumed, tiny_run, weights_of

from vcpo.config import Config
from vcpo.pipeline.build import build_learner, build_policy, build_rollout_loop
from vcpo.pipeline.rollout import GroupOrder
from vcpo.policy.loading import Policy
from vcpo.runtime import train
from vcpo.samplers.local import LocalSampler
from vcpo.trajectory import Group
from vcpo.weights import weight_tensors

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
