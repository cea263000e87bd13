"""From a config to its parts: environment, policy (warm-started and cached if it is a small one), learner,
rollout loop. Every process of a run builds what it needs with these functions."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vcpo import __version__
from vcpo.algorithms.catalog import get_algorithm
from vcpo.algorithms.composition import Algorithm
from vcpo.config import Config
from vcpo.environments.protocol import (
    Codec,
    ContextChecked,
    DemonstratingEnvironment,
    Environment,
    SmallModelEnvironment,
)
from vcpo.environments.registry import environment_class
from vcpo.errors import ConfigError
from vcpo.learner.learner import Learner
from vcpo.learner.ranks import ALONE, Ranks
from vcpo.learner.supervised import warm_start
from vcpo.pipeline.cache import cache_folder
from vcpo.pipeline.calibration import find_calibration
from vcpo.pipeline.engines import Speaker
from vcpo.pipeline.rollout import RolloutLoop
from vcpo.pipeline.step_scales import read_step_scales
from vcpo.policy.loading import Policy, load_policy, small_policy
from vcpo.samplers.protocol import Completer
from vcpo.trajectory import NOT_SAMPLED, Trajectory

log = logging.getLogger(__name__)

WarmStartListener = Callable[[float], None]
"""Hears the loss of each step of a warm start."""


def algorithm_of(config: Config) -> Algorithm:
    return get_algorithm(config.algorithm.name).with_overrides(config.algorithm)


def build_environment(config: Config, codec: Codec, context_length: int) -> Environment:
    environment: Environment = environment_class(config.environment.kind)(codec, config.environment)
    if isinstance(environment, ContextChecked):
        environment.check_context(context_length)
    return environment


def small_alphabet(config: Config) -> str:
    """The characters that a small model for this environment must know."""
    kind = environment_class(config.environment.kind)
    if not isinstance(kind, SmallModelEnvironment):
        raise ConfigError(
            f"environment {config.environment.kind!r} has no alphabet() to build a small model for: "
            "set model.name"
        )
    return kind.alphabet(config.environment)


def build_policy(config: Config, listener: WarmStartListener = lambda loss: None) -> Policy:
    """The policy a run begins with: a loaded model, or a small one taught the task's format."""
    if config.model.name:
        return load_policy(config.model.name, config.model)
    policy = small_policy(config.model, small_alphabet(config), config.run.seed)
    environment = build_environment(config, policy.codec, policy.context_length)
    if not config.warm_start.steps or not isinstance(environment, DemonstratingEnvironment):
        return policy
    cached = _cache_folder(config, environment)
    if config.warm_start.cache and (cached / "config.json").exists():
        return load_policy(str(cached), config.model)
    warm_start(policy, _demonstrated(environment, config.run.seed), config.warm_start, listener)
    if config.warm_start.cache:
        _store(policy, cached)
    return policy


def build_learner(
    config: Config, policy: Policy, run_folder: Path | None = None, ranks: Ranks = ALONE
) -> Learner:
    """``run_folder`` may have a calibration of the run's own."""
    ratio = config.algorithm.on_policy_ratio
    if ratio == "calibrated":
        ratio = find_calibration(config, run_folder).on_policy_ratio
    algorithm, temperature = algorithm_of(config), config.sampler.temperature
    return Learner(
        policy,
        algorithm,
        config.learner,
        ratio,
        temperature=temperature,
        longest_answer=config.environment.max_tokens,
        step_scales=read_step_scales(config),
        ranks=ranks,
    )


def build_rollout_loop(config: Config, speaker: Speaker, sampler: Completer) -> RolloutLoop:
    return RolloutLoop(
        build_environment(config, speaker.codec, speaker.context_length),
        sampler,
        group_size=config.pipeline.group_size,
        seed=config.run.seed,
        stop=speaker.stop,
        timeout_seconds=config.environment.timeout_seconds,
    )


def _demonstrated(environment: DemonstratingEnvironment, seed: int) -> Iterator[Trajectory]:
    for demonstration in environment.demonstrations(seed):
        length = len(demonstration.tokens)
        yield Trajectory(
            tokens=np.array(demonstration.tokens, np.int32),
            action_mask=np.array(demonstration.action_mask, bool),
            log_probs=np.zeros(length, np.float32),
            versions=np.full(length, NOT_SAMPLED, np.int32),
            reward=0.0,
        )


def _cache_folder(config: Config, environment: DemonstratingEnvironment) -> Path:
    """Where the warm-started model of these settings lives; the demonstrations themselves are in the key."""
    sample = [d.tokens for d in islice(environment.demonstrations(config.run.seed), 64)]
    relevant: dict[str, Any] = {
        "version": __version__,
        "seed": config.run.seed,
        "demonstrations": sample,
        **{
            part: getattr(config, part).model_dump(mode="json")
            for part in ("model", "warm_start", "environment")
        },
    }
    key = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("warm-start") / key


def _store(policy: Policy, folder: Path) -> None:
    """Save so that another process sees the whole folder or none of it. A cache that cannot be written
    costs the next run a warm start, not this run its own."""
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
        policy.save(partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another run was faster; its model is the same
            log.warning("the warm-started model is not cached: %s (VCPO_CACHE sets the folder)", error)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
