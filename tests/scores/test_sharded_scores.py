"""Score norms and gradients of FSDP2-sharded models on two ranks, against one process's oracles."""

from __future__ import annotations

import time

import pytest
import sharded_ranks
import torch
import torch.multiprocessing as mp
from score_cases import (
    RAGGED,
    batch_of,
    forward,
    gradient_oracle,
    llama,
    objective_of,
    padded,
    separate_gradients,
)
from sharded_ranks import CASES, FSDP_MODELS, RANKS, SKETCH, Case, Findings, advantages, rows_of_rank
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from vcpo.scores import ScoreTape, squared_score_norms_oracle

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of transformers

DEADLINE = 400.0
"""Seconds until both ranks are ended, should they hang."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """All that the two ranks found; a rank's error is raised with its traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    # Ranks are forked from a server that has imported everything once.
    mp.get_context("forkserver").set_forkserver_preload(["sharded_ranks"])
    ranks = start_processes(
        sharded_ranks.work, (str(folder),), nprocs=RANKS, join=False, start_method="forkserver"
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
    return torch.load(folder / "findings", weights_only=False)


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name].double(), gradient.double(), rtol=tolerance, atol=tolerance * scale, msg=name
        )


def assert_found(found: Findings, name: str, case: Case) -> None:
    batch = batch_of(RAGGED)
    model = nn.Module.to(FSDP_MODELS[case.model](), case.precision)
    norms = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers).double()
    tolerance = 1e-6 if case.precision == torch.float32 else 1e-8
    gradient_tolerance = 5e-6 if case.precision == torch.float32 else 5e-7  # Gemma's norms are in float32
    torch.testing.assert_close(found.norms[name], norms, rtol=tolerance, atol=0.0)
    coefficients = torch.ones(len(RAGGED)) if case.ordinary_backward else advantages(norms)
    assert_gradients(found.gradients[name], gradient_oracle(model, batch, coefficients), gradient_tolerance)


EXACT = [name for name, case in CASES.items() if case.method != SKETCH and not case.half_in_calls]
HALF = [name for name, case in CASES.items() if case.half_in_calls]


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_find_what_one_process_finds(found: Findings, name: str) -> None:
    assert_found(found, name, CASES[name])


def test_ranks_sketch_as_one_process_does(found: Findings) -> None:
    """All have the same signs; the gradient is exact, for advantages from sketched norms."""
    model, batch = llama(), batch_of(RAGGED)
    rows, tape = padded(batch), ScoreTape(model, method=SKETCH)
    with tape:
        objective = objective_of(forward(model, rows), batch, rows)
    norms = tape.squared_norms(objective, rows.segments, len(RAGGED))
    torch.testing.assert_close(found.norms["sketch"], norms, rtol=1e-8, atol=0.0)
    assert_gradients(found.gradients["sketch"], gradient_oracle(model, batch, advantages(norms)), 1e-7)


@pytest.mark.parametrize("name", HALF)
def test_mixed_precision(found: Findings, name: str) -> None:
    """Against a model rounded to bfloat16 and the same rows, so that activations are equal.

    Autograd rounds weight gradients, and the coefficients round ours once more, by up to 2⁻⁸ an element.
    Norms average that over all elements.
    """
    case = CASES[name]
    each = rounded_gradients(case)
    norms = torch.stack([torch.stack([g.square().sum() for g in one.values()]).sum() for one in each])
    torch.testing.assert_close(found.norms[name], norms, rtol=1e-3, atol=0.0)
    weights = advantages(norms)
    for parameter, gradient in found.gradients[name].items():
        expected = torch.tensordot(weights, torch.stack([one[parameter] for one in each]), 1)
        assert float((gradient.double() - expected).norm()) < 5e-3 * float(expected.norm()), parameter


def rounded_gradients(case: Case) -> list[dict[str, Tensor]]:
    """Of each trajectory, through the forward passes of the ranks."""
    model = nn.Module.to(FSDP_MODELS[case.model](), case.precision)
    for parameter in model.parameters():  # not the buffers, as FSDP2
        parameter.data = parameter.data.bfloat16()
    each: list[dict[str, Tensor]] = [{} for _ in RAGGED]
    for members in case.split:
        own, rows = rows_of_rank(members)
        parts = separate_gradients(model, forward(model, rows), own, rows)
        for i, part in zip(members, parts, strict=True):
            each[i] = {parameter: gradient.double() for parameter, gradient in part.items()}
    return each


def test_loading_with_assign_between_steps(found: Findings) -> None:
    assert_found(found, "reloaded", Case())


def test_parameter_used_beside_its_sharded_module_is_named(found: Findings) -> None:
    assert "lm_head.weight is also used outside" in found.refusals["bypassed head"]


def test_tensor_parallel_module_is_named(found: Findings) -> None:
    message = found.refusals["tensor parallel"]
    assert "model.layers.0.mlp.gate_proj (Linear) has only a part of weight" in message


def test_reference_model_is_not_trivial() -> None:
    """The advantages differ, so that a gradient of ones could not pass for the weighted one."""
    batch = batch_of(RAGGED)
    norms = squared_score_norms_oracle(llama(), batch.sequences, batch.masks, batch.normalisers)
    assert float(advantages(norms).std()) > 0.1
