"""The scaled AdamW against AdamW's textbook recursion in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vcpo.config import LearnerConfig
from vcpo.errors import NonFiniteError, VcpoError
from vcpo.learner.optimizer import ScaledAdamW

torch.set_num_threads(1)


def optimizer_on(values: list[float], **settings: float) -> tuple[nn.Parameter, ScaledAdamW]:
    parameter = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return parameter, ScaledAdamW([("p", parameter)], LearnerConfig.model_validate(settings))


def test_scale_changes_the_adam_step_and_leaves_weight_decay_alone() -> None:
    rate, decay, beta1, beta2 = 0.1, 0.5, 0.9, 0.999
    parameter, optimizer = optimizer_on([2.0], learning_rate=rate, weight_decay=decay)
    value, m, v = 2.0, 0.0, 0.0
    for t, (gradient, scale) in enumerate([(1.0, 1.0), (-3.0, 0.25), (0.5, 0.01)], start=1):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        assert optimizer.step(scale) == pytest.approx(rate * scale)
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        value *= 1 - rate * decay
        value -= rate * scale * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + 1e-8)
        assert parameter.item() == pytest.approx(value, rel=1e-12)


def test_warm_up_is_linear_and_multiplies_the_scale() -> None:
    parameter, optimizer = optimizer_on([1.0], learning_rate=0.4, warmup_steps=4)
    rates = []
    for _ in range(6):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        rates.append(optimizer.step(0.5))
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_scale_outside_zero_to_one_takes_no_step(scale: float) -> None:
    parameter, optimizer = optimizer_on([1.0])
    parameter.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(VcpoError, match="step scale"):
        optimizer.step(scale)
    assert parameter.item() == 1.0
    assert optimizer.steps == 0


def test_clip_is_euclidean_over_everything_and_reports_the_norm_before() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    optimizer = ScaledAdamW([("a", a), ("b", b)], LearnerConfig.model_validate({"max_grad_norm": 1.3}))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0, 12.0])
    assert optimizer.clip() == pytest.approx(13.0)
    assert torch.cat([a.grad, b.grad]).tolist() == pytest.approx([0.3, 0.4, 1.2], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(bad: float) -> None:
    parameter, optimizer = optimizer_on([1.0])
    parameter.grad = torch.tensor([bad], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        optimizer.clip()


def test_state_goes_on_exactly_where_it_stopped() -> None:
    straight, first = optimizer_on([1.0, -2.0], learning_rate=0.05, warmup_steps=5)
    broken, second = optimizer_on([1.0, -2.0], learning_rate=0.05, warmup_steps=5)
    gradients = [
        torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(6)
    ]
    for i, gradient in enumerate(gradients):
        straight.grad, broken.grad = gradient.clone(), gradient.clone()
        first.step(0.7)
        if i == 3:
            state, steps = {k: v.clone() for k, v in second.state().items()}, second.steps
            second = ScaledAdamW(
                [("p", broken)], LearnerConfig.model_validate({"learning_rate": 0.05, "warmup_steps": 5})
            )
            second.load_state(state, steps)
        second.step(0.7)
    assert torch.equal(straight, broken)


def test_moments_of_another_model_are_refused() -> None:
    _, optimizer = optimizer_on([1.0])
    with pytest.raises(VcpoError, match="moments for q"):
        optimizer.load_state({"exp_avg.q": torch.zeros(1)}, 1)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(VcpoError, match="no trainable parameter"):
        ScaledAdamW([("p", frozen)], LearnerConfig())


def test_bfloat16_parameters_are_trained_through_float32_masters() -> None:
    """1000 steps of 1e-5 from 1.0: in bfloat16 each would round to nothing (spacing 2^-8 below 1)."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    settings = LearnerConfig.model_validate({"learning_rate": 1e-5})
    optimizer = ScaledAdamW([("p", parameter)], settings)
    for step in range(1000):
        if step == 500:  # a checkpoint in between must carry the master
            state = {k: v.clone() for k, v in optimizer.state().items()}
            optimizer = ScaledAdamW([("p", parameter)], settings)
            optimizer.load_state(state, step)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1.0)
    # A constant gradient makes every Adam step the learning rate: 1 - 1000e-5 = 0.99, in bfloat16 0.98828125.
    assert optimizer.state()["master.p"].item() == pytest.approx(0.99, abs=3e-5)  # float32 rounds 1000 times
    assert parameter.item() == torch.tensor(0.99).bfloat16().item()


def test_an_empty_optimizer_state_after_steps_is_refused() -> None:
    _, optimizer = optimizer_on([1.0])
    with pytest.raises(VcpoError, match="empty"):
        optimizer.load_state({}, 7)
