"""Log-probabilities of given tokens from a head that never holds all logits: piece by piece, both ways.

With hidden states h [N, D], the head's product z = h Wᵀ + b, logits l = curve(z) and tokens y,

    log π(y_t) = l_t,y − log Σ_v e^{l_t,v}
    E_t,v = g_t (1[v = y_t] − π_t,v) l'(z_t,v)          the gradient of z, for g of the log-probabilities

and W has the gradient EᵀH, h has E W. As E is g times what the forward pass knows, E W is found there, from
the logits of each piece while they exist, and kept as [N, D]. E itself is computed again from h and W by
whoever needs it: the weight gradient, and the score norms (:class:`LogitGradients`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vcpo.errors import VcpoError
from vcpo.scores.layout import precise
from vcpo.scores.proxies import token_distributions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Curve:
    """From a head's product z to the logits that tokens are sampled from: s z / τ, or c tanh(s z / c) / τ."""

    scale: float = 1.0
    """s."""
    cap: float | None = None
    """c."""
    temperature: float = 1.0
    """τ."""

    def __call__(self, z: Tensor) -> Tensor:
        return self.with_slope(z)[0]

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        """The logits, a tensor of their own or z itself, and their derivative."""
        slope = self.scale / self.temperature
        if self.cap is None:
            return (z if slope == 1 else z * slope), slope
        bent = (z * (self.scale / self.cap)).tanh_()
        return bent * (self.cap / self.temperature), bent.square().neg_().add_(1).mul_(slope)


@dataclass
class Question:
    """What a head is asked in one call. N tokens, each to be predicted from one hidden state."""

    tokens: Int[Tensor, " N"]
    curve: Curve
    budget: int
    """The most logits that exist at once; those of one token do in any case."""
    log_normalisers: Float[Tensor, " N"] | None = None
    """log Σ_v e^l of each token; the head's answer, for whoever needs probabilities again."""
    number_type: torch.dtype | None = None
    """In which the head multiplied; the head's answer too."""
    version: int = 0
    """Of weight and bias in the call (:func:`version_of`); noted by a tape, as a compiler would make it a
    constant."""
    wants_distributions: bool = False
    """Whether entropy and energy of each token's distribution are asked for too."""
    distributions: Float[Tensor, "2 N"] | None = None
    """The answer to that."""
    of_activations_only: bool = False
    """The backward pass shall leave out the gradients of weight and bias; autograd does not tell it."""


class LogProbHead(nn.Linear):
    """A linear head that can also be asked for log-probabilities of tokens, [N, D] to [N].

    An ``nn.Linear`` becomes one by ``head.__class__ = LogProbHead``: there is nothing to initialise. Without
    a question it is the linear layer it was. Asked through its call, so that hooks (a tape's, FSDP's) see it:
    log-probabilities in float32 or better, with gradient for hidden states, weight and bias, and never more
    than ``question.budget`` logits at once in either direction. Products are in the number type that the
    layer would use, autocast's where it is on.
    """

    def forward(self, input: Tensor, question: Question | None = None) -> Tensor:
        if question is None:
            return super().forward(input)
        hidden, weight, bias = _as_autocast_would(input, self.weight, self.bias)
        question.number_type = hidden.dtype
        log_probs, question.log_normalisers, question.distributions = _LogProbs.apply(
            hidden, weight, bias, question, torch.is_grad_enabled()
        )
        return log_probs


def _as_autocast_would(hidden: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, *parameters
    number_type = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(number_type) for t in (hidden, *parameters))


