"""Checkpoints: everything a run needs to go on, in safetensors and JSON; nothing is ever unpickled.

``checkpoints/step-000100/`` holds ``weights.safetensors``, ``optimizer.safetensors`` (moments and the
torch random state), ``critic.safetensors`` where there is a critic, other parts by name (a teacher), and
``state.json`` (step, and whatever the pipeline adds: its place in the prompt stream). A checkpoint appears
under its name only when it is complete; the newest two are kept.

A learner of several ranks writes ``shards/`` in the place of the first three: each rank its own part, as
safetensors, by torch's distributed checkpoints. Either kind can be read by any number of ranks, as long as
all of them see the folder.
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
from vcpo.learner.sharding import part_of, whole
from vcpo.weights import load_weights, read_weights, weight_tensors, write_weights

FOLDER, KEPT = "checkpoints", 2
_RANDOM_STATE = "torch_random_state"
_WEIGHTS, _OPTIMIZER, _CRITIC = "weights", "optimizer", "critic"
_SHARDS = "shards"


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / FOLDER / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Inverse of :func:`checkpoint_path`."""
    return int(checkpoint.name.removeprefix("step-"))


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
    final, ranks = checkpoint_path(run_folder, learner.version), learner.ranks
    partial = final.with_name(f".partial-{final.name}")
    if ranks.first:
        for left in final.parent.glob(".partial-*"):  # of a learner that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait_for_all()
    own = _parts_of(learner)
    if ranks.several:
        from vcpo.learner.shards import write_shards

        write_shards(partial / _SHARDS, own)
    else:
        for name, tensors in own.items():
            write_weights(partial / f"{name}.safetensors", tensors)
    if ranks.first:
        for name, tensors in (parts or {}).items():
            write_weights(partial / f"{name}.safetensors", tensors)
        (partial / "state.json").write_text(json.dumps({**state, "step": learner.version}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(final.parent.glob("step-??????"))[:-KEPT]:
            shutil.rmtree(old)
    ranks.wait_for_all()
    return final


def _parts_of(learner: Learner) -> dict[str, dict[str, Tensor]]:
    parts = {
        _WEIGHTS: weight_tensors(learner.policy.model),
        _OPTIMIZER: {**learner.optimizer.state(), _RANDOM_STATE: torch.get_rng_state()},
    }
    return parts if learner.critic is None else {**parts, _CRITIC: learner.critic.state()}


def load_checkpoint(checkpoint: Path, learner: Learner) -> dict[str, Any]:
    """Put the learner where it was; returns the state that was kept beside it."""
    state = read_state(checkpoint)
    wanted = [_WEIGHTS, _OPTIMIZER] if learner.critic is None else [_WEIGHTS, _OPTIMIZER, _CRITIC]
    if (checkpoint / _SHARDS).exists():
        from vcpo.learner.shards import read_shards

        parts = read_shards(checkpoint / _SHARDS, learner.ranks)
        if missing := [name for name in wanted if name not in parts]:
            raise CheckpointError(f"{checkpoint} has no part {missing[0]}: is it of another method?")
    else:
        parts = {name: read_part(checkpoint, name) for name in wanted}
    own = weight_tensors(learner.policy.model)
    load_weights(learner.policy.model, parts[_WEIGHTS], lambda name, tensor: part_of(tensor, own[name]))
    moments = parts[_OPTIMIZER]
    torch.set_rng_state(whole(moments.pop(_RANDOM_STATE)).cpu())
    learner.optimizer.load_state(moments, state["step"])
    if learner.critic is not None:
        learner.critic.load_state(parts[_CRITIC], state["step"])
    return state


def read_part(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint. Raises CheckpointError if they cannot be read."""
    try:
        return read_weights(checkpoint / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {checkpoint}: {error}") from error
