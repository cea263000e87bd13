"""The head that gives log-probs piece by piece, against the whole logits and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vcpo.errors import VcpoError
from vcpo.scores.factors import Factor, Lookup, Outer, matrix_norms
from vcpo.scores.head import Curve, LogitGradients, LogProbHead, Question, version_of
from vcpo.scores.layers import asked_head
from vcpo.scores.layout import Layout
from vcpo.scores.record import Factored, Weights
from vcpo.scores.sketch import Signs, project_rows, sketched_norms

torch.set_num_threads(1)

N, V, D = 23, 37, 6
BUDGETS = [1, V, 3 * V, N * V - 1, N * V, 10**9]
"""From one token a piece to all at once."""

CURVES: dict[str, tuple[Curve, Callable[[Tensor], Tensor]]] = {
    "plain": (Curve(), lambda z: z),
    "temperature": (Curve(temperature=0.7), lambda z: z / 0.7),
    "scaled": (Curve(scale=0.25), lambda z: 0.25 * z),
    "scaled, temperature": (Curve(scale=3.0, temperature=1.5), lambda z: 3.0 * z / 1.5),
    "capped": (Curve(cap=2.0), lambda z: 2.0 * torch.tanh(z / 2.0)),
    "capped, temperature": (Curve(cap=2.0, temperature=0.6), lambda z: 2.0 * torch.tanh(z / 2.0) / 0.6),
    "scaled, capped": (Curve(scale=1.7, cap=3.0), lambda z: 3.0 * torch.tanh(1.7 * z / 3.0)),
}
"""Each with what it is, written out."""


@dataclass
class Case:
    """A head and what it is asked; the leaves have gradients."""

    hidden: Tensor
    head: LogProbHead
    tokens: Tensor
    factors: Tensor
    """[N] the gradient of the log-probs; their signs differ, as advantages' do."""

    def leaves(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, **dict(self.head.named_parameters())}

    def asked(self, curve: Curve, budget: int) -> Tensor:
        return self.head(self.hidden, Question(self.tokens, curve, budget))

    def gradients(self, log_probs: Tensor) -> dict[str, Tensor]:
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.requires_grad}
        found = torch.autograd.grad((self.factors.to(log_probs) * log_probs).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))


def case_of(number_type: torch.dtype = torch.float64, *, bias: bool = True, count: int = N) -> Case:
    torch.manual_seed(0)
    linear = nn.Linear(D, V, bias=bias, dtype=number_type)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn_like(parameter))
    head: Any = linear
    head.__class__ = LogProbHead
    hidden = torch.randn(count, D).to(number_type).requires_grad_()
    return Case(hidden, head, torch.randint(V, (count,)), torch.randn(count))


def whole(case: Case, written_out: Callable[[Tensor], Tensor]) -> Tensor:
    """From all logits at once."""
    z = functional.linear(case.hidden, case.head.weight, case.head.bias)
    z = z if z.dtype == torch.float64 else z.float()
    return written_out(z).log_softmax(-1)[torch.arange(len(case.tokens)), case.tokens]


def segments_of(count: int = N) -> Tensor:
    """Five trajectories' tokens in an order of their own; one has none, and two positions are nobody's."""
    owners = torch.randint(4, (count,), generator=torch.Generator().manual_seed(3))
    owners[owners == 2] = 4
    owners[[5, 11]] = -1
    return owners


def gradients_of_rows(case: Case, curve: Curve, budget: int) -> tuple[LogitGradients, Tensor, Outer]:
    """What a tape makes of the head, and E by autograd."""
    question = Question(case.tokens, curve, budget)
    case.head(case.hidden, question)
    question.version = version_of(case.head.weight, case.head.bias)
    grads = case.factors.to(case.hidden.dtype).masked_fill(segments_of(len(case.tokens)) < 0, 0)
    grads = grads.to(torch.promote_types(grads.dtype, torch.float32))
    found = asked_head(
        question, case.head.weight, case.head.bias, case.hidden, grads, torch.Size([len(case.tokens)])
    )["weight"]
    assert isinstance(found, Outer) and isinstance(found.rows, LogitGradients)
    return found.rows, grads, found


def logit_gradients(case: Case, written_out: Callable[[Tensor], Tensor], grads: Tensor) -> Tensor:
    """E by autograd from all logits at once."""
    z = functional.linear(case.hidden, case.head.weight, case.head.bias).detach().requires_grad_()
    precise = z if z.dtype == torch.float64 else z.float()
    log_probs = written_out(precise).log_softmax(-1)[torch.arange(len(case.tokens)), case.tokens]
    return torch.autograd.grad((grads * log_probs).sum(), z)[0]


