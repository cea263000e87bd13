"""What each kind of layer's parameters get from its input A and the gradient E of its output.

One rule a kind: linear (y = A Wᵀ + b), transformers' Conv1D (y = A W + b), embedding, layer norm, and
scale norm: any module with one vector w whose output is w ⊙ x̂ + c, found out by trying (Llama's RMSNorm
w ⊙ x̂ and Gemma's (1 + w) ⊙ x̂ are two). A rule applies only to the forward method it was written for:
a subclass that overrides it, or that owns more parameters, is not recognised. Every rule is for calls with
one tensor and no more.

Shapes: A and E are [R, T, ·]; a norm inside attention may see [R, T, H, d] or [R, H, T, d].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from vcpo.errors import UnsupportedLayerError
from vcpo.scores.factors import Factor, Lookup, Outer, Vector
from vcpo.scores.head import LogitGradients, LogProbHead, Question
from vcpo.scores.layout import precise

Rule = Callable[[nn.Module, Tensor, Tensor, torch.Size], Mapping[str, Factor]]
"""(module, A, E, (R, T)) to the gradient factors of the module's own parameters, by name.

Raises ValueError if the layer did not see R × T positions."""


def rule_for(name: str, module: nn.Module) -> Rule:
    """The rule of a module that owns trainable parameters; UnsupportedLayerError names one without."""
    for kind in (_linear_kind, _embedding_kind, _layer_norm_kind, _scale_norm_kind):
        if (rule := kind(module)) is not None:
            return rule
    own = ", ".join(n for n, p in module.named_parameters(recurse=False) if p.requires_grad)
    raise UnsupportedLayerError(
        f"no score-norm rule for {name or 'the model itself'} ({type(module).__name__}), which owns {own}: "
        "freeze it, or build it from Linear, Conv1D, Embedding, LayerNorm and RMSNorm modules"
    )


def _owns_only(module: nn.Module, *names: str) -> bool:
    return {n for n, _ in module.named_parameters(recurse=False)} <= set(names)


def _forward_is(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module).forward is kind.forward and "forward" not in vars(module)


def _flat(values: Tensor, rows: torch.Size) -> Tensor:
    """[R, T, d] as [P, d]; so is a selection, [P, d]."""
    if values.shape[:-1] != rows:
        raise ValueError(f"{tuple(values.shape[:-1])} positions")
    if len(rows) == 2 and rows[0] == rows[1] > 1 and 0 < values.stride(0) < values.stride(1):
        raise ValueError("as many rows as positions, transposed (add a padding column)")
    return values.reshape(-1, values.shape[-1])


def _linear_kind(module: nn.Module) -> Rule | None:
    if not _owns_only(module, "weight", "bias"):
        return None
    if _forward_is(module, nn.Linear) or _forward_is(module, LogProbHead):
        return _linear
    return _conv1d if _forward_is(module, Conv1D) else None


def _linear(module: nn.Module, a: Tensor, e: Tensor, rows: torch.Size) -> Mapping[str, Factor]:
    a, e = _flat(a, rows).to(e.dtype), _flat(e, rows)  # what autocast multiplies
    return {"weight": Outer(rows=e, columns=a), "bias": Vector(e)}


def asked_head(
    question: Question, weight: Tensor, bias: Tensor | None, a: Tensor, e: Tensor, rows: torch.Size
) -> Mapping[str, Factor]:
    """Of a head that was asked for log-probabilities: A is [N, d], and E [N] the gradient of those.

    The E of a linear layer, [N, V], is a matrix that is computed when it is read, from the weights.
    """
    a = _flat(a, rows).to(question.number_type)
    assert question.log_normalisers is not None
    logits = LogitGradients(
        hidden=a,
        weight=weight,
        bias=bias,
        version=question.version,
        tokens=question.tokens,
        log_normalisers=question.log_normalisers,
        grads=e,
        curve=question.curve,
        budget=question.budget,
    )
    return {"weight": Outer(rows=logits, columns=a), "bias": Vector(logits)}


def _conv1d(module: nn.Module, a: Tensor, e: Tensor, rows: torch.Size) -> Mapping[str, Factor]:
    a, e = _flat(a, rows).to(e.dtype), _flat(e, rows)
    return {"weight": Outer(rows=a, columns=e), "bias": Vector(e)}


@dataclass(frozen=True)
class _Embedding:
    """Rows of a table, times a constant; the padding token gets no gradient."""

    scale: float | Tensor | None
    padding_token: int | None

    def __call__(self, module: nn.Module, a: Tensor, e: Tensor, rows: torch.Size) -> Mapping[str, Factor]:
        tokens, columns = _flat(a[..., None], rows)[:, 0], _flat(e, rows)
        if self.scale is not None:  # a tensor is rounded, as the layer does
            columns = columns * (self.scale.to(columns) if isinstance(self.scale, Tensor) else self.scale)
        if self.padding_token is not None:
            columns = columns.masked_fill((tokens == self.padding_token)[:, None], 0)
        assert isinstance(module, nn.Embedding)
        # A copy: callers may fill the next batch's ids into this one's before the record is used.
        return {"weight": Lookup(tokens.clone(), columns, height=module.num_embeddings)}


def _embedding_kind(module: nn.Module) -> Rule | None:
    if not isinstance(module, nn.Embedding) or not _owns_only(module, "weight"):
        return None
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None  # changes the table while it is read; mixes trajectories; wants a sparse gradient
    if _forward_is(module, nn.Embedding):
        return _Embedding(None, module.padding_idx)
    scale = getattr(module, "embed_scale", 1.0)
    table = _random(module.num_embeddings, 2, module.weight)  # all tokens: some may be special
    tokens = torch.arange(module.num_embeddings, device=table.device)
    found = _outputs_with(module, [table], tokens)
    if found is None or not _close(found[0], table[tokens] * scale):
        return None
    return _Embedding(scale, module.padding_idx)


def _layer_norm_kind(module: nn.Module) -> Rule | None:
    one_axis = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    known = one_axis and _forward_is(module, nn.LayerNorm) and _owns_only(module, "weight", "bias")
    return _layer_norm if known else None


def _layer_norm(module: nn.Module, a: Tensor, e: Tensor, rows: torch.Size) -> Mapping[str, Factor]:
    assert isinstance(module, nn.LayerNorm)
    normalised = functional.layer_norm(precise(a), module.normalized_shape, eps=module.eps)
    values = precise(e) * normalised
    return {"weight": Vector(_per_position(values, a, rows)), "bias": Vector(_per_position(e, a, rows))}


@dataclass(frozen=True)
class _ScaleNorm:
    """w ⊙ x̂ + c, with x̂ = Σ_k sign_k · output(w = value_k)."""

    points: tuple[tuple[float, int], ...]
    width: int
    """Of w."""

    def __call__(self, module: nn.Module, a: Tensor, e: Tensor, rows: torch.Size) -> Mapping[str, Factor]:
        if a.shape[-1] != self.width:
            raise ValueError(f"{a.shape[-1]} channels with {self.width} weights")
        values = precise(e) * self.normalised(module, a)
        return {"weight": Vector(_per_position(values, a, rows))}

    def normalised(self, module: nn.Module, a: Tensor) -> Tensor:
        """x̂."""
        if isinstance(module, nn.RMSNorm) and _forward_is(module, nn.RMSNorm) and module.eps is not None:
            return functional.rms_norm(
                precise(a), (self.width,), eps=module.eps
            )  # as its own gradient has it
        return reduce(torch.add, (s * _output_with(module, _filled(value, a), a) for value, s in self.points))


def _output_with(module: nn.Module, weight: Tensor, a: Tensor, **changes: object) -> Tensor:
    """The output for another weight, by the forward method alone: hooks, such as FSDP's, are left out."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), _parameters={"weight": weight}, **changes)
    return twin.forward(a)


