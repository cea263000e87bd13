"""AdamW whose step, and only whose step, is scaled.

η_eff = η · warm-up · step scale. Three departures from scaling the learning rate of a stock optimizer:

- Decoupled weight decay is not scaled: it stays η · warm-up · λ (the official code scales it along, so a
  run with low ESS forgets its regularisation).
- A scale that is NaN, zero, negative or above one is refused before any parameter is touched.
- Adam's moments take in the clipped gradient at full weight, as in the paper: scaling changes how far one
  step goes, not what later steps remember.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vcpo.config import LearnerConfig
from vcpo.errors import NonFiniteError, VcpoError
from vcpo.learner.sharding import part_of, whole

_MASTER = "master"


class ScaledAdamW:
    """AdamW over the trainable parameters, with linear warm-up and a per-step scale.

    Parameters of fewer than 32 bits have a master copy in float32, on which the steps are taken: in bfloat16
    most steps of a usual learning rate round to nothing, and the moments cannot decay.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: LearnerConfig) -> None:
        named = [(name, p) for name, p in parameters if p.requires_grad]
        if not named:
            raise VcpoError("the model has no trainable parameter: nothing to learn")
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._masters = [p if p.dtype.itemsize >= 4 else p.detach().float() for p in self._parameters]
        self._config = config
        self._adamw = torch.optim.AdamW(
            self._masters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.steps = 0

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def clip(self) -> float:
        """Clip the gradient to ``max_grad_norm`` (Euclidean, over all parameters); the norm before it."""
        norm = float(whole(nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)))
        if not math.isfinite(norm):
            raise NonFiniteError("gradient norm", None, "no step was taken; the last checkpoint is intact")
        return norm

    @torch.no_grad()
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
        for parameter, master in self._of_few_bits():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._adamw.step()
        for parameter, master in self._of_few_bits():
            parameter.copy_(master)
        self.steps += 1
        return base * scale

    def _of_few_bits(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        pairs = zip(self._parameters, self._masters, strict=True)
        return [(parameter, master) for parameter, master in pairs if parameter is not master]

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and master copies by parameter name; what never had a gradient has no moments."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter, master in zip(self._names, self._parameters, self._masters, strict=True):
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
            if master is not parameter:
                tensors[f"{_MASTER}.{name}"] = master
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Inverse of :meth:`state`."""
        by_name = dict(zip(self._names, self._masters, strict=True))
        if steps and not tensors:
            raise VcpoError(f"the optimizer state is empty, though {steps} steps were taken")
        self._adamw.state.clear()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if name not in by_name:
                raise VcpoError(f"the optimizer state is of another model: it has moments for {name}")
            master = by_name[name]
            if kind == _MASTER:
                master.data.copy_(part_of(value, master))
            else:  # AdamW keeps its count of steps on the CPU
                home = value if kind == "step" else part_of(value, master)
                self._adamw.state[master][kind] = home.clone()
        self.steps = steps