class _LogProbs(torch.autograd.Function):
    """(hidden, weight, bias) to (log-probabilities, their normalisers, their distributions)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, question: Question, graded: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = precise(hidden[:0]).new_empty(2, len(hidden))
        distributions = found.new_empty(2, len(hidden) if question.wants_distributions else 0)
        directions = torch.empty_like(hidden) if graded and ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(hidden), len(weight), question.budget):
                z = functional.linear(hidden[part], weight, bias)
                logits, slope = question.curve.with_slope(precise(z))
                tokens, normalisers = question.tokens[part], logits.logsumexp(-1)
                found[0, part] = logits.gather(-1, tokens[:, None])[:, 0] - normalisers
                found[1, part] = normalisers
                if question.wants_distributions:
                    distributions[:, part] = token_distributions(logits, tokens)
                if directions is not None:
                    e = _surprises(logits, normalisers, tokens).mul_(slope)
                    torch.mm(e.to(hidden.dtype), weight, out=directions[part])
        log_probs, normalisers = found[0].clone(), found[1].clone()
        ctx.save_for_backward(hidden, weight, bias, normalisers, directions)
        ctx.question = question
        ctx.mark_non_differentiable(normalisers, distributions)
        return log_probs, normalisers, distributions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, normalisers, directions = ctx.saved_tensors
        question: Question = ctx.question
        of_hidden = None if directions is None else (grad[:, None] * directions).to(hidden.dtype)
        if question.of_activations_only or not any(ctx.needs_input_grad[1:3]):
            return of_hidden, None, None, None, None
        rows = LogitGradients(
            hidden=hidden,
            weight=weight,
            bias=bias,
            tokens=question.tokens,
            log_normalisers=normalisers,
            version=version_of(weight, bias),
            grads=grad,
            curve=question.curve,
            budget=question.budget,
        )
        of_weight, of_bias = (
            torch.zeros_like(p, dtype=precise(p[:0]).dtype) if needed else None
            for p, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for part, e in rows.pieces():
                if of_weight is not None:
                    add_product(of_weight, e, hidden[part])
                if of_bias is not None:
                    of_bias.add_(e.sum(0, dtype=of_bias.dtype))
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


@dataclass(frozen=True)
class LogitGradients:
    """E [N, V], the gradient of a head's product, as a matrix whose parts are computed when they are read.

    A part is what autograd would have found for it, in the number type of the product.
    """

    hidden: Float[Tensor, "N D"]
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None
    tokens: Int[Tensor, " N"]
    log_normalisers: Float[Tensor, " N"]
    version: int
    """Of weight and bias when log-probabilities were found."""
    grads: Float[Tensor, " N"]
    """Of the log-probabilities."""
    curve: Curve
    budget: int
    """The most numbers of a piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, V)."""
        return len(self.hidden), len(self.weight)

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "n V"]]]:
        """All of it, some tokens after others."""
        for part in _parts(*self.shape, self.budget):
            yield part, self.part(part)

    def strips(self) -> Iterator[Float[Tensor, "N w"]]:
        """All of it, some of the vocabulary after others."""
        count, width = self.shape
        for vocabulary in _parts(width, count, self.budget):
            yield self.part(slice(None), vocabulary)

    def part(
        self, tokens: slice | Int[Tensor, " n"], vocabulary: slice = slice(None)
    ) -> Float[Tensor, "n w"]:
        """The rows of some tokens, in the columns of a part of the vocabulary."""
        z = functional.linear(self.hidden[tokens], *self._parameters_of(vocabulary))
        logits, slope = self.curve.with_slope(precise(z))
        first = self.tokens[tokens] - (vocabulary.start or 0)
        return self._finished(_surprises(logits, self.log_normalisers[tokens], first), slope, tokens)

    def elements(self, tokens: Int[Tensor, "n S"], columns: Int[Tensor, "n T"]) -> Float[Tensor, "n S T"]:
        """Of each of n lists of tokens, the columns that the list beside it names."""
        weight, bias = self._parameters_of(columns)
        hidden, weight = self.hidden[tokens], weight.mT
        z = hidden @ weight if bias is None else torch.baddbmm(bias[:, None], hidden, weight)
        logits, slope = self.curve.with_slope(precise(z))
        chosen = self.tokens[tokens][:, :, None] == columns[:, None, :]
        others = logits.sub(self.log_normalisers[tokens][..., None]).exp_()
        return self._finished(chosen.to(others) - others, slope, tokens)

    def _parameters_of(self, columns: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight's rows and the bias of these columns, in the number type of the product."""
        if version_of(self.weight, self.bias) != self.version:
            raise VcpoError(
                "the head's weights have changed since the forward pass, and its gradient is made from them: "
                "measure, and use the record, before the next optimizer step"
            )
        weight, bias = self.weight[columns], None if self.bias is None else self.bias[columns]
        return weight.to(self.hidden.dtype), None if bias is None else bias.to(self.hidden.dtype)

    def _finished(self, e: Tensor, slope: Tensor | float, tokens: slice | Tensor) -> Tensor:
        return e.mul_(slope).mul_(self.grads[tokens][..., None]).to(self.hidden.dtype)


def version_of(weight: Tensor, bias: Tensor | None) -> int:
    """Another number after either was changed in place."""
    return weight._version + (0 if bias is None else bias._version)


def _surprises(
    logits: Float[Tensor, "n w"], log_normalisers: Float[Tensor, " n"], tokens: Int[Tensor, " n"]
) -> Float[Tensor, "n w"]:
    """1[v = y] − π; y counts from the first column and may lie outside. Made in place, in ``logits``."""
    e = logits.sub_(log_normalisers[:, None]).exp_().neg_()
    inside = (tokens >= 0) & (tokens < e.shape[1])
    return e.scatter_add_(1, tokens.clamp(0, e.shape[1] - 1)[:, None], inside.to(e.dtype)[:, None])


def add_product(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """total += rowsᵀ columns, where total may be of a better number type."""
    if rows.dtype == total.dtype:
        total.addmm_(rows.mT, columns)
    else:
        total.add_(rows.mT @ columns)


def _parts(count: int, width: int, budget: int) -> Iterator[slice]:
    """Slices of ``count`` rows, each of at most ``budget`` numbers or one row; an empty one of no rows."""
    step = max(1, budget // max(width, 1))
    return (slice(begin, min(begin + step, count)) for begin in range(0, max(count, 1), step))
