"""``vcpo eval``: accuracy of a run's policy, or of any model, on an environment's held-out problems."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vcpo.config import Config, LoraConfig, default_recipe, load_config
from vcpo.errors import CheckpointError
from vcpo.learner.checkpoint import latest_checkpoint, read_state
from vcpo.monitor.progress import Progress
from vcpo.pipeline.evaluation import success_figures
from vcpo.pipeline.services import RolloutService
from vcpo.policy.loading import hide_loading_bars
from vcpo.weights import read_weights


async def evaluate_inline(
    config: Config, policy: str, checkpoint: Path | None, progress: Progress
) -> dict[str, Any]:
    """Sampled and greedy accuracy with 95 % intervals; ``checkpoint``'s weights replace the policy's."""
    torch.set_num_threads(config.runtime.threads)
    hide_loading_bars()
    service = RolloutService(config)
    service.begin(policy)
    if checkpoint is not None:
        await service.publish(
            read_state(checkpoint)["step"], read_weights(checkpoint / "weights.safetensors")
        )
    figures: dict[str, Any] = {}
    for name, greedy in (("accuracy", False), ("greedy_accuracy", True)):
        progress.phase(f"evaluating: {'greedy' if greedy else 'sampled'}", None)
        rewards = await service.evaluate(0, config.evaluation.final_problems, greedy=greedy)
        figures |= success_figures(name, rewards)
    await service.close()
    return figures


def evaluate_path(
    path: Path, overrides: Sequence[str], problems: int | None, progress: Progress
) -> dict[str, Any]:
    """``path``: a run folder (its final model, or its newest checkpoint if it did not end), or a model."""
    extra = ["--evaluation.final_problems", str(problems)] if problems is not None else []
    if not (path / "config.toml").exists():
        config = load_config(default_recipe(overrides), [*overrides, "--model.name", str(path), *extra])
        return {"model": str(path), **asyncio.run(evaluate_inline(config, str(path), None, progress))}
    config = load_config(path / "config.toml", [*overrides, *extra])
    if (path / "model" / "config.json").exists():
        policy, checkpoint = str(path / "model"), None
        config = config.model_copy(update={"lora": LoraConfig()})  # merged into the final model
    else:
        policy, checkpoint = config.model.name or str(path / "initial_model"), latest_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(
                f"{path} has neither a final model nor a checkpoint: there is nothing to evaluate"
            )
    source = checkpoint or policy
    return {"model": str(source), **asyncio.run(evaluate_inline(config, policy, checkpoint, progress))}
