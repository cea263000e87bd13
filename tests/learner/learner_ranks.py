"""What each of two processes does in the tests of learners of several ranks.

Both ranks run all cases in one go, since starting a process costs more than they do. Rank 0 writes what it
found; the tests compare it with one process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from learner_cases import policy_of, random_groups, tiny_model
from torch import Tensor, nn

from vcpo.algorithms.catalog import ALGORITHMS, get_algorithm
from vcpo.config import AlgorithmConfig, LearnerConfig, LoraConfig
from vcpo.learner.checkpoint import load_checkpoint, save_checkpoint
from vcpo.learner.learner import Learner
from vcpo.learner.ranks import ALONE, Ranks, join, leave
from vcpo.learner.sharding import whole_tensors
from vcpo.policy.lora import with_adapters
from vcpo.trajectory import Group
from vcpo.weights import weight_tensors

torch.set_num_threads(1)

RANKS = 2
STEPS = 2
"""Two, so that the first one's moments are in the second."""
SIZES = {"ragged": (3, 2, 4), "one group": (7,), "one trajectory": (1,), "many": (2, 2, 2, 2, 2),
         "four groups": (4, 4, 4, 4)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    algorithm: str = "vcpo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    groups: str = "ragged"
    token_budget: int = 10_000
    model: str = "llama"
    precision: torch.dtype = torch.float64
    lora: bool = False
    clip: float = 1e9
    packed: bool = True

    def steps(self) -> list[list[Group]]:
        return [random_groups(seed, SIZES[self.groups], staleness=0.6) for seed in range(STEPS)]


CASES: dict[str, Case] = {name: Case(name) for name in ALGORITHMS} | {
    "one group, on both ranks": Case(groups="one group"),
    "one group, small budget": Case(groups="one group", token_budget=24),
    "one group, tapered": Case("vcpo-taper", groups="one group", token_budget=24),
    "one group, critic": Case("ppo", groups="one group", token_budget=24),
    "one group, entropies": Case("stapo", groups="one group"),
    "one trajectory": Case(groups="one trajectory"),
    "one trajectory, no norms": Case("vcpo-taper", groups="one trajectory"),
    "many groups, micro-batches": Case(groups="many", token_budget=30),
    "a token budget of one": Case(token_budget=1),
    "whole minibatch, micro-batches": Case("m2po", token_budget=20),
    "tied": Case(model="qwen2-tied"),
    "tied, micro-batches": Case(model="qwen2-tied", token_budget=20),
    "lora": Case(lora=True),
    "clipped": Case(clip=1e-3),
    "ESS of the weights used": Case(settings={"ess_weights": "used", "step_scale": "linear"}),
    "ESS of token weights": Case("cispo", settings={"ess_weights": "used", "step_scale": "sqrt"}),
    "bfloat16": Case(precision=torch.bfloat16),
    "bfloat16, lora": Case(precision=torch.bfloat16, lora=True),
    "bfloat16, critic": Case("ppo", precision=torch.bfloat16),
    "float32": Case(precision=torch.float32),
}

CUTS = {
    (micro_batches, "packed" if packed else "padded"): Case(
        "vcpo", groups="four groups", token_budget=budget, packed=packed
    )
    for packed in (True, False)
    for micro_batches, budget in (("1 micro-batch", 10_000), ("4 micro-batches", 60))
}
"""One batch, cut in every way."""
CASES |= {", ".join(cut): case for cut, case in CUTS.items()}


@dataclass
class Outcome:
    metrics: list[dict[str, Any]]
    weights: dict[str, Tensor]


@dataclass
class Found:
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    other_rank: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Metrics of rank 1."""
    errors: dict[str, str] = field(default_factory=dict)


def learner_of(case: Case, ranks: Ranks = ALONE) -> Learner:
    model: Any = nn.Module.to(tiny_model(case.model), case.precision)
    policy = policy_of(model)
    if case.lora:
        policy = with_adapters(policy, LoraConfig(rank=2), seed=0)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide mistakes in A's gradient
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    algorithm = get_algorithm(case.algorithm).with_overrides(AlgorithmConfig.model_validate(case.settings))
    # The rule of SGD would show a wrong scale at once; AdamW's first step hides it, its second does not.
    settings = {
        "learning_rate": 0.003, "max_grad_norm": case.clip, "token_budget": case.token_budget,
        "score_norms": "exact",
    }  # fmt: skip
    learner = Learner(policy, algorithm, LearnerConfig.model_validate(settings), ranks=ranks)
    learner._accumulator._packed = case.packed
    return learner


def outcome_of(case: Case, ranks: Ranks = ALONE) -> Outcome:
    learner = learner_of(case, ranks)
    metrics = [learner.step(groups) for groups in case.steps()]
    return Outcome(metrics, weights_of(learner))


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return copy.deepcopy(whole_tensors(weight_tensors(learner.policy.model), learner.ranks))


def checkpointed(name: str, folder: Path, ranks: Ranks) -> Outcome:
    """One step, a checkpoint, and one more step."""
    case = CASES[name]
    learner, (first, second) = learner_of(case, ranks), case.steps()
    learner.step(first)
    save_checkpoint(folder, learner, {"position": {"anchor": 3}})
    return Outcome([learner.step(second)], weights_of(learner))


def resumed(name: str, checkpoint: Path, ranks: Ranks) -> Outcome:
    """A new learner that goes on where the checkpoint is."""
    learner = learner_of(CASES[name], ranks)
    state = load_checkpoint(checkpoint, learner)
    assert state["position"] == {"anchor": 3}
    return Outcome([learner.step(CASES[name].steps()[1])], weights_of(learner))


CHECKPOINTED = ("vcpo", "ppo", "lora", "bfloat16", "tied")


def work(rank: int, folder: str) -> None:
    """All of one rank. ``folder`` has checkpoints of one rank in ``alone``."""
    ranks = join(rank, RANKS, f"file://{folder}/rendezvous", "cpu", timeout=60.0)
    found = Found()
    for name, case in CASES.items():
        try:
            found.outcomes[name] = outcome_of(case, ranks)
        except Exception as error:
            raise RuntimeError(f"rank {rank}, case {name!r}") from error
    for name in CHECKPOINTED:
        run = Path(folder) / "ranks" / name
        found.outcomes[f"{name}, went on"] = checkpointed(name, run, ranks)
        found.outcomes[f"{name}, resumed"] = resumed(name, run / "checkpoints/step-000001", ranks)
        alone = Path(folder) / "alone" / name / "checkpoints/step-000001"
        found.outcomes[f"{name}, resumed from one"] = resumed(name, alone, ranks)
    torch.save(found, Path(folder) / f"found-{rank}")
    leave()
