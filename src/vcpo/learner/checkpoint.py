"""Checkpoints: everything a run needs to go on, in safetensors and JSON; nothing is ever unpickled.

``checkpoints/step-000100/`` holds ``weights.safetensors``, ``optimizer.safetensors`` (moments and the
torch random state), ``critic.safetensors`` where there is a critic, other parts by name (a teacher), and
``state.json`` (step, and whatever the pipeline adds: its place in the prompt stream). A checkpoint appears
under its name only when it is complete; the newest two are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vcpo.errors import CheckpointError
from vcpo.learner.learner import Learner
from vcpo.weights import load_weights, read_weights, weight_tensors, write_weights

FOLDER, KEPT = "checkpoints", 2
_RANDOM_STATE = "torch_random_state"
_CRITIC = "critic"


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / FOLDER / f"step-{step:06d}"


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max((run_folder / FOLDER).glob("step-??????"), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {checkpoint / 'state.json'}: {error}") from error


def save_checkpoint(
    run_folder: Path,
    learner: Learner,
    state: dict[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint of the learner as it stands; ``state`` is kept beside it as JSON, and each of
    ``parts`` as safetensors under its name."""
    final = checkpoint_path(run_folder, learner.version)
    partial = final.with_name(f".partial-{final.name}")
    for left in final.parent.glob(".partial-*"):  # of a learner that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(partial / "weights.safetensors", weight_tensors(learner.policy.model))
    write_weights(
        partial / "optimizer.safetensors", {**learner.optimizer.state(), _RANDOM_STATE: torch.get_rng_state()}
    )
    if learner.critic is not None:
        write_weights(partial / f"{_CRITIC}.safetensors", learner.critic.state())
    for name, tensors in (parts or {}).items():
        write_weights(partial / f"{name}.safetensors", tensors)
    (partial / "state.json").write_text(json.dumps({**state, "step": learner.version}))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(final.parent.glob("step-??????"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_checkpoint(checkpoint: Path, learner: Learner) -> dict[str, Any]:
    """Put the learner where it was; returns the state that was kept beside it."""
    state = read_state(checkpoint)
    weights, moments = read_part(checkpoint, "weights"), read_part(checkpoint, "optimizer")
    values = None if learner.critic is None else read_part(checkpoint, _CRITIC)
    load_weights(learner.policy.model, weights)
    torch.set_rng_state(moments.pop(_RANDOM_STATE))
    learner.optimizer.load_state(moments, state["step"])
    if learner.critic is not None and values is not None:
        learner.critic.load_state(values, state["step"])
    return state


def read_part(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint. Raises CheckpointError if they cannot be read."""
    try:
        return read_weights(checkpoint / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {checkpoint}: {error}") from error
