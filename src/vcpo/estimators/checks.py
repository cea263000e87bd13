"""Guards at the boundary of the estimators: number type, shape, and the index of what is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vcpo.errors import NonFiniteError, VcpoError

if TYPE_CHECKING:
    from torch import Tensor


OVERFLOW_HINT = (
    "truncate the importance weights (a clip leaves them unbounded where the advantage is negative), or "
    "lower the policy lag or the learning rate"
)
"""What to do about an importance weight that overflows."""


def upcast(values: Tensor) -> Tensor:
    """The values in float32 or better: bfloat16, half, integers and bools become float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def require_finite(values: Tensor, quantity: str, hint: str = "") -> Tensor:
    """The values themselves; raises :class:`NonFiniteError` naming the first bad row (trajectory)."""
    finite = values.detach().isfinite()
    if not finite.all():
        raise NonFiniteError(quantity, int((~finite).nonzero()[0, 0]), hint)
    return values


def require_same_shape(**named: Tensor) -> None:
    """Raises where tensors would otherwise broadcast against each other in silence."""
    if len({tuple(tensor.shape) for tensor in named.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise VcpoError(f"tensors must have one shape, got {shapes}")