def _outputs_with(module: nn.Module, weights: Sequence[Tensor], a: Tensor) -> list[Tensor] | None:
    """The output for each weight, in training mode; None if the module is not a function of one tensor."""
    try:
        with torch.no_grad():
            found = [_output_with(module, weight, a, training=True) for weight in weights]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    return found if all(isinstance(output, Tensor) for output in found) else None


def _random(height: int, width: int, like: Tensor) -> Tensor:
    """Rows of the type of ``like``, which may be a shard."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(height, width, generator=generator)
    return values.to(like.device, like.dtype)


def _filled(value: float, like: Tensor) -> Tensor:
    return like.new_full((like.shape[-1],), value)


def _scale_norm_kind(module: nn.Module) -> Rule | None:
    """A scale norm, if the output for a random w is w ⊙ x̂ + c as the outputs for 0 and 1 foretell it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not _owns_only(module, "weight"):
        return None
    if len(weight) == 1 or any(True for _ in module.children()):
        return None  # one number for all channels is no vector; a child may be dropout
    a = _random(6, len(weight), weight).view(2, 3, -1)
    w = 8 * a[0, 0].flip(0)
    found = _outputs_with(module, [_filled(0, a), _filled(1, a), w, w], a)
    if found is None or found[0].shape != a.shape:
        return None
    zero, one, some, again = found
    if not torch.equal(some, again) or not _close(some, w * (one - zero) + zero):
        return None
    if not _learns(module, a, w, one - zero):
        return None
    points = ((1.0, 1), (0.0, -1))
    if not zero.any():
        points = ((1.0, 1),)
    elif _close(one, 2 * zero):
        points = ((0.0, 1),)
    return _ScaleNorm(points, len(weight))


def _learns(module: nn.Module, a: Tensor, weight: Tensor, normalised: Tensor) -> bool:
    """Whether autograd gives the weight what x̂ foretells: a detached one gets nothing, others a part."""
    weight, e = weight.clone().requires_grad_(), a.flip(-1)
    with torch.enable_grad():
        output = _output_with(module, weight, a, training=True)
    if not output.requires_grad:
        return False
    (found,) = torch.autograd.grad(output, weight, e, allow_unused=True)
    return found is not None and _close(found, (e * normalised).sum((0, 1)))


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding; norm layers compute in float32 whatever the model's type."""
    eps = max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = 8 * eps**0.75
    return torch.allclose(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)


def _per_position(values: Tensor, a: Tensor, rows: torch.Size) -> Tensor:
    """[R, T, H, d] or [R, H, T, d] summed over the heads, as [P, d]; [R, T, d] as it is."""
    if values.dim() == 4:
        values = values.sum(3 - _time_axis(a, rows))
    return _flat(values, rows)


def _time_axis(a: Tensor, rows: torch.Size) -> int:
    axes = [axis for axis in (1, 2) if a.shape[axis] == rows[1]]
    base = a._base  # as many heads as positions: the [R, T, H·d] tensor that ``a`` is a view of tells
    if len(axes) == 2 and base is not None and base.shape[:-1] == rows:
        axes = [axis for axis in axes if a.stride(axis) == base.stride(1)]
    if len(axes) == 2 and rows[1] > 1:
        raise ValueError("as many heads as positions, and cannot tell them apart (add a padding column)")
    if not axes:
        raise ValueError(f"{tuple(a.shape[:-1])} positions")
    return axes[0]