# Log-probabilities and their gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("curve", CURVES)
def test_log_probs_and_gradients_are_those_of_all_logits(curve: str, budget: int, bias: bool) -> None:
    case, (asked, written_out) = case_of(bias=bias), CURVES[curve]
    found, expected = case.asked(asked, budget), whole(case, written_out)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = case.gradients(found)
    assert set(gradients) == ({"hidden", "weight", "bias"} if bias else {"hidden", "weight"})
    for name, gradient in case.gradients(expected).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-11, atol=1e-12, msg=name)


def test_by_hand() -> None:
    """One token, h = 1 and W = (ln 3, 0): π = (3/4, 1/4). For y = 0: E = (1/4, −1/4), and h has
    ln 3 / 4."""
    linear: Any = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    linear.__class__ = LogProbHead
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0], [1.0]]).log())
    hidden: Any = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    log_prob = linear(hidden, Question(torch.tensor([0]), Curve(), budget=1))
    assert float(log_prob.detach()) == pytest.approx(torch.tensor(0.75).log().item(), rel=1e-6)
    log_prob.sum().backward()
    assert linear.weight.grad.flatten().tolist() == pytest.approx([0.25, -0.25])
    assert float(hidden.grad) == pytest.approx(torch.tensor(3.0).log().item() / 4, rel=1e-6)


@pytest.mark.parametrize("frozen", [["weight", "bias"], ["hidden"], ["weight"], ["bias"], ["hidden", "bias"]])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen: list[str]) -> None:
    case = case_of()
    for name in frozen:
        case.leaves()[name].requires_grad_(False)
    found = case.gradients(case.asked(Curve(cap=2.0), 2 * V))
    expected = case.gradients(whole(case, CURVES["capped"][1]))
    assert set(found) == {"hidden", "weight", "bias"} - set(frozen)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-12, msg=name)


def test_without_gradient_nothing_is_kept() -> None:
    case = case_of()
    with torch.no_grad():
        found = case.asked(Curve(), V)
    assert not found.requires_grad
    torch.testing.assert_close(found, whole(case, lambda z: z).detach(), rtol=1e-12, atol=1e-12)
    for leaf in case.leaves().values():
        leaf.requires_grad_(False)
    assert not case.asked(Curve(), V).requires_grad


def test_no_tokens_give_no_log_probs_and_gradients_of_zero() -> None:
    case = case_of(count=0)
    found = case.asked(Curve(), V)
    assert found.shape == (0,)
    assert not any(gradient.any() for gradient in case.gradients(found).values())


def test_without_a_question_it_is_the_linear_layer_it_was() -> None:
    case = case_of()
    expected = functional.linear(case.hidden, case.head.weight, case.head.bias)
    assert torch.equal(case.head(case.hidden), expected)


def test_a_token_of_no_probability_and_one_of_all() -> None:
    """Logits of ±800 overflow an exp that is not shifted."""
    linear: Any = nn.Linear(1, 3, bias=False)
    linear.__class__ = LogProbHead
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[800.0], [-800.0], [0.0]]))
    hidden: Any = torch.ones(2, 1, requires_grad=True)
    found = linear(hidden, Question(torch.tensor([0, 1]), Curve(), budget=1))
    assert found.tolist() == [0.0, -1600.0]
    found.sum().backward()
    assert linear.weight.grad.flatten().tolist() == [-1.0, 1.0, 0.0]
    assert hidden.grad.flatten().tolist() == [0.0, -1600.0]


# Number types


