"""The teacher: states against one prompt at a time, what it learns, and its way through a checkpoint."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from learner_cases import gradients, policy_of, tiny_model
from torch import Tensor

from vcpo.errors import CheckpointError
from vcpo.learner.teacher import Teacher

torch.set_num_threads(1)

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1], [2], [10, 3, 3, 5]]


def teacher_of(*, replay: int = 64, budget: int = 1000) -> Teacher:
    return Teacher(policy_of(tiny_model().float()), replay=replay, token_budget=budget)


@pytest.mark.parametrize("budget", [1000, 15, 1])
def test_states_are_means_of_the_last_hidden_states(budget: int) -> None:
    model = tiny_model().float()
    expected = []
    for prompt in PROMPTS:
        output = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        expected.append(output.hidden_states[-1][0].mean(0).detach())
    teacher = Teacher(policy_of(model), replay=4, token_budget=budget)
    torch.testing.assert_close(teacher.states(PROMPTS), torch.stack(expected), rtol=1e-5, atol=1e-5)
    teacher.learn(teacher.states(PROMPTS), [0.5] * 4)
    assert gradients(model) == {}, "the policy is not taught"


def test_it_learns_the_deviation_of_the_rewards_of_like_prompts() -> None:
    """Prompts of tokens below 5 are solved half of the time, the others nearly never or always."""
    teacher, rng = teacher_of(), np.random.default_rng(0)

    def batch() -> tuple[Tensor, list[float]]:
        low = rng.random(8) < 0.5
        prompts = [rng.integers(1, 5, 4) if is_low else rng.integers(6, 11, 4) for is_low in low]
        return teacher.states([p.tolist() for p in prompts]), [0.5 if is_low else 1.0 for is_low in low]

    first = teacher.learn(*batch())
    for _ in range(12):
        last = teacher.learn(*batch())
    assert first["teacher_error"] == pytest.approx(0.25), "a quarter from both 0 and a half"
    assert last["teacher_error"] < 0.1
    states, means = batch()
    expected = np.sqrt([p * (1 - p) for p in means])
    np.testing.assert_allclose(teacher.predict(states), expected, atol=0.2)


def test_only_the_newest_groups_are_replayed() -> None:
    teacher = teacher_of(replay=3)
    states = teacher.states(PROMPTS)
    teacher.learn(states[:2], [0.5, 7.0])  # graded rewards beyond 1 count as 1
    teacher.learn(states[2:], [0.2, -1.0])
    kept = teacher.state()
    torch.testing.assert_close(kept["targets"], torch.tensor([0.0, 0.4, 0.0]))
    torch.testing.assert_close(kept["states"], states[1:])


def test_a_restored_teacher_goes_on_to_the_bit() -> None:
    straight, restored = teacher_of(), teacher_of()
    states = straight.states(PROMPTS)
    straight.learn(states, [0.5, 1.0, 0.0, 0.25])
    restored.load_state(copy.deepcopy(straight.state()))
    for teacher in (straight, restored):
        teacher.learn(states[:2], [0.4, 0.9])
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, restored.state()[name]), name


def test_the_state_of_another_policys_teacher_is_refused() -> None:
    other = Teacher(policy_of(tiny_model(hidden_size=8)), replay=4, token_budget=100)
    with pytest.raises(CheckpointError, match="of another policy"):
        teacher_of().load_state(other.state())
