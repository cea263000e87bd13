"""One update, whatever the pieces: logits at once, tokens at once, micro-batches, packing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_cases import VOCABULARY, gradients, learner_for, random_groups, tiny_model
from torch import Tensor

from vcpo.learner.learner import Learner
from vcpo.policy.log_probs import LOGIT_BUDGET
from vcpo.scores.head import LogProbHead, Question

torch.set_num_threads(1)

SOME = 5 * VOCABULARY
"""Logits of five tokens."""
METRICS = ("loss", "ess_ratio", "grad_norm", "baseline_mean")


def stepped(model: Any, name: str, **budgets: int) -> tuple[Learner, dict[str, float]]:
    learner = learner_for(model, name, score_norms="exact", **budgets)
    return learner, learner.step(random_groups(seed=4))


def whole(name: str, kind: str) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    """Gradient, metrics and weights after a step with everything at once."""
    model = tiny_model(kind)
    _, metrics = stepped(model, name, token_budget=10_000)
    return gradients(model), metrics, copy.deepcopy(model.state_dict())


REFERENCES: dict[tuple[str, str], Any] = {}


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["vcpo", "rloo", "grpo"]),
    kind=st.sampled_from(["llama", "qwen2"]),
    logit_budget=st.sampled_from([1, VOCABULARY, SOME, 10**9]),
    token_budget=st.sampled_from([1, 26, 45, 10_000]),
)
def test_the_update_does_not_depend_on_budgets(
    name: str, kind: str, logit_budget: int, token_budget: int
) -> None:
    """Untied and tied heads; groups in one micro-batch, in two sums (vcpo, reinforce) and in two passes
    (grpo)."""
    if (name, kind) not in REFERENCES:
        REFERENCES[name, kind] = whole(name, kind)
    expected, metrics, weights = REFERENCES[name, kind]
    model = tiny_model(kind)
    _, found = stepped(model, name, logit_budget=logit_budget, token_budget=token_budget)
    scale = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5 * scale, msg=parameter)
    for key in METRICS:
        assert found[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-7), key
    for parameter, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[parameter], rtol=0, atol=1e-4, msg=parameter)


@pytest.mark.parametrize(("logit_budget", "asked"), [(SOME, True), (LOGIT_BUDGET, False)])
def test_the_budget_of_the_settings_reaches_the_head(
    logit_budget: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is asked for more than it: 27 to 60 sampled tokens, of which five at once."""
    questions: list[Question | None] = []
    forward = LogProbHead.forward

    def watched(self: LogProbHead, input: Tensor, question: Question | None = None) -> Tensor:
        questions.append(question)
        return forward(self, input, question)

    model = tiny_model()
    learner = learner_for(model, "vcpo", logit_budget=logit_budget, token_budget=10_000)
    monkeypatch.setattr(LogProbHead, "forward", watched)
    learner.step(random_groups(seed=4))
    assert questions
    assert [q.budget for q in questions if q is not None] == [logit_budget] * (len(questions) if asked else 0)
