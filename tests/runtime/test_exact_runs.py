"""Whole runs in this process: deterministic to the byte, resumed to the byte, defined whatever comes."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vcpo.config import Config, load_config
from vcpo.errors import ConfigError, DataError, EnvironmentFailure, NonFiniteError
from vcpo.learner.checkpoint import latest_checkpoint
from vcpo.monitor.progress import SilentProgress
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.build import build_learner, build_policy, build_rollout_loop
from vcpo.pipeline.rollout import GroupOrder
from vcpo.policy.loading import Policy
from vcpo.runtime import evaluate, train
from vcpo.samplers.local import LocalSampler
from vcpo.weights import weight_tensors

torch.set_num_threads(1)

TINY = {
    "model.hidden_size": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.intermediate_size": 32,
    "model.context_length": 32,
    "warm_start.steps": 0,
    "environment.kind": "worlds:Letters",
    "learner.learning_rate": 0.01,
    "learner.checkpoint_every": 0,
    "pipeline.mode": "exact",
    "pipeline.prompts": 2,
    "pipeline.group_size": 2,
    "pipeline.steps": 6,
    "evaluation.every": 0,
    "evaluation.final_problems": 8,
}


def config_of(folder: Path, name: str, changes: dict[str, Any]) -> Config:
    settings = TINY | {"run.folder": folder, "run.name": name} | changes
    return load_config(None, [f"--{k}={v}" for k, v in settings.items()])


def tiny_run(folder: Path, name: str = "run", /, **changes: Any) -> Path:
    """A finished run; ``changes`` with two underscores for the dot."""
    config = config_of(folder, name, {k.replace("__", "."): v for k, v in changes.items()})
    assert train(config)["completed"] is True
    return folder / name


def weights_of(run: Path) -> dict[str, bytes]:
    """The final model, byte for byte."""
    tensors = load_file(run / "model" / "model.safetensors")
    return {name: t.contiguous().numpy().tobytes() for name, t in sorted(tensors.items())}


def initial_weights_of(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "initial_model" / "model.safetensors")
    return {name: t.contiguous().numpy().tobytes() for name, t in sorted(tensors.items())}


def column(run: Path, key: str) -> list[Any]:
    return [row[key] for row in read_metrics(run)]


def plain_loop(config: Config) -> dict[str, bytes]:
    """Synchronous RL as one would write it down: play, step, update, and again."""
    policy = build_policy(config)
    served = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.context_length)
    learner, prompts = build_learner(config, policy), config.pipeline.prompts

    async def loop() -> None:
        sampler = LocalSampler(served.model, served.context_length, config.sampler)
        rollouts = build_rollout_loop(config, served, sampler)
        for step in range(config.pipeline.steps):
            numbers = range(step * prompts, (step + 1) * prompts)
            learner.step(await rollouts.play_groups(GroupOrder(n, step) for n in numbers))
            await sampler.update(step + 1, weight_tensors(policy.model))
        await sampler.close()

    asyncio.run(loop())
    tensors = policy.model.state_dict()
    return {name: t.numpy().tobytes() for name, t in sorted(tensors.items())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(runs: Path) -> Path:
    """Lag 2, 8 steps, in one go."""
    return tiny_run(runs, "straight", pipeline__lag=2, pipeline__steps=8)


WARM = {"environment.kind": "sort", "warm_start.steps": 3, "pipeline.steps": 2}


@pytest.fixture(scope="module")
def warm(runs: Path) -> Path:
    """A run that begins with a warm start."""
    assert train(config_of(runs, "warm", WARM))["completed"]
    return runs / "warm"


# Bits


@pytest.mark.parametrize("algorithm", ["vcpo", "grpo"])
def test_lag_zero_is_the_plain_loop_to_the_bit(tmp_path: Path, algorithm: str) -> None:
    run = tiny_run(tmp_path, pipeline__lag=0, algorithm__name=algorithm)
    by_hand = plain_loop(config_of(tmp_path, "by-hand", {"pipeline.lag": 0, "algorithm.name": algorithm}))
    assert weights_of(run) == by_hand
    assert weights_of(run) != initial_weights_of(run), "nothing was learned: the comparison says nothing"
    assert column(run, "ess_ratio") == pytest.approx([1.0] * 6, abs=1e-5)


def test_lag_three_twice_is_the_same_to_the_bit_and_exactly_three_old(tmp_path: Path) -> None:
    once, again = (tiny_run(tmp_path, name, pipeline__lag=3) for name in ("once", "again"))
    assert weights_of(once) == weights_of(again)
    for step, histogram in enumerate(column(once, "lag_histogram")):
        assert histogram == {str(min(step, 3)): 2}, f"version {step}"
    assert column(once, "token_lag_mean") == [0, 1, 2, 3, 3, 3]
    timeless = [
        key for key in read_metrics(once)[0] if not key.startswith(("seconds", "elapsed", "tokens_per"))
    ]
    for key in timeless:
        assert column(once, key) == column(again, key), key


def test_the_lag_and_the_seed_matter(runs: Path, straight: Path) -> None:
    """What the tests of equality compare does differ where it should."""
    other_lag = tiny_run(runs, "other-lag", pipeline__lag=1, pipeline__steps=8)
    other_seed = tiny_run(runs, "other-seed", pipeline__lag=2, pipeline__steps=8, run__seed=1)
    assert len({json.dumps(column(r, "reward")) for r in (straight, other_lag, other_seed)}) == 3
    assert initial_weights_of(other_lag) == initial_weights_of(straight) != initial_weights_of(other_seed)


def test_step_scales_of_a_file_take_the_place_of_the_rule(runs: Path, straight: Path) -> None:
    """Those that the rule itself chose repeat the run to the bit; others shorten each step as they say."""
    for name, factors in (("its-own", column(straight, "step_scale")), ("others", [0.5, 0.25] * 4)):
        (runs / f"{name}.json").write_text(json.dumps(factors))
        changes = {"algorithm__step_scales": runs / f"{name}.json", "algorithm__step_scale": "off"}
        tiny_run(runs, name, pipeline__lag=2, pipeline__steps=8, **changes)
    assert min(column(straight, "step_scale")) < 1, "the rule did nothing: the comparison says nothing"
    assert weights_of(runs / "its-own") == weights_of(straight)
    assert column(runs / "others", "step_scale") == [0.5, 0.25] * 4
    assert column(runs / "others", "learning_rate") == pytest.approx([0.005, 0.0025] * 4)


def test_a_warm_started_run_is_deterministic_with_and_without_the_cache(tmp_path: Path, warm: Path) -> None:
    for name, cache in (("cached", "true"), ("uncached", "false")):
        assert train(config_of(tmp_path, name, WARM | {"warm_start.cache": cache}))["completed"]
        assert weights_of(tmp_path / name) == weights_of(warm)


# Resuming


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class At(SilentProgress):
    """Does something when a step has been written down."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._step, self._action = step, action

    def advance(self, figures: Mapping[str, float]) -> None:
        if figures.get("step") == self._step:
            self._action()


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def resumed(run: Path, **changes: Any) -> Path:
    overrides = [f"--{k.replace('__', '.')}={v}" for k, v in changes.items()]
    assert train(load_config(run / "config.toml", overrides), resume=run)["completed"] is True
    return run


