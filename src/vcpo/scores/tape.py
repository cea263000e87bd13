"""Squared score norms of all trajectories from one batched backward pass that finds data gradients only.

Departs from the official VCPO code, which runs one backward pass a trajectory with micro-batches of one and
two more gradient buffers: here nothing is summed into parameters, and a batch may be packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vcpo.errors import NonFiniteError, UnsupportedLayerError, VcpoError
from vcpo.scores.factors import Factor, total_squared_norms
from vcpo.scores.layers import Rule, rule_for
from vcpo.scores.layout import BUDGET, Layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class _Use:
    """One call of one module."""

    module: nn.Module
    input: Tensor
    output: Tensor
    versions: tuple[int, int]

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> _Use:
        a = args[0] if args else next(iter(kwargs.values()))
        return _Use(module, a, output, (a._version, output._version))


class ScoreTape:
    """Records a forward pass, then gives ‖∇_θ Σ_t n_i log π_θ(y_{i,t})‖² of every trajectory i.

    The score norms of OPOB (VCPO, arXiv 2602.17616, b* = Σ w²‖s‖²R / Σ w²‖s‖²), over all trainable
    parameters; frozen ones are left out. Example::

        tape = ScoreTape(model)            # once: looks at every layer
        with tape:                         # each micro-batch
            logits = model(input_ids=ids, position_ids=positions).logits
        objective = (normaliser * log_prob_sums(logits)).sum()
        norms = tape.squared_norms(objective, segments, count, retain_graph=True)

    Trajectories must be independent of each other, as they are in padded rows and in packed rows whose
    position ids restart. All positions count, prompts too: the score reaches them through attention.

    One forward pass a ``with``, measured once. Non-reentrant gradient checkpointing
    works (the layers' inputs are then kept by the tape), reentrant checkpointing raises.

    ``budget`` bounds the numbers that the temporaries of one layer hold, beyond one trajectory's needs.

    Raises UnsupportedLayerError at construction for a module that owns trainable parameters and has no
    rule in :mod:`vcpo.scores.layers`.
    """

    def __init__(self, model: nn.Module, *, budget: int = BUDGET) -> None:
        self._model, self._budget = model, budget
        self._rules: dict[nn.Module, Rule] = {}
        self._names: dict[nn.Module, str] = {}
        self._handles: list[RemovableHandle] = []
        self._uses: list[_Use] = []
        self._recording = False
        self._inspect()

    def _inspect(self) -> None:
        """Name the modules to watch; again at every entry, since parameters may be frozen between."""
        self._names = {module: name for name, module in self._model.named_modules() if _trainable(module)}
        for module, name in self._names.items():
            if module not in self._rules:
                self._rules[module] = rule_for(name, module)

    def __enter__(self) -> ScoreTape:
        self._inspect()
        self._uses.clear()
        self._recording = True
        self._handles = [m.register_forward_hook(self._record, with_kwargs=True) for m in self._names]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if error is not None:
            self._uses.clear()

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        # Checkpointed layers run again during the backward pass: those calls are not uses.
        if self._recording:
            self._uses.append(_Use.of(module, args, kwargs, output))

    def squared_norms(
        self, objective: Float[Tensor, ""], segments: Int[Tensor, "R T"], count: int, *, retain_graph: bool
    ) -> Float[Tensor, " N"]:
        """The squared score norm of each of ``count`` trajectories.

        Formula: ‖∇_θ n_i Σ_t log π_θ(y_{i,t})‖² where ``objective`` = Σ_i n_i Σ_t log π_θ(y_{i,t}). The
        caller normalises: whatever factor n_i (length, truncated weight) the update gives a trajectory
        belongs in the objective, so that norm and update are of the same thing.

        Shapes: ``segments`` has the trajectory of each position of the rows that the model saw, -1 on
        padding; the result is [count], in float32 or the model's precision if that is better. A
        trajectory without sampled tokens has norm exactly 0.

        No gradient flows through the result and none reaches ``.grad``. ``retain_graph=True`` leaves the
        graph usable for an ordinary backward pass.

        Raises UnsupportedLayerError, naming the module, if a layer was bypassed, saw other positions than
        R × T, or ran without gradient; NonFiniteError naming the first trajectory whose norm is NaN or
        infinite.
        """
        self._recording = False
        if not objective.requires_grad:
            raise VcpoError("the objective has no gradient: was it computed under no_grad, or detached?")
        self._check_calls()
        layout = Layout.of(segments, count, self._budget)
        outputs = [use.output for use in self._uses]
        grads = torch.autograd.grad(objective, outputs, retain_graph=retain_graph, allow_unused=True)
        with torch.no_grad():
            gradients = self._gradients(grads, segments.shape)
            self._check_bypass(objective, gradients)
            self._uses.clear()  # or the tape would keep activations alive through the optimizer's step
            norms = total_squared_norms(gradients.values(), layout)
        return _finite(norms)

    def _check_calls(self) -> None:
        called = {use.module for use in self._uses}
        for module in self._names:
            if module not in called:
                raise self._unsupported(
                    module, "was not called while the tape ran: call the module itself, or freeze it"
                )
        for use in self._uses:
            if not use.output.requires_grad:
                raise self._unsupported(
                    use.module,
                    "ran without gradient: use no torch.no_grad, and no reentrant gradient checkpointing",
                )
            if use.versions != (use.input._version, use.output._version):
                raise self._unsupported(use.module, "had its input or output changed in place after the call")

    def _gradients(
        self, grads: Sequence[Tensor | None], rows: torch.Size
    ) -> dict[nn.Parameter, list[Factor]]:
        """The factors of each trainable parameter's gradient, one for each use that reaches the objective."""
        gradients: dict[nn.Parameter, list[Factor]] = {}
        for use, grad in zip(self._uses, grads, strict=True):
            if grad is None:
                continue
            try:
                factors = self._rules[use.module](use.module, use.input, grad, rows)
            except ValueError as error:
                raise self._unsupported(
                    use.module, f"saw {error}, but the segments are {tuple(rows)} (rows, positions)"
                ) from error
            for name, parameter in _trainable(use.module).items():
                gradients.setdefault(parameter, []).append(factors[name])
        if not gradients:
            raise VcpoError("the objective does not depend on the recorded forward pass: use its own logits")
        return gradients

    def _check_bypass(self, objective: Tensor, gradients: Mapping[nn.Parameter, list[Factor]]) -> None:
        """A parameter that the graph meets more often than the hooks was used outside its modules."""
        met = _parameter_edges(objective)
        for name, parameter in self._model.named_parameters():
            if met[parameter] > len(gradients.get(parameter, ())):
                raise UnsupportedLayerError(
                    f"parameter {name} is also used outside the forward call of its module: its score norm "
                    "would lack that part; call the module, or freeze the parameter"
                )

    def _unsupported(self, module: nn.Module, what: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(f"module {self._names[module]} ({type(module).__name__}) {what}")


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own trainable parameters."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def _parameter_edges(objective: Tensor) -> Counter[Tensor]:
    """How often the autograd graph below ``objective`` meets each parameter."""
    met: Counter[Tensor] = Counter()
    seen, stack = {objective.grad_fn}, [objective.grad_fn]
    while stack:
        node = stack.pop()
        for below, _ in node.next_functions if node is not None else ():
            if (leaf := getattr(below, "variable", None)) is not None:
                met[leaf] += 1
            elif below not in seen:
                seen.add(below)
                stack.append(below)
    return met


def _finite(norms: Tensor) -> Tensor:
    bad = ~norms.isfinite()
    if bad.any():
        index = int(bad.nonzero()[0])
        raise NonFiniteError("squared score norm", index, "check its log-probabilities and the weights")
    return norms
