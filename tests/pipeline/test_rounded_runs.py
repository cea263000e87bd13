"""Runs whose sampler has fewer bits than the learner, or another distribution: what the metrics say of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vcpo.config import Config, load_config
from vcpo.errors import ConfigError, PublicationError
from vcpo.monitor.sinks import read_metrics
from vcpo.pipeline.build import build_learner, build_policy, build_rollout_loop
from vcpo.pipeline.engines import check_engine
from vcpo.pipeline.plan import plan_text
from vcpo.pipeline.rollout import GroupOrder
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.packing import pack
from vcpo.runtime import train
from vcpo.samplers.local import LocalSampler
from vcpo.scores.head import LogProbHead, Question
from vcpo.weights import Probe

torch.set_num_threads(1)

TINY = {
    "model.hidden_size": 32,
    "model.layers": 1,
    "model.heads": 1,
    "model.intermediate_size": 32,
    "warm_start.steps": 30,
    "environment.kind": "maze",
    "learner.learning_rate": 0.01,
    "pipeline.mode": "exact",
    "pipeline.lag": 0,
    "pipeline.prompts": 2,
    "pipeline.group_size": 4,
    "pipeline.steps": 3,
    "evaluation.every": 0,
    "evaluation.final_problems": 4,
}


def config_of(**changes: Any) -> Config:
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


def rows_of(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    summary = train(config_of(run__folder=folder, run__name="run", **changes))
    assert summary["completed"] is True
    return list(read_metrics(folder / "run"))


def test_without_rounding_the_weights_of_a_synchronous_run_are_1(tmp_path: Path) -> None:
    for row in rows_of(tmp_path):
        assert row["lag_max"] == 0
        assert row["ess_ratio"] == pytest.approx(1, abs=1e-11)
        assert row["ratio_variance"] < 1e-12  # float32 noise


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"quantization": "int4"}, 1e-6),
        ({"quantization": "int8"}, 1e-9),
        ({"quantization": "fp8"}, 1e-7),
        ({"dtype": "bfloat16"}, 1e-6),
    ],
)
def test_rounding_alone_spreads_the_weights(changes: dict[str, str], least: float, tmp_path: Path) -> None:
    """At lag 0, in every step: weights are rounded anew each time."""
    for row in rows_of(tmp_path, **{f"sampler__{k}": v for k, v in changes.items()}):
        assert row["lag_max"] == 0
        assert row["ess_ratio"] < 1 - least
        assert row["ratio_variance"] > least


@pytest.mark.parametrize("adapters", [0, 4])
def test_publications_across_processes_are_proven(adapters: int, tmp_path: Path) -> None:
    """The controller compares checksums of rounded weights; the first step is of fresh rollouts."""
    changes = {"sampler__quantization": "int4", "sampler__dtype": "bfloat16", "lora__rank": adapters}
    rows = rows_of(tmp_path, pipeline__mode="async", **changes)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["lag_max"] == 0
    assert rows[0]["ratio_variance"] > 1e-6


def test_a_sampler_that_keeps_old_rounded_weights_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = LocalSampler.update

    async def lazy(
        self: LocalSampler, version: int, weights: Mapping[str, Tensor], probe: Probe | None = None
    ) -> str:
        if version != 2:
            self.kept = await honest(self, version, weights, probe)  # pyright: ignore
        return self.kept  # pyright: ignore

    monkeypatch.setattr(LocalSampler, "update", lazy)
    with pytest.raises(PublicationError, match="2"):
        rows_of(tmp_path, sampler__quantization="int8")


def test_the_learner_has_the_samplers_temperature(tmp_path: Path) -> None:
    for row in rows_of(tmp_path, sampler__temperature=0.6):
        assert row["ess_ratio"] == pytest.approx(1, abs=1e-11)
        assert row["ratio_variance"] < 1e-12  # float32 noise


def test_what_top_k_cuts_is_in_the_weights(tmp_path: Path) -> None:
    """w is the probability of what was kept: the product over the tokens of the two largest probabilities."""
    config = config_of(sampler__top_k=2)
    policy = build_policy(config)
    sampler = LocalSampler(policy.model, policy.context_length, config.sampler)
    loop = build_rollout_loop(config, policy, sampler)
    groups = asyncio.run(loop.play_groups([GroupOrder(i, 0) for i in range(2)]))
    trajectories = [t for group in groups for t in group.trajectories]
    rows = pack(trajectories)
    with torch.no_grad():
        logits = policy.model(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False
        ).logits.double()
    at_tokens = logits[rows.action_rows, rows.action_columns - 1].softmax(-1)
    kept = at_tokens.topk(2).values.sum(-1).log()
    with torch.no_grad():
        learned = sampled_log_probs(policy.model, rows).double()
    recorded = torch.cat([torch.from_numpy(t.log_probs[t.action_mask]) for t in trajectories]).double()
    torch.testing.assert_close(learned - recorded, kept, rtol=0, atol=2e-5)

    log_weights = torch.zeros(rows.count, dtype=torch.float64).index_add_(0, rows.action_owners, kept)
    row = build_learner(config, policy).step(groups)
    assert row["log_weight_mean"] == pytest.approx(float(log_weights.mean()), abs=1e-4)
    assert row["log_weight_max"] == pytest.approx(float(log_weights.max()), abs=1e-4)
    weights = log_weights.exp()
    assert row["ess_ratio"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum() / 8), abs=1e-5)


def test_logits_beyond_the_budget_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    forward = LogProbHead.forward

    def spy(self: LogProbHead, hidden: Tensor, question: Question | None = None) -> Tensor:
        if question is not None:
            asked.append(question.budget)
        return forward(self, hidden, question)

    monkeypatch.setattr(LogProbHead, "forward", spy)
    for budget, expected in ((40, {40}), (2**27, set[int]())):
        config = config_of(learner__logit_budget=budget)
        policy = build_policy(config)
        learner = build_learner(config, policy)
        asked.clear()  # of what the learner tried when it was made
        sampler = LocalSampler(policy.model, policy.context_length, config.sampler)
        loop = build_rollout_loop(config, policy, sampler)
        learner.step(asyncio.run(loop.play_groups([GroupOrder(0, 0)])))
        assert set(asked) == expected


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_formats_that_vllm_cannot_round_to_are_refused_before_anything_starts(quantization: str) -> None:
    config = config_of(sampler__kind="vllm", sampler__quantization=quantization)
    with pytest.raises(ConfigError, match=f"'{quantization}' is not offered for vLLM"):
        check_engine(config)
    check_engine(config_of(sampler__kind="vllm", sampler__quantization="fp8"))


def test_the_plan_counts_the_samplers_own_number_type() -> None:
    texts = [plan_text(config_of(sampler__dtype=dtype)).splitlines() for dtype in ("same", "bfloat16")]
    same, half = (next(line for line in text if line.startswith("sampler memory")).split() for text in texts)
    assert (same[3], half[3]) == ("kB", "kB")
    assert float(half[2]) == pytest.approx(float(same[2]) / 2, rel=0.01)
