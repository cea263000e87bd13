"""docs/scores.md: its example does what it says, and its formulas and numbers hold."""

from __future__ import annotations

import ast
import copy
import itertools
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vcpo.scores.choice import METHODS

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")


def example() -> str:
    """The page's one block of Python."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return block


@pytest.fixture(scope="module")
def before_the_step() -> dict[str, Any]:
    """Names and values that the example has when only the optimizer's step is left to do."""
    *most, step = ast.parse(example()).body
    assert ast.unparse(step) == "optimizer.step()"
    names: dict[str, Any] = {}
    exec(compile(ast.Module(most, type_ignores=[]), "docs/scores.md", "exec"), names)
    return names


def scores(model: nn.Module, tokens: Tensor, lengths: list[int]) -> list[list[Tensor]]:
    """∇ log π(τ) / (length - 1) of each trajectory, fed to the model alone, in float64."""
    alone = copy.deepcopy(model).double()
    found = []
    for own in tokens.flatten().split(lengths):
        log_probs = alone(own[None, :-1])[0].log_softmax(-1)
        mean = torch.stack([log_probs[t, own[t + 1]] for t in range(len(own) - 1)]).mean()
        found.append(list(torch.autograd.grad(mean, list(alone.parameters()))))
    return found


def test_example_gives_the_optimal_baseline_and_its_gradient(before_the_step: dict[str, Any]) -> None:
    names = before_the_step
    gradients = scores(names["model"], names["tokens"], names["lengths"].tolist())
    norms = torch.stack([torch.stack([g.square().sum() for g in own]).sum() for own in gradients])
    torch.testing.assert_close(names["record"].squared_norms.double(), norms, rtol=1e-4, atol=0.0)

    weights, rewards = names["log_weights"].double().exp(), names["rewards"].double()
    shares = (weights.square() * norms).view(2, 4)
    baselines = (shares * rewards.view(2, 4)).sum(1) / shares.sum(1)
    repeated = baselines.repeat_interleave(4)
    torch.testing.assert_close(names["baseline"].double(), repeated, rtol=1e-4, atol=0.0)

    coefficients = -weights * (rewards - repeated)
    for k, parameter in enumerate(names["model"].parameters()):
        expected = torch.einsum("i,i...->...", coefficients, torch.stack([own[k] for own in gradients]))
        scale = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-5 * scale)


def test_page_states_the_numbers_of_its_example(before_the_step: dict[str, Any]) -> None:
    baselines = [f"{b:.3f}" for b in before_the_step["baseline"][::4].tolist()]
    means = [f"{m:.3f}" for m in before_the_step["rewards"].view(2, 4).mean(1).tolist()]
    said = f"baselines come out as {' and '.join(baselines)}, where the group means are {' and '.join(means)}"
    assert said in PAGE


def test_example_is_the_file_and_short() -> None:
    path = ROOT / "examples" / "score_norms.py"
    runpy.run_path(str(path))
    assert path.read_text(encoding="utf-8").endswith(f'"""\n\n{example()}')
    assert sum(bool(line.strip()) for line in example().splitlines()) <= 20


def test_page_states_what_is_chosen() -> None:
    sketched, exact = METHODS["sketched"], METHODS["exact"]
    assert (
        f'| `"sketched"` (default) | from T ≥ {sketched.formed_from}·d·p/(d + p) '
        f"| ghost up to T = {sketched.ghost_up_to}, else a sketch with r = {sketched.columns} |"
    ) in PAGE
    assert f'| `"exact"` | from T ≥ {exact.formed_from}·d·p/(d + p) | ghost |' in PAGE


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize(
    "gradient", [[[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]], [[2.0, -1.0], [4.0, -2.0], [-2.0, 1.0]]]
)
def test_sketch_has_the_mean_and_the_variance_of_the_page(gradient: list[list[float]], r: int) -> None:
    """Over every pattern of signs; the second matrix has rank one."""
    g = torch.tensor(gradient, dtype=torch.float64)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3 * r)), dtype=torch.float64)
    estimates = (patterns.view(-1, r, 3) @ g).square().sum((1, 2)) / r
    k = g @ g.mT
    variance = 2 / r * (k.square().sum() - k.diagonal().square().sum())
    assert float(estimates.mean()) == pytest.approx(float(g.square().sum()), rel=1e-12)
    assert float(estimates.var(correction=0)) == pytest.approx(float(variance), rel=1e-12)
    assert variance <= 2 / r * torch.linalg.svdvals(g).pow(4).sum()


def test_page_cites_tests_that_exist() -> None:
    cited = set(re.findall(r"`(test_\w+)`", PAGE))
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert cited
    assert not {name for name in cited if f"def {name}(" not in written}
