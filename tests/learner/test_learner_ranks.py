"""Two ranks (FSDP2 over gloo) take the steps of one; checkpoints go from any number of ranks to any other."""

from __future__ import annotations

import time
from pathlib import Path

import learner_ranks
import pytest
import torch
import torch.multiprocessing as mp
from learner_cases import random_groups
from learner_ranks import (
    CASES,
    CHECKPOINTED,
    CUTS,
    RANKS,
    Case,
    Found,
    Outcome,
    checkpointed,
    learner_of,
    outcome_of,
    resumed,
)
from torch.multiprocessing.spawn import start_processes

from vcpo.learner.across_ranks import RanksAccumulator, deal
from vcpo.learner.minibatch import Minibatch
from vcpo.learner.ranks import ALONE, Ranks

torch.set_num_threads(1)

DEADLINE = 400.0
"""Seconds until both ranks are ended, should they hang."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Found]:
    """What each rank found; a rank's error is raised with its traceback."""
    for name in CHECKPOINTED:
        checkpointed(name, folder / "alone" / name, ALONE)
    mp.get_context("forkserver").set_forkserver_preload(["learner_ranks"])
    ranks = start_processes(
        learner_ranks.work, (str(folder),), nprocs=RANKS, join=False, start_method="forkserver"
    )
    assert ranks is not None
    end = time.monotonic() + DEADLINE
    try:
        while not ranks.join(timeout=1.0):
            if time.monotonic() > end:
                pytest.fail(f"the ranks were not done after {DEADLINE:.0f} seconds")
    finally:
        for process in filter(None, ranks.processes):
            process.kill()
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in range(RANKS)]


def minibatch_of(case: Case) -> Minibatch:
    return Minibatch.of(case.steps()[0], learner_of(case).algorithm)


def difference(found: Outcome, expected: Outcome) -> float:
    """The largest, of all weights."""
    assert found.weights.keys() == expected.weights.keys()
    return max(
        float((weight.double() - expected.weights[name].double()).abs().max())
        for name, weight in found.weights.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_steps_of_one(name: str, found: list[Found]) -> None:
    case, ours = CASES[name], found[0].outcomes[name]
    alone = outcome_of(case)
    # AdamW's first steps are of the learning rate's size, 3e-3, wherever a gradient is not 0.
    bound = 2e-2 if case.precision == torch.bfloat16 else 1e-5
    assert difference(ours, alone) < bound
    for own, expected in zip(ours.metrics, alone.metrics, strict=True):
        assert own.keys() == expected.keys()
        for key, value in expected.items():
            if key != "seconds_training":
                tolerance = 0.05 if case.precision == torch.bfloat16 else 2e-5
                assert own[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


def test_one_batch_through_ranks_micro_batches_packed_and_padded(found: list[Found]) -> None:
    """The table of maximal differences of weights, after two steps, from one rank with all in one pass."""
    reference, lines = outcome_of(CASES["1 micro-batch, packed"]), []
    for cut, case in CUTS.items():
        alone, both = outcome_of(case), found[0].outcomes[", ".join(cut)]
        assert learner_of(case)._accumulator.units(minibatch_of(case)).__len__() == (
            1 if cut[0][0] == "1" else 4
        )
        for ranks, outcome in (("1 rank", alone), ("2 ranks", both)):
            lines.append((ranks, *cut, difference(outcome, reference)))
    table = "\n".join(f"{ranks:8} {batches:16} {rows:8} {value:.1e}" for ranks, batches, rows, value in lines)
    print(table)
    assert all(value < 1e-5 for *_, value in lines), table


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_say_the_same(name: str, found: list[Found]) -> None:
    first, second = (f.outcomes[name].metrics for f in found)
    for one, other in zip(first, second, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds_training"} == {
            k: v for k, v in other.items() if k != "seconds_training"
        }
    assert not found[1].outcomes[name].weights  # gathered on the first rank alone


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_checkpoint_of_two_ranks_goes_on_with_two_and_with_one(
    name: str, found: list[Found], folder: Path
) -> None:
    went_on = found[0].outcomes[f"{name}, went on"]
    assert difference(found[0].outcomes[f"{name}, resumed"], went_on) == 0.0
    alone = resumed(name, folder / "ranks" / name / "checkpoints/step-000001", ALONE)
    assert difference(alone, went_on) < (2e-2 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_checkpoint_of_one_rank_goes_on_with_two(name: str, found: list[Found], tmp_path: Path) -> None:
    went_on = checkpointed(name, tmp_path, ALONE)
    resumed_by_two = found[0].outcomes[f"{name}, resumed from one"]
    assert difference(resumed_by_two, went_on) < (2e-2 if name == "bfloat16" else 1e-5)


def test_work_is_dealt_so_that_the_longest_hand_is_short() -> None:
    assert deal([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]  # 8 and 10
    assert deal([1], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]


@pytest.mark.parametrize(
    ("name", "sizes", "budget", "spread"),
    [
        ("vcpo", (3, 2, 4), 10_000, False),
        ("vcpo", (9,), 10_000, True),  # fewer groups than ranks
        ("vcpo", (6, 2, 4), 40, True),  # a group that fits no micro-batch
        ("m2po", (3, 2, 4), 10_000, True),  # looks at the whole minibatch
        ("vcpo-clip-higher", (3, 2, 4), 10_000, True),  # tokens of a trajectory differ, and norms are needed
    ],
)
def test_every_trajectory_is_measured_once(
    name: str, sizes: tuple[int, ...], budget: int, spread: bool
) -> None:
    learner = learner_of(CASES[name])
    accumulator = RanksAccumulator(
        Ranks(0, 2), learner.policy, learner.algorithm, budget, packed=True, score_norms="exact"
    )
    batch = Minibatch.of(random_groups(0, sizes), learner.algorithm)
    shares = accumulator.shares(batch)
    assert shares.spread == spread
    assert sorted(shares.members(0) + shares.members(1)) == list(range(sum(sizes)))
    assert len(shares.of(0)) == len(shares.of(1)) == shares.rounds
    if not spread:
        assert not {batch.groups[i] for i in shares.members(0)} & {batch.groups[i] for i in shares.members(1)}
