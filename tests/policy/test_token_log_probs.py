"""Log-probs from the sampled positions alone, whole or in pieces, for every family, against all logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONTEXT, FAMILIES, SIZES, VOCABULARY, save_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from vcpo.config import ModelConfig
from vcpo.policy.loading import load_policy
from vcpo.policy.log_probs import TokenLogProbs, predicting, sampled_log_probs
from vcpo.policy.packing import PackedRows, pack
from vcpo.scores import ScoreTape, squared_score_norms_oracle
from vcpo.trajectory import Trajectory

torch.set_num_threads(1)


def trajectories(lengths: tuple[int, ...] = (7, 12, 4, 9)) -> list[Trajectory]:
    random = np.random.default_rng(5)
    members = []
    for length in lengths:
        mask = random.random(length) < 0.6
        mask[0], mask[-1] = False, True
        members.append(
            Trajectory(
                tokens=random.integers(3, VOCABULARY, length).astype(np.int32),
                action_mask=mask,
                log_probs=np.zeros(length, np.float32),
                versions=np.where(mask, 0, -1).astype(np.int32),
                reward=0.0,
            )
        )
    return members


def gradients(model: Any, objective: Tensor) -> list[Tensor]:
    model.zero_grad()
    objective.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(model: Any, rows: PackedRows, temperature: float, budget: int) -> None:
    """Log-probs and gradients of a signed sum of them."""
    signs = torch.randn(len(rows.action_rows), generator=torch.Generator().manual_seed(0)).double()
    selecting = TokenLogProbs(model, temperature=temperature, logit_budget=budget)
    found, expected = selecting(rows), sampled_log_probs(model, rows, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    pairs = zip(
        gradients(model, (signs * found).sum()), gradients(model, (signs * expected).sum()), strict=True
    )
    for mine, wanted in pairs:
        # Norm layers compute in float32 whatever the model's type.
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_log_probs_and_score_norms_in_pieces(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(family, tmp_path)
    model = load_policy(str(folder), ModelConfig(context_length=CONTEXT)).model.double()
    members = trajectories()
    rows = pack(members)
    assert_same(model, rows, temperature=0.8, budget=2 * VOCABULARY)
    tape, selecting = ScoreTape(model, method="exact"), TokenLogProbs(model, logit_budget=1)
    with tape:
        log_probs = selecting(rows)
    norms = tape.squared_norms(log_probs.sum(), rows.segments, rows.count, predicting(rows))
    tokens = [torch.from_numpy(t.tokens.astype(np.int64)) for t in members]
    masks = [torch.from_numpy(t.action_mask) for t in members]
    expected = squared_score_norms_oracle(model, tokens, masks, torch.ones(len(members), dtype=torch.float64))
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0.0)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


SCALED: dict[str, Callable[[], PreTrainedConfig]] = {
    "multiplied": lambda: CohereConfig(**SIZES, logit_scale=0.3),
    "divided": lambda: GraniteConfig(**SIZES, logits_scaling=0.4, tie_word_embeddings=False),
}


def random_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("how", SCALED)
def test_logits_that_are_scaled_after_the_head(how: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_same(random_model(SCALED[how]()), pack(trajectories()), temperature=1.3, budget=1)
    assert not caplog.records


class Bent(LlamaForCausalLM):
    """Logits are bent in a way that no config tells."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        found: Any = super().forward(*args, **inputs)
        found.logits = found.logits.sin()
        return found


class Shifted(LlamaForCausalLM):
    """Looks at logits by row and position, so that its head must be shown all."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        found: Any = super().forward(*args, **inputs)
        rows, positions, _ = found.logits.shape
        found.logits = found.logits + found.logits.new_ones(rows, positions, 1)
        return found


class Averaged(LlamaForCausalLM):
    """What it says of a position depends on how many its head saw."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        found: Any = super().forward(*args, **inputs)
        found.logits = found.logits * (found.logits.numel() / 1000)
        return found


ODD = {
    Bent: "changes its logits after the head in a way that its config does not tell",
    Shifted: "cannot show its head a selection of positions",
    Averaged: "gives other log-probs when its head is shown a selection of positions",
}


@pytest.mark.parametrize("kind", ODD)
def test_a_model_that_does_not_fit_gets_right_numbers_and_one_warning(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES)).double().eval()
    assert_same(model, pack(trajectories()), temperature=0.7, budget=1)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"{kind.__name__} {ODD[kind]}")
    assert record.message.endswith(
        "memory for logits grows with tokens × vocabulary (learner.token_budget bounds it)"
    )


def test_trajectories_without_sampled_tokens_alone_and_beside_others() -> None:
    model = random_model(FAMILIES["llama3"]())
    silent = trajectories((6, 5))
    for t in silent:
        t.action_mask[:] = False
    selecting = TokenLogProbs(model, logit_budget=1)
    assert selecting(pack(silent)).shape == (0,)
    rows = pack([*silent, *trajectories()])
    torch.testing.assert_close(selecting(rows), sampled_log_probs(model, rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen2.5"])
@pytest.mark.parametrize("budget", [1, 200, 10**9])
def test_entropy_and_energy_are_those_of_the_distribution(family: str, budget: int, tmp_path: Path) -> None:
    """−Σ π log π and ‖onehot(y) − π‖², from all logits, one token at a time, at temperature 0.7."""
    folder = save_model(family, tmp_path)
    model = load_policy(str(folder), ModelConfig(context_length=CONTEXT)).model.double()
    rows = pack(trajectories())
    asking = TokenLogProbs(model, temperature=0.7, logit_budget=budget)
    log_probs, (entropies, energies) = asking.with_distributions(rows)
    torch.testing.assert_close(log_probs, asking(rows))
    ids = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
    logits = model(**ids, use_cache=False).logits / 0.7
    for n, (row, column) in enumerate(zip(rows.action_rows, rows.action_columns, strict=True)):
        p = logits[row, column - 1].detach().softmax(-1)
        chosen = torch.nn.functional.one_hot(rows.input_ids[row, column], len(p))
        assert float(entropies[n]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-9)
        assert float(energies[n]) == pytest.approx(float((chosen - p).square().sum()), rel=1e-9)
    assert not entropies.requires_grad and log_probs.requires_grad
