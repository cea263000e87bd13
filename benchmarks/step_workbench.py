"""The model, the optimizer and the minibatch that :mod:`benchmarks.step` steps on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.step_variants import Baseline, Cut, Part, Variant, Work, by_reward, one_by_one, optimal, whole
from vcpo.policy.log_probs import sampled_log_probs
from vcpo.policy.packing import pack
from vcpo.scores import ScoreTape
from vcpo.trajectory import NOT_SAMPLED, Trajectory

NOISE = 1.0
"""Standard deviation of the behaviour policy's log-probability of a trajectory around the learner's, nats."""


@dataclass(frozen=True)
class Setting:
    """A model of random weights and a minibatch of random tokens, whose second halves are sampled."""

    name: str
    config: PretrainedConfig
    trajectories: int
    tokens: int
    shortest: int | None = None
    """Lengths are spread over [shortest, tokens], packed in rows; None: all have ``tokens``."""
    group: int = 8
    """Trajectories of one group, and of a micro-batch."""
    checkpointed: bool = False
    """Activations of each layer are computed again in the backward pass."""


def llama(hidden_size: int, layers: int, vocabulary: int = 1024) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden_size // 64, 1),
    )


def qwen(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> PretrainedConfig:
    """Shaped like Qwen2.5, embeddings tied."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


QWEN_05B, QWEN_15B = qwen(896, 4864, 24, 14), qwen(1536, 8960, 28, 12)
SETTINGS = {  # 512 tokens: fewer trajectories, so that all ends in half an hour. Ratios are a micro-batch's
    "cpu": (
        Setting("d256-64x128", llama(256, 4), trajectories=64, tokens=128),
        Setting("d256-ragged", llama(256, 4), trajectories=64, tokens=128, shortest=64),
        Setting("d256-32x512", llama(256, 4), trajectories=32, tokens=512),
        Setting("d512-64x128", llama(512, 4), trajectories=64, tokens=128),
        Setting("d512-8x512", llama(512, 4), trajectories=8, tokens=512),
    ),
    "cuda": (
        Setting("qwen0.5b-64x1k", QWEN_05B, trajectories=64, tokens=1024),
        Setting("qwen0.5b-16x4k", QWEN_05B, trajectories=16, tokens=4096, group=4, checkpointed=True),
        Setting("qwen1.5b-64x1k", QWEN_15B, trajectories=64, tokens=1024),
        Setting("qwen1.5b-16x4k", QWEN_15B, trajectories=16, tokens=4096, group=4, checkpointed=True),
    ),
}
QUICK = (
    Setting("d64-32x64", llama(64, 2), trajectories=32, tokens=64),
    Setting("d64-ragged", llama(64, 2), trajectories=32, tokens=64, shortest=16),
)
LONG = (
    Setting("d256-64x512", llama(256, 4), trajectories=64, tokens=512),
    Setting("d512-64x512", llama(512, 8), trajectories=64, tokens=512),
)
"""Only by name."""


@torch.no_grad()
def rollouts(setting: Setting, model: Any, device: str) -> list[Trajectory]:
    """Trajectories whose behaviour log-probs are the model's with noise."""
    random = np.random.default_rng(0)
    shortest = setting.shortest or setting.tokens
    batch = []
    for length in random.integers(shortest, setting.tokens + 1, setting.trajectories):
        sampled = np.arange(length) >= length // 2
        blank = Trajectory(
            tokens=random.integers(setting.config.get_text_config().vocab_size, size=length, dtype=np.int32),
            action_mask=sampled,
            log_probs=np.zeros(length, np.float32),
            versions=np.where(sampled, 0, NOT_SAMPLED).astype(np.int32),
            reward=float(random.integers(2)),
        )
        values = sampled_log_probs(model, pack([blank]).to(device)).cpu().numpy()
        log_probs = blank.log_probs.copy()
        log_probs[sampled] = values + random.normal(scale=NOISE / math.sqrt(len(values)), size=len(values))
        batch.append(replace(blank, log_probs=log_probs))
    return batch


class Bench:
    """Model, optimizer and minibatch of a setting: float32 on a CPU, bfloat16 on a GPU."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting, self.device = setting, device
        torch.manual_seed(0)
        with torch.device(device):
            number = torch.bfloat16 if device == "cuda" else torch.float32
            self.model: Any = AutoModelForCausalLM.from_config(setting.config, dtype=number)
        if setting.checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.batch = rollouts(setting, self.model, device)

    @cached_property
    def _parts(self) -> dict[Cut, list[list[Part]]]:
        """The groups, cut in every way."""
        size, count = self.setting.group, len(self.batch)
        groups = [range(i, min(i + size, count)) for i in range(0, count, size)]
        return {
            cut: [[Part.of(part, self.batch, self.device) for part in cut(g, self.batch)] for g in groups]
            for cut in (whole, by_reward, one_by_one)
        }

    @contextlib.contextmanager
    def work(
        self, variant: Variant, *, seed: int = 0, baseline: Baseline = optimal, groups: int | None = None
    ) -> Iterator[Work]:
        """All that a step needs beforehand; no other variant meets its hooks.

        Each tape draws its own signs, within the step, as a learner does that draws them anew each step.
        """
        tape = ScoreTape(self.model, method=variant.method, seed=seed) if variant.method else None
        try:
            yield Work(self.model, self._parts[variant.cut][:groups], tape, baseline)
        finally:
            if tape is not None:
                tape.remove()

    def step(self, variant: Variant, work: Work) -> None:
        """The whole optimizer step."""
        self.model.zero_grad()
        variant.add_gradient(work)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def run(self, variant: Variant) -> None:
        """One step and what it needs."""
        with self.work(variant) as work:
            self.step(variant, work)

    def gradient(
        self, variant: Variant, *, baseline: Baseline = optimal, groups: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of the first groups, on the CPU, and their squared norms, if there are any."""
        self.model.zero_grad()
        with self.work(variant, baseline=baseline, groups=groups) as work:
            norms = variant.add_gradient(work)
        gradient = [p.grad.to("cpu", copy=True) for p in self.model.parameters()]
        if not norms:
            return gradient, torch.empty(0)
        members = [i for parts in work.groups for part in parts for i in part.members]
        return gradient, torch.cat(norms).cpu()[torch.tensor(members).argsort()]