@pytest.mark.parametrize("budget", [1, 5 * V, 10**9])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_bfloat16_products_with_float32_sums(autocast: bool, budget: int) -> None:
    """Log-probs are what float32 makes of the same rounded products. Gradients are to rounding what autograd
    finds in the same number types: each is rounded to 8 bits once or twice more."""
    case = case_of(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = case.asked(Curve(), budget), whole(case, lambda z: z)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = case.gradients(found)
    for name, gradient in case.gradients(expected).items():
        assert gradients[name].dtype == gradient.dtype
        error = (gradients[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert float(error) < 2**-7, name


def test_autocast_leaves_float64_as_it_is() -> None:
    case = case_of()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.asked(Curve(), V)
    torch.testing.assert_close(found, whole(case, lambda z: z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 10**9])
def test_many_pieces_do_not_lose_their_digits_in_a_bfloat16_gradient(budget: int) -> None:
    """600 products of one direction: added to a bfloat16 sum one by one, those after the 256th would be
    rounded away."""
    case = case_of(torch.bfloat16, count=600)
    with torch.no_grad():
        case.hidden.copy_(torch.ones(D))
        case.tokens.fill_(3)
        case.factors.fill_(0.5)
    rows, grads, outer = gradients_of_rows(case, Curve(), budget)
    layout = Layout.of(torch.zeros(600, dtype=torch.long), 1)
    total = torch.zeros_like(case.head.weight)
    Factored.of([outer]).add_to(total, Weights(torch.ones(1), layout))
    expected = logit_gradients(case, lambda z: z, grads).double().mT @ case.hidden.double()
    assert float(((total.double() - expected).norm() / expected.norm()).detach()) < 2**-8
    ordinary = case.gradients(case.asked(Curve(), budget))["weight"].double()
    everywhere = logit_gradients(case, lambda z: z, case.factors).double().mT @ case.hidden.double()
    assert float((ordinary - everywhere).norm() / everywhere.norm()) < 2**-7
    assert rows.shape == (600, V)


# The gradient of logits as a matrix that is computed when it is read


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("curve", CURVES)
def test_every_part_of_the_matrix_is_what_autograd_finds(curve: str, budget: int) -> None:
    case, (asked, written_out) = case_of(), CURVES[curve]
    rows, grads, _ = gradients_of_rows(case, asked, budget)
    expected = logit_gradients(case, written_out, grads)

    def close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)

    assert rows.shape == expected.shape
    pieces = list(rows.pieces())
    close(torch.cat([e for _, e in pieces]), expected)
    assert all(e.shape[0] == 1 or e.numel() <= budget for _, e in pieces)
    strips = list(rows.strips())
    close(torch.cat(strips, -1), expected)
    assert all(e.shape[1] == 1 or e.numel() <= budget for e in strips)
    some = torch.tensor([4, 0, 19])
    close(rows.part(some, slice(7, 20)), expected[some, 7:20])
    tokens, columns = torch.tensor([[0, 3], [8, 8]]), torch.tensor([[1, 36, 2], [5, 5, 0]])
    columns[0, 0] = case.tokens[3]
    close(rows.elements(tokens, columns), expected[tokens[:, :, None], columns[:, None, :]])


@pytest.mark.parametrize("budget", [1, 4 * V, 10**9])
def test_norms_gradients_and_sketches_are_those_of_the_matrix(budget: int) -> None:
    """A selection whose owners are in no order, one trajectory without tokens, padding: against E ⊗ H."""
    case = case_of()
    _, grads, made = gradients_of_rows(case, Curve(cap=2.0), budget)
    there = logit_gradients(case, CURVES["capped"][1], grads)
    for layout_budget in (1, 2**24):
        layout = Layout.of(segments_of(), 5, layout_budget)
        formed = torch.stack(
            [there[segments_of() == i].mT @ case.hidden[segments_of() == i] for i in range(5)]
        ).detach()
        norms = formed.square().sum((1, 2))
        assert norms[2] == 0
        torch.testing.assert_close(matrix_norms([made], layout), norms, rtol=1e-10, atol=0.0)
        coefficients = torch.tensor([1.0, -2.0, 5.0, 0.0, 0.3], dtype=torch.float64)
        total = torch.ones_like(formed[0])
        Factored.of([made]).add_to(total, Weights(coefficients, layout))
        expected = 1 + torch.tensordot(coefficients, formed, 1)
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
        signs = Signs(5, 8)
        projected = [(project_rows(made, signs, "head"), case.hidden)]
        omega = signs.of("head", V, case.hidden)
        estimate = sketched_norms(projected, layout)
        wanted = torch.einsum("vr,nvd->nrd", omega, formed).square().sum(-1)
        torch.testing.assert_close(estimate.squared_norms, wanted.mean(-1), rtol=1e-10, atol=0.0)
        torch.testing.assert_close(estimate.variances, wanted.var(-1) / 8, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("budget", [1, 10**9])
def test_with_a_whole_orthogonal_projection_a_sketch_is_exact(budget: int) -> None:
    """Ω Ωᵀ = r I: Sylvester's matrix of signs, 64 × 64, of which a vocabulary of 37 uses 37 rows."""
    case = case_of()
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])

    class Whole(Signs):
        def of(self, key: str, width: int, like: Tensor) -> Tensor:
            return sylvester[:width].to(like)

    _, _, made = gradients_of_rows(case, Curve(), budget)
    layout = Layout.of(segments_of(), 5)
    projected = [(project_rows(made, Whole(0, 64), "head"), case.hidden)]
    found = sketched_norms(projected, layout).squared_norms
    torch.testing.assert_close(found, matrix_norms([made], layout), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("budget", [1, 10**9])
def test_a_head_that_is_a_table_too_or_is_asked_twice(budget: int) -> None:
    """Gradients of all uses of one matrix add before they are squared."""
    case, other = case_of(), case_of()
    other.tokens, other.hidden = case.tokens.flip(0), case.hidden.detach().cos()
    other.head = case.head
    grads, uses, matrices = [], [], []
    for one, curve in ((case, "scaled"), (other, "capped")):
        _, grad, made = gradients_of_rows(one, CURVES[curve][0], budget)
        grads.append(grad)
        uses.append(made)
        matrices.append((logit_gradients(one, CURVES[curve][1], grad), one.hidden.detach()))
    table = Lookup(case.tokens.roll(5), torch.randn(N, D, dtype=torch.float64), V)
    matrices.append((functional.one_hot(table.tokens, V).double(), table.columns))
    owners = segments_of()
    every: list[Factor] = [*uses, table]
    for chosen in ([0, 1], [0, 2], [2, 1], [0, 1, 2]):
        gradients = [
            sum(matrices[k][0][owners == i].mT @ matrices[k][1][owners == i] for k in chosen)
            for i in range(5)
        ]
        expected = torch.stack([torch.as_tensor(g).square().sum() for g in gradients])
        for layout_budget in (1, 2**24):
            found = matrix_norms([every[k] for k in chosen], Layout.of(owners, 5, layout_budget))  # type: ignore[misc]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_bfloat16_norms_are_to_1e_4_those_of_sums_in_float64() -> None:
    """From the bfloat16 E that autograd finds: nothing is rounded to fewer digits than float32 after it."""
    case = case_of(torch.bfloat16, count=200)
    rows, grads, made = gradients_of_rows(case, Curve(), 4 * V)
    layout = Layout.of(segments_of(200), 5)
    e, h = logit_gradients(case, lambda z: z, grads).double(), case.hidden.detach().double()
    assert torch.cat([piece for _, piece in rows.pieces()]).dtype == torch.bfloat16
    formed = torch.stack([e[segments_of(200) == i].mT @ h[segments_of(200) == i] for i in range(5)])
    found = matrix_norms([made], layout)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), formed.square().sum((1, 2)), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_weights_that_changed_since_are_refused(what: str) -> None:
    rows, _, _ = gradients_of_rows(case := case_of(), Curve(), V)
    with torch.no_grad():
        case.head.get_parameter(what).add_(1.0)
    for read in (lambda: list(rows.pieces()), lambda: list(rows.strips()), lambda: rows.part(slice(0, 2))):
        with pytest.raises(VcpoError, match="the head's weights have changed since the forward pass"):
            read()


# Memory


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation makes while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("curve", ["plain", "capped, temperature"])
def test_no_tensor_is_larger_than_the_budget_or_the_weight(curve: str) -> None:
    """300 tokens of 1,000: 300,000 logits, a weight of 6,000, and never more than 10,000 numbers at once."""
    torch.manual_seed(0)
    linear: Any = nn.Linear(D, 1000)
    linear.__class__ = LogProbHead
    hidden = torch.randn(300, D, requires_grad=True)
    case = Case(hidden, linear, torch.randint(1000, (300,)), torch.randn(300))
    layout = Layout.of(torch.arange(300) % 5, 5, 10_000)
    with Largest() as largest:
        case.gradients(case.asked(CURVES[curve][0], 10_000))
        _, _, made = gradients_of_rows(case, CURVES[curve][0], 10_000)
        matrix_norms([made], layout)
        project_rows(made, Signs(0, 4), "head")
        Factored.of([made]).add_to(torch.zeros(1000, D), Weights(torch.ones(5), layout))
    assert largest.numbers <= 10_000
    with Largest() as largest:
        case.gradients(whole(case, CURVES[curve][1]))
    assert largest.numbers == 300_000
