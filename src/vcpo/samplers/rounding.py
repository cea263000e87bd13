"""What a sampler with fewer bits makes of the weights that the learner publishes.

``sampler.quantization`` rounds the matrices of all linear layers but the head, as vLLM does; embeddings,
head, norms, biases and adapters stay. With Q the values that the format can hold:

====== =============================== ================================================
format scale s                         values
====== =============================== ================================================
fp8    max |W| / 448, a matrix         s · float8_e4m3(W / s)
int8   max |w| / 127, an output (row)  s · q, q whole, −127 … 127
int4   max |w| / 7, 32 inputs of a row s · q, q whole, −7 … 7
====== =============================== ================================================

to the nearest, ties to even (the last group of a row may be shorter than 32). What is kept are the rounded
values in the replica's own number type: the numerics of a quantised engine, not its speed or size.
Activations are not rounded. ``sampler.dtype`` then casts everything but adapters.

Each step is exact or correctly rounded, so equal weights give equal bits on every machine. Hence the proof of
a publication: the learner rounds what it publishes itself, and compares the checksum of that with the
checksum of what the sampler serves. No tolerance is needed, as a probe of log-probs would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vcpo.config import SamplerConfig
from vcpo.errors import ModelError
from vcpo.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float

GROUP = 32
"""Inputs of an int4 row that share a scale."""
LARGEST_FP8 = 448.0
"""Of float8_e4m3."""

Matrix = Callable[[Tensor], Tensor]


def to_fp8(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
    scale = _scale(matrix.abs().amax(), LARGEST_FP8)
    inside = (matrix / scale).clamp(-LARGEST_FP8, LARGEST_FP8)
    return inside.to(torch.float8_e4m3fn).to(matrix.dtype) * scale


def to_int8(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
    return _to_whole(matrix, 127)


def to_int4(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
    outputs, inputs = matrix.shape
    padded = nn.functional.pad(matrix, (0, -inputs % GROUP))  # zeros change no maximum
    return _to_whole(padded.reshape(-1, GROUP), 7).view(outputs, -1)[:, :inputs]


def _to_whole(rows: Tensor, largest: int) -> Tensor:
    scale = _scale(rows.abs().amax(-1, keepdim=True), largest)
    return (rows / scale).round().clamp(-largest, largest) * scale


def _scale(maximum: Tensor, largest: float) -> Tensor:
    scale = maximum / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)


FORMATS: dict[str, Matrix] = {"fp8": to_fp8, "int8": to_int8, "int4": to_int4}


class Rounding:
    """How the weights of one model are rounded for one sampler; call it with a name and its tensor."""

    def __init__(self, model: PreTrainedModel, config: SamplerConfig) -> None:
        """Raises ModelError, naming it, for a matrix that no format is known for."""
        self._dtype: torch.dtype | None = None if config.dtype == "same" else getattr(torch, config.dtype)
        self._format = FORMATS.get(config.quantization)
        named = model.state_dict(keep_vars=True)
        parameters = {id(p) for p in _without_adapters(model)}
        self._cast = {name for name, tensor in named.items() if id(tensor) in parameters}
        matrices = _matrices(model) if self._format is not None else {}
        self._rounded = {
            name: matrices[id(tensor)]
            for name, tensor in named.items()
            if name in self._cast and id(tensor) in matrices
        }

    @property
    def changes_nothing(self) -> bool:
        return self._dtype is None and self._format is None

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What is served for the published ``tensor``, in the number type that it is served in."""
        if name not in self._cast:
            return tensor
        served = self._dtype or tensor.dtype
        if self._format is not None and name in self._rounded:
            exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            inputs_first = self._rounded[name]
            tensor = self._format(exact.T).T if inputs_first else self._format(exact)
        return tensor.to(served)

    def apply(self, model: nn.Module) -> None:
        """Round the weights of a model in place."""
        if not self.changes_nothing:
            for name, parameter in model.named_parameters():
                parameter.data = self(name, parameter.data)

    def of_published(self, weights: Weights) -> Weights:
        """What is served for all published weights, each rounded when it is asked for."""
        return weights if self.changes_nothing else _Rounded(weights, self)


class _Rounded(Mapping[str, Tensor]):
    def __init__(self, weights: Weights, rounding: Rounding) -> None:
        self._weights, self._rounding = weights, rounding

    def __getitem__(self, name: str) -> Tensor:
        return self._rounding(name, self._weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _without_adapters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters; where some are frozen and others are not, the frozen ones."""
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    return frozen if 0 < len(frozen) < len(parameters) else parameters


def _matrices(model: PreTrainedModel) -> dict[int, bool]:
    """The matrices to round, by id; true where the inputs come first."""
    head = model.get_output_embeddings()
    kept = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set[int]()
    found: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in kept:
            found[id(module.weight)] = isinstance(module, Conv1D)
        if isinstance(module, nn.Embedding):
            kept.add(id(module.weight))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in found.keys() | kept:
            raise ModelError(
                f"sampler.quantization rounds linear layers, and {name} of {type(model).__name__}, of shape "
                f"{tuple(parameter.shape)}, is of none (experts of a mixture?): set it to none"
            )
    return {place: turned for place, turned in found.items() if place not in kept}