@pytest.mark.parametrize(("checkpoint_every", "killed_at"), [(4, 5), (4, 7), (3, 3), (0, 2), (1, 6)])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, straight: Path, checkpoint_every: int, killed_at: int
) -> None:
    """Also before its first checkpoint: then from the beginning, with the groups the journal holds."""
    changes = {"pipeline.lag": 2, "pipeline.steps": 8, "learner.checkpoint_every": checkpoint_every}
    with pytest.raises(Killed):
        train(config_of(tmp_path, "killed", changes), progress=At(killed_at, kill))
    run = resumed(tmp_path / "killed")
    assert weights_of(run) == weights_of(straight)
    assert column(run, "step") == list(range(1, 9))
    for key in ("reward", "lag_histogram", "ess_ratio", "loss", "grad_norm"):
        assert column(run, key) == column(straight, key), key


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, straight: Path) -> None:
    config = config_of(tmp_path, "stopped", {"pipeline.lag": 2, "pipeline.steps": 8})
    summary = train(config, progress=At(2, interrupt))
    run = tmp_path / "stopped"
    assert summary["completed"] is False
    assert 2 <= summary["steps"] < 8
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{summary['steps']:06d}"
    assert not (run / "summary.json").exists()
    assert weights_of(resumed(run)) == weights_of(straight)
    assert column(run, "step") == list(range(1, 9))


