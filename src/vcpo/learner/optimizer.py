"""AdamW whose step, and only whose step, is scaled.

η_eff = η · warm-up · step scale. Three departures from scaling the learning rate of a stock optimizer:

- Decoupled weight decay is not scaled: it stays η · warm-up · λ (the official code scales it along, so a
  run with low ESS forgets its regularisation).
- A scale that is NaN, zero, negative or above one is refused before any parameter is touched.
- Adam's moments take in the clipped gradient at full weight, as in the paper: scaling changes how far one
  step goes, not what later steps remember.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vcpo.config import LearnerConfig
from vcpo.errors import NonFiniteError, VcpoError


class ScaledAdamW:
    """AdamW over the trainable parameters, with linear warm-up and a per-step scale."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: LearnerConfig) -> None:
        named = [(name, p) for name, p in parameters if p.requires_grad]
        if not named:
            raise VcpoError("the model has no trainable parameter: nothing to learn")
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._config = config
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.steps = 0

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip the gradient to ``max_grad_norm`` (Euclidean, over all parameters); the norm before it."""
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        if norm != norm or norm == float("inf"):
            raise NonFiniteError("gradient norm", None, "no step was taken; the last checkpoint is intact")
        return norm

    def step(self, scale: float) -> float:
        """Take one step; the effective learning rate."""
        if not 0.0 < scale <= 1.0:
            raise VcpoError(f"step scale must be in (0, 1], got {scale}: no step was taken")
        base = self._config.learning_rate
        if self._config.warmup_steps:
            base *= min(1.0, (self.steps + 1) / self._config.warmup_steps)
        for group in self._adamw.param_groups:
            group["lr"] = base * scale
            group["weight_decay"] = self._config.weight_decay / scale  # lr · decay stays base · λ
        self._adamw.step()
        self.steps += 1
        return base * scale

    def state(self) -> dict[str, torch.Tensor]:
        """Moments by parameter name; parameters that never had a gradient have none."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Inverse of :meth:`state`."""
        by_name = dict(zip(self._names, self._parameters, strict=True))
        self._adamw.state.clear()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if name not in by_name:
                raise VcpoError(f"the optimizer state is of another model: it has moments for {name}")
            self._adamw.state[by_name[name]][kind] = value.clone()
        self.steps = steps