class AtPhase(SilentProgress):
    """Does something when a phase begins."""

    def __init__(self, title: str, action: Callable[[], None]) -> None:
        self._title, self._action = title, action

    def phase(self, title: str, total: int | None) -> None:
        if title == self._title:
            self._action()


@pytest.mark.parametrize("phase", ["warm start", "evaluation before", "training", "evaluation after"])
def test_a_run_killed_outside_its_steps_resumes_too(tmp_path: Path, warm: Path, phase: str) -> None:
    """In the warm start there is no model yet, and in the first evaluation no checkpoint."""
    changes = WARM | {"warm_start.cache": "false"}
    with pytest.raises(Killed):
        train(config_of(tmp_path, "run", changes), progress=AtPhase(phase, kill))
    run = resumed(tmp_path / "run")
    assert weights_of(run) == weights_of(warm)
    assert column(run, "step") == [1, 2]


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    """Nothing beyond the end was generated, so that the lag builds up again from 0."""
    run = tiny_run(tmp_path, pipeline__lag=2, pipeline__steps=4)
    resumed(run, pipeline__steps=8)
    assert column(run, "step") == list(range(1, 9))
    expected = [0, 1, 2, 2, 0, 1, 2, 2]
    assert column(run, "lag_histogram") == [{str(lag): 2} for lag in expected]
    assert json.loads((run / "summary.json").read_text())["steps"] == 8


def test_an_interrupt_in_the_first_evaluation_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is longer than the time it is given to end by itself."""
    monkeypatch.setattr("vcpo.runtime.interrupts.STOP_SECONDS", 0.05)

    changes = {"environment.kind": "worlds:Slow", "evaluation.final_problems": 400, "sampler.slots": 1}
    summary = train(config_of(tmp_path, "run", changes), progress=AtPhase("evaluation before", interrupt))
    assert summary == {"completed": False, "steps": 0, "run_folder": str(tmp_path / "run")}


# Evaluation


def test_evaluating_the_run_repeats_the_figures_of_its_end(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    figures = evaluate(straight)
    assert figures["model"] == str(straight / "model")
    for name in ("accuracy", "greedy_accuracy"):
        assert figures[f"{name}_reward"] == summary[f"{name}_after_reward"]
        assert figures[f"{name}_interval"] == summary[f"{name}_after_interval"]


# Defined outcomes


def test_a_policy_of_nan_weights_is_one_line(tmp_path: Path) -> None:
    policy = build_policy(config_of(tmp_path, "unused", {}))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(float("nan"))
    policy.save(tmp_path / "broken-model")
    with pytest.raises(NonFiniteError) as raised:
        tiny_run(tmp_path, model__name=tmp_path / "broken-model")
    assert str(raised.value) == (
        "non-finite logits: policy version 0 is broken; train with a lower learning rate"
    )


@pytest.mark.parametrize("algorithm", ["vcpo", "grpo"])
def test_equal_rewards_change_nothing_and_the_run_goes_on(tmp_path: Path, algorithm: str) -> None:
    run = tiny_run(tmp_path, environment__kind="worlds:Constant", algorithm__name=algorithm, pipeline__lag=1)
    assert column(run, "grad_norm") == [0.0] * 6
    assert column(run, "equal_groups") == [1.0] * 6
    assert weights_of(run) == initial_weights_of(run)


@pytest.mark.parametrize(("world", "actions"), [("Silent", {0}), ("Empty", {4})], ids=lambda p: str(p))
def test_episodes_with_hardly_anything_in_them_are_trained_on(
    tmp_path: Path, world: str, actions: set[int]
) -> None:
    run = tiny_run(tmp_path, environment__kind=f"worlds:{world}")
    assert set(column(run, "action_tokens")) == actions
    assert column(run, "failed_episodes") == [0] * 6
    if world != "Empty":
        assert weights_of(run) == initial_weights_of(run)


def test_an_environment_that_never_works_ends_the_run_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="all of 8 episodes; the first: RuntimeError: nothing works"):
        tiny_run(tmp_path, environment__kind="worlds:Hopeless")


def test_failed_episodes_are_counted_and_cost_nothing_else(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, environment__kind="worlds:Unlucky")
    assert column(run, "failed_episodes") == [2] * 6, "one of the two problems of each step"
    assert json.loads((run / "summary.json").read_text())["failed_episodes"] == 12
    assert all(2 <= tokens <= 14 for tokens in column(run, "action_tokens")), "of the other two episodes"
    assert weights_of(run) != initial_weights_of(run)


def test_a_prompt_longer_than_the_context_is_named_before_anything_is_sampled(tmp_path: Path) -> None:
    lines = [{"prompt": "a" * n, "answer": "b"} for n in (3, 5, 40, 2)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"long\.jsonl, line 3: the prompt takes 40 tokens") as raised:
        tiny_run(tmp_path, environment__kind="jsonl", environment__path=tmp_path / "long.jsonl")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_environment_that_cannot_make_a_problem_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worlds import Letters

    def problem(self: Letters, index: int, split: str) -> Any:
        raise LookupError(f"no {split} problem {index}")

    monkeypatch.setattr(Letters, "problem", problem)
    with pytest.raises(EnvironmentFailure, match="could not make held_out problem 0: LookupError"):
        tiny_run(tmp_path)


# What a resumed run may and may not be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.hidden_size": 32}, "leave the .model. settings"),
        ({"run.seed": 3}, "run.seed = 0, not 3"),
        ({"pipeline.group_size": 4}, "group_size = 2, not 4"),
        ({"environment.kind": "maze"}, "environment.kind = worlds:Letters, not maze"),
        ({"pipeline.steps": 3}, "has taken 6 steps and pipeline.steps is 3"),
        ({}, "has taken 6 steps and pipeline.steps is 6: nothing is left to do"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = tiny_run(tmp_path)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=message):
        train(config_of(tmp_path, "run", changes), resume=run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_every_config_of_a_run_is_kept(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, pipeline__steps=2)
    for steps in (4, 6):
        train(config_of(tmp_path, "run", {"pipeline.steps": steps}), resume=run)
    names = ("config.before-resume-1.toml", "config.before-resume-2.toml", "config.toml")
    assert [load_config(run / name).pipeline.steps for name in names] == [2, 4, 6]


def test_bad_input_leaves_no_folder_that_blocks_the_corrected_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown algorithm"):
        tiny_run(tmp_path, algorithm__name="vcop")
    assert not (tmp_path / "run").exists()
    tiny_run(tmp_path)


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is there already"):
        tiny_run(tmp_path)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_a_cache_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VCPO_CACHE", str(tmp_path / "file"))
    run = tiny_run(tmp_path, environment__kind="maze", warm_start__steps=2, pipeline__steps=1)
    assert (run / "model" / "model.safetensors").exists()


# Where the time went


def test_the_wall_time_of_a_resumed_run_holds_all_of_its_stretches(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, pipeline__steps=3)
    first = read_metrics(run)[-1]["elapsed"]
    train(config_of(tmp_path, "run", {"pipeline.steps": 6}), resume=run)
    second = read_metrics(run)[-1]["elapsed"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["wall_seconds"] >= first + second
    assert summary["seconds_training"] <= summary["wall_seconds"]


def test_in_one_process_the_learner_waits_while_rollouts_are_played(tmp_path: Path) -> None:
    """Training, waiting and publishing are disjoint, and waiting holds all of the sampling."""
    run = tiny_run(tmp_path, pipeline__lag=2)
    rows = read_metrics(run)
    waiting = sum(row["seconds_waiting"] for row in rows)
    sampling = sum(row["seconds_sampling"] for row in rows)
    parts = sum(row[f"seconds_{part}"] for row in rows for part in ("training", "waiting", "publishing"))
    assert 0 < sampling <= waiting
    assert parts <= rows[-1]["elapsed"] * 1.001
