"""Squared score norms of all trajectories, and then their weighted gradient, from one batched backward pass.

A forward hook puts an identity function, a *tap*, on the output of every module that owns trainable
parameters. In the backward pass a tap sees the module's input A and the gradient E of its output, which
together are each trajectory's gradient of the module's weights. `docs/scores.md` has the algebra.

Departs from the official VCPO code, which runs one backward pass a trajectory with micro-batches of one and
two more gradient buffers: here a batch may be packed, and every product of a plain step is done once.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from vcpo.errors import NonFiniteError, UnsupportedLayerError, VcpoError
from vcpo.scores.choice import METHODS, Choice
from vcpo.scores.collector import Collector
from vcpo.scores.factors import Factor, Vector
from vcpo.scores.head import Question, version_of
from vcpo.scores.layers import Rule, asked_head, rule_for
from vcpo.scores.layout import BUDGET, Layout
from vcpo.scores.record import Record, ScoreNorms, is_sharded
from vcpo.scores.sketch import Signs

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class _Use:
    """One call of one module, with the parameters it had then (FSDP gathers them for the call)."""

    module: nn.Module
    name: str
    parameters: Mapping[str, Tensor]
    question: Question | None = None
    """What a head was asked beside its input."""


@dataclass(frozen=True)
class _Selection:
    """N of the R × T positions, which are all that some modules saw."""

    owners: Tensor
    """[N] the trajectory of each; -1: padding."""
    layout: Layout

    @staticmethod
    def of(segments: Tensor, selected: Tensor, count: int, budget: int) -> _Selection:
        if selected.dim() != 1 or selected.is_floating_point() or selected.dtype == torch.bool:
            raise VcpoError(
                f"selected must be whole numbers of shape [N], not {selected.dtype} {tuple(selected.shape)}"
            )
        if len(selected) and not 0 <= int(selected.min()) <= int(selected.max()) < segments.numel():
            raise VcpoError(
                f"selected names position {int(selected.min())} or {int(selected.max())}; positions are "
                f"numbered row by row, 0 to {segments.numel() - 1}"
            )
        owners = segments.flatten()[selected]
        return _Selection(owners, Layout.of(owners, count, budget))


@dataclass
class _Recording:
    """One forward pass."""

    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """A leaf that every tap depends on: a backward pass to it alone passes all taps and no parameter."""
    uses: Counter[Tensor] = field(default_factory=Counter)
    """How often each parameter was used."""
    names: dict[Tensor, str] = field(default_factory=dict)
    owners: dict[Tensor, tuple[nn.Module, str]] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)
    without_gradient: nn.Module | None = None
    last: nn.Module | None = None
    sink: Callable[[_Use, Tensor, Tensor], None] | None = None
    """Who takes (use, A, E) while a measuring backward pass runs."""


class _Tap(torch.autograd.Function):
    """The identity, which shows (A, E) to the recording on the way back.

    A is saved the way autograd saves tensors, so that checkpointing may drop and recompute it.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, a: Tensor, anchor: Tensor, recording: _Recording, use: _Use
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.set_materialize_grads(False)
        ctx.recording, ctx.use = recording, use
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if grad is not None and ctx.recording.sink is not None:
            ctx.recording.sink(ctx.use, _saved_input(ctx), grad)
        return grad, None, None, None, None


def _saved_input(ctx: Any) -> Tensor:
    try:
        (a,) = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise UnsupportedLayerError(
            f"{ctx.use.name} had its input changed in place after the call"
        ) from error
    return a


class ScoreTape:
    """Records a forward pass; gives ‖∇_θ Σ_t n_i log π_θ(y_{i,t})‖² of every trajectory i, then Σ c_i ∇.

    The score norms of OPOB (VCPO, arXiv 2602.17616, b* = Σ w²‖s‖²R / Σ w²‖s‖²), over all trainable
    parameters; frozen ones are left out. Example::

        tape = ScoreTape(model)            # once: looks at every layer
        with tape:                         # each micro-batch
            logits = model(input_ids=ids, position_ids=positions).logits
        objective = (normaliser * log_prob_sums(logits)).sum()
        record = tape.measure(objective, segments, count)       # one backward over activations
        baseline = optimal_baseline(rewards, log_weights, record.squared_norms, groups)
        record.backward(-weights * (rewards - baseline))        # adds to .grad, like loss.backward()

    Trajectories must be independent of each other, as they are in padded rows and in packed rows whose
    position ids restart. All positions count, prompts too: the score reaches them through attention.

    ``method``: ``"sketched"`` estimates norms from random projections where that is cheaper than finding
    them exactly, ``"exact"`` never does (:mod:`vcpo.scores.choice`). ``seed`` decides the projections; set
    :attr:`seed` to another number each step to draw them anew. ``only``: names of modules to which the
    norms are restricted. ``budget`` bounds the numbers that temporaries of one layer hold, beyond one
    trajectory's needs.

    Make it after wrapping the model (LoRA, ``fully_shard``) and before the first call of a compiled model.
    Its hooks do nothing outside ``with``; they go with the tape, or by :meth:`remove` (needed before the
    model is pickled). Non-reentrant gradient checkpointing works; what cannot be measured raises and is
    named, nothing is left out in silence. What a tape cannot see: forward hooks that are put before its own
    later and change outputs, and a module that is shown the positions of a row in another order. Outputs of
    watched modules are views: write ``logits / temperature``, not ``logits /= temperature``. A recorded pass
    through checkpointed layers is to be measured: an ordinary backward pass of it ends in torch's
    CheckpointError.

    Raises UnsupportedLayerError at construction for a module that owns trainable parameters and has no
    rule in :mod:`vcpo.scores.layers`, and for DistributedDataParallel; VcpoError for an unknown method or
    module name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str | Choice = "sketched",
        seed: int = 0,
        only: Collection[str] | None = None,
        budget: int = BUDGET,
    ) -> None:
        self.seed = seed
        self._model, self._budget = model, budget
        self._only = [only] if isinstance(only, str) else only
        self._choice = _choice_named(method)
        _refuse_replicas(model)
        self._rules: dict[nn.Module, Rule] = {}
        self._names: dict[nn.Module, str] = {}
        self._registered: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._recording: _Recording | None = None
        self._open = False
        self._signs = Signs(seed, self._choice.columns)
        self._inspect()
        # A compiled model is cut there: autograd sees no tensor inside a compiled piece.
        hook: Any = torch.compiler.disable(
            _hook_of(weakref.ref(self)), reason="a ScoreTape watches it: leave out fullgraph=True"
        )
        # On every module, frozen or not: it may be thawed later. Before other hooks, such as FSDP's, which
        # takes gathered parameters away.
        handles = [
            module.register_forward_hook(hook, with_kwargs=True, prepend=True)
            for module in model.modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        self.remove = weakref.finalize(self, _remove_all, handles)
        """Takes the hooks off the model; the tape is then of no more use."""

    def _inspect(self) -> None:
        """Name the modules to watch; again at every entry, since parameters may be frozen between."""
        watched = {module: _clean(name) for name, module in self._model.named_modules() if _trainable(module)}
        if self._only is not None:
            unknown = {*self._only} - {*watched.values()}
            if unknown:
                raise VcpoError(f"no module with trainable parameters is called {', '.join(sorted(unknown))}")
            watched = {module: name for module, name in watched.items() if name in self._only}
        self._names = watched
        for module, name in watched.items():
            if module not in self._rules:
                self._rules[module] = rule_for(name, module)
            for own, parameter in _trainable(module).items():
                known = self._registered.get((module, own))
                # FSDP shows gathered parameters at times; the sharded one is what the optimizer steps.
                if known is None or not is_sharded(known) or is_sharded(parameter):
                    self._registered[module, own] = parameter

    def __enter__(self) -> ScoreTape:
        self._inspect()
        self._recording, self._open = _Recording(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if error is None or self._recording is None:
            return
        last, self._recording = self._recording.last, None
        if isinstance(error, RuntimeError) and "is a view" in str(error) and last is not None:
            raise self._unsupported(
                last, "(or one called before it) had its output changed in place: let the next operation copy"
            ) from error

    def _tap(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        recording = self._recording
        if recording is None or module not in self._names:
            return None
        # Checkpointed layers run again during the measuring pass: tapped too, as they were, but not counted.
        if recording.sink is None and (not self._open or _in_backward_pass()):
            return None
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        questions = [value for value in given if isinstance(value, Question)]
        given = [value for value in given if not isinstance(value, Question)]
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
            raise self._unsupported(
                module, "was called with more than one tensor, or gave more: its rule is for one in, one out"
            )
        for question in questions:
            question.version = version_of(*_head_of(module))
        use = _Use(module, self._name(module), _trainable(module), *questions)
        if self._open:
            self._note(recording, use, output)
        return _Tap.apply(output, given[0], recording.anchor, recording, use)

    def _note(self, recording: _Recording, use: _Use, output: Tensor) -> None:
        recording.called.add(use.module)
        recording.last = use.module
        if not output.requires_grad:
            recording.without_gradient = recording.without_gradient or use.module
        for own, parameter in use.parameters.items():
            if is_sharded(parameter):
                raise self._unsupported(
                    use.module, f"has only a part of {own} in its call (tensor parallel): shard it by FSDP2"
                )
            if not parameter.is_leaf:
                raise self._unsupported(
                    use.module, f"computes {own} from other parameters in its call (functional_call)"
                )
            if (use.module, own) not in self._registered:
                raise self._unsupported(
                    use.module, f"had its {own} thawed while the tape ran: thaw it before"
                )
            if parameter._backward_hooks:
                raise self._unsupported(
                    use.module, f"has a gradient hook on {own}, which norms would not know: remove it"
                )
            recording.uses[parameter] += 1
            recording.names.setdefault(parameter, f"{self._names[use.module]}.{own}".lstrip("."))
            recording.owners.setdefault(parameter, (use.module, own))

    def measure(
        self,
        objective: Float[Tensor, ""],
        segments: Int[Tensor, "R T"],
        count: int,
        selected: Int[Tensor, " N"] | None = None,
    ) -> Record:
        """Squared score norms now; the gradient when coefficients are known, by :meth:`Record.backward`.

        Formula: ‖∇_θ n_i Σ_t log π_θ(y_{i,t})‖² where ``objective`` = Σ_i n_i Σ_t log π_θ(y_{i,t}). The
        caller normalises: whatever factor n_i (length, truncated weight) the update gives a trajectory
        belongs in the objective or in the coefficients, so that norm and update are of the same thing.

        Shapes: ``segments`` has the trajectory of each position of the rows that the model saw, -1 on
        padding; norms are [count], in float32 or the model's precision if that is better. A trajectory
        without sampled tokens has norm exactly 0. ``selected``: where a module was shown N of the positions
        only, as [N, ·] (a head, where tokens were sampled), which these are, counted row by row.

        The backward pass finds gradients of activations only; nothing reaches ``.grad``, and the graph is
        freed. No gradient flows through the result.

        Raises UnsupportedLayerError, naming the module, if a layer was bypassed, saw other positions than
        R × T, or ran without gradient; NonFiniteError naming the first trajectory whose norm is NaN or
        infinite; VcpoError if the objective does not come from the recorded forward pass.
        """
        if self._only is not None:
            raise VcpoError("a tape restricted by only= has no whole gradient to give: use squared_norms")
        for (module, own), parameter in self._registered.items():
            if parameter._post_accumulate_grad_hooks:
                raise self._unsupported(
                    module, f"has a hook on the finished gradient of {own}, which a record would not call"
                )
        return self._run(objective, segments, count, selected, keep=True, whole=False)

    def squared_norms(
        self,
        objective: Float[Tensor, ""],
        segments: Int[Tensor, "R T"],
        count: int,
        selected: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " B"]:
        """:meth:`norms`, without what else is known of them."""
        return self.norms(objective, segments, count, selected).squared_norms

    def norms(
        self,
        objective: Float[Tensor, ""],
        segments: Int[Tensor, "R T"],
        count: int,
        selected: Int[Tensor, " N"] | None = None,
    ) -> ScoreNorms:
        """The norms alone, of :meth:`measure`: keeps nothing, for when memory is short.

        The gradient then takes a second forward pass. Shapes, normalisation and errors as there.
        """
        return self._run(objective, segments, count, selected, keep=False, whole=False)

    def backward(
        self,
        objective: Float[Tensor, ""],
        segments: Int[Tensor, "R T"],
        count: int,
        selected: Int[Tensor, " N"] | None = None,
    ) -> ScoreNorms:
        """``objective.backward()``, with the norms found on its way: keeps nothing.

        For coefficients that are the same for all trajectories of a micro-batch, or linear in something
        known, so that gradients can be accumulated before they are scaled. Shapes, normalisation and errors
        as in :meth:`measure`; after an error, ``.grad`` may hold what led to it: zero it.
        """
        return self._run(objective, segments, count, selected, keep=False, whole=True)

    def _run(
        self,
        objective: Tensor,
        segments: Tensor,
        count: int,
        selected: Tensor | None,
        *,
        keep: bool,
        whole: bool,
    ) -> Record:
        recording = self._check(objective)
        _check_segments(segments)
        layout = Layout.of(segments, count, self._budget)
        selection = None if selected is None else _Selection.of(segments, selected, count, self._budget)
        if self._signs.seed != self.seed:
            self._signs = Signs(self.seed, self._choice.columns)
        collector = Collector(layout, self._choice, self._signs, recording.uses, recording.names, keep=keep)
        edges = _parameter_edges(objective)
        paddings = [_padding(segments), _padding(segments if selection is None else selection.owners)]
        reached: list[tuple[_Use, Tensor]] = []

        def take(use: _Use, a: Tensor, e: Tensor) -> None:
            with torch.no_grad():
                if use.question is not None:
                    use.question.of_activations_only = not whole
                factors = self._factors(use, a, e, segments.shape, selection)
                padding = paddings[e.dim() < 3]
                if len(padding):
                    reached.append((use, _reaches(padding, e, factors)))
                for parameter, factor in factors:
                    collector.add(parameter, factor)

        recording.sink = take
        no_autocast = torch.autocast(objective.device.type, enabled=False)  # sums of squares need all digits
        try:
            with no_autocast:
                if whole:
                    objective.backward()
                else:
                    torch.autograd.grad(objective, recording.anchor, allow_unused=True)
        finally:
            recording.sink, self._recording = None, None
        if not collector.arrived:
            raise VcpoError("the objective does not depend on the recorded forward pass: use its own logits")
        self._check_bypass(recording, edges, collector.arrived)
        with torch.no_grad(), no_autocast:
            norms, variances = collector.finish()
        norms = _finite(norms)
        _check_padding(reached)
        errors = variances.sqrt() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        # In the order of the forward pass: ranks that reduce one parameter after another must agree on it.
        kept = {
            self._registered[recording.owners[p]]: collector.kept[p]
            for p in recording.names
            if p in collector.kept
        }
        return Record(norms, errors, collector.methods, kept, layout)

    def _check(self, objective: Tensor) -> _Recording:
        if objective.dim():
            raise VcpoError(f"the objective has shape {tuple(objective.shape)}: give the sum, one number")
        if not objective.requires_grad:
            raise VcpoError("the objective has no gradient: was it computed under no_grad, or detached?")
        recording = self._recording
        if recording is None or self._open:
            raise VcpoError(
                "nothing is recorded: run the forward pass inside `with tape:`, measure it after, once"
            )
        for name, module in self._model.named_modules():
            if self._only is None and module not in self._names and _trainable(module):
                raise UnsupportedLayerError(
                    f"module {_clean(name)} ({type(module).__name__}) became trainable while the tape ran: "
                    "thaw it before"
                )
        for module in self._names:
            if module not in recording.called:
                raise self._unsupported(
                    module,
                    "was not called while the tape ran: call the module itself, or freeze it (a compiled "
                    "model needs the tape before its first call)",
                )
        if recording.without_gradient is not None:
            raise self._unsupported(
                recording.without_gradient,
                "ran without gradient: use no torch.no_grad, and no reentrant gradient checkpointing",
            )
        return recording

    def _factors(
        self, use: _Use, a: Tensor, e: Tensor, rows: torch.Size, selection: _Selection | None
    ) -> list[tuple[Tensor, Factor]]:
        chosen = selection if e.dim() < 3 else None  # all other modules give [R, T, ·]
        seen = rows if chosen is None else chosen.owners.shape
        try:
            if use.question is not None:
                factors = asked_head(*self._as_called(use, use.question), a, e, seen)
            else:
                factors = self._rules[use.module](use.module, a, e, seen)
        except ValueError as error:
            which = (
                f"of which {len(chosen.owners)} are selected"
                if chosen is not None
                else "none of them selected (selected= says which positions a head was shown)"
            )
            raise self._unsupported(
                use.module, f"saw {error}, but the segments are {tuple(rows)} (rows, positions), {which}"
            ) from error
        found = [(parameter, factors[own]) for own, parameter in use.parameters.items()]
        if chosen is None:
            return found
        return [(p, replace(f, layout=chosen.layout)) for p, f in found]

    def _as_called(self, use: _Use, question: Question) -> tuple[Question, Tensor, Tensor | None]:
        """Weight and bias as they were in the call; FSDP's as copies, since it takes gathered ones away."""
        weight, bias = _head_of(use.module)
        weight, bias = use.parameters.get("weight", weight), use.parameters.get("bias", bias)
        if any(is_sharded(p) for (module, _), p in self._registered.items() if module is use.module):
            weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
            question = replace(question, version=version_of(weight, bias))
        return question, weight, bias

    def _check_bypass(self, recording: _Recording, edges: Counter[Tensor], arrived: Counter[Tensor]) -> None:
        """A parameter that the graph meets more often than the taps was used outside its modules."""
        if self._only is not None:
            return
        for parameter, name in recording.names.items():
            if edges[parameter] > arrived[parameter]:
                raise UnsupportedLayerError(
                    f"parameter {name} is also used outside the forward call of its module: its score norm "
                    "would lack that part; call the module, or freeze the parameter"
                )

    def _unsupported(self, module: nn.Module, what: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(f"{self._name(module)} {what}")

    def _name(self, module: nn.Module) -> str:
        return f"module {self._names[module]} ({type(module).__name__})"


def _head_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer."""
    return module.weight, module.bias


def _refuse_replicas(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise UnsupportedLayerError(
                f"module {name or 'the model itself'} ({type(module).__name__}) averages the gradients of "
                "ordinary backward passes only, and a record's would stay apart: use fully_shard (FSDP2), or "
                "give the tape the module within and average .grad yourself"
            )


def _hook_of(tape: weakref.ref[ScoreTape]) -> Callable[..., Tensor | None]:
    """A forward hook that does not keep its tape alive."""

    def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        owner = tape()
        return None if owner is None else owner._tap(module, args, kwargs, output)

    return tap


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _padding(owners: Tensor) -> Tensor:
    return (owners.flatten() < 0).nonzero()[:, 0]


def _reaches(padding: Tensor, e: Tensor, factors: list[tuple[Tensor, Factor]]) -> Tensor:
    """Whether E is not 0 somewhere on padding. With heads (four axes), the factors have it by position."""
    if e.dim() == 4 and isinstance(vector := factors[0][1], Vector) and isinstance(vector.values, Tensor):
        e = vector.values
    elif e.dim() == 1:
        e = e[:, None]
    return e.reshape(-1, e.shape[-1])[padding].any()


def _check_padding(reached: list[tuple[_Use, Tensor]]) -> None:
    """Nothing on padding is anybody's: what a prompt that is called padding adds would be lost."""
    for use, found in reached:
        if found:
            raise VcpoError(
                f"the objective depends, through {use.name}, on positions that the segments call padding: "
                "give every position that a trajectory attends to, its prompt's too, that trajectory's number"
            )


def _check_segments(segments: Tensor) -> None:
    if segments.dim() != 2 or segments.is_floating_point() or segments.dtype == torch.bool:
        raise VcpoError(
            f"segments must be whole numbers of shape [R, T], not {segments.dtype} {tuple(segments.shape)}"
        )
    if segments.numel() and int(segments.min()) < -1:
        raise VcpoError(f"segments name trajectory {int(segments.min())}; padding is -1")


def _choice_named(method: str | Choice) -> Choice:
    if isinstance(method, Choice):
        return method
    if method not in METHODS:
        raise VcpoError(f"no score-norm method {method!r}: choose {' or '.join(METHODS)}")
    return METHODS[method]


def _clean(name: str) -> str:
    """A module's name as it is without torch.compile, so that sketches are the same with it."""
    return name.replace("_orig_mod.", "")


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own trainable parameters."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def _parameter_edges(objective: Tensor) -> Counter[Tensor]:
    """How often the autograd graph below ``objective`` meets each parameter.

    Autocast casts a weight once for all its uses: then the edges that lead to the cast are counted.
    """
    into: Counter[Any] = Counter()
    leaves: list[tuple[Any, Tensor]] = []
    seen, stack = {objective.grad_fn}, [objective.grad_fn]
    while stack:
        node = stack.pop()
        for below, _ in node.next_functions if node is not None else ():
            into[below] += 1
            if (leaf := getattr(below, "variable", None)) is not None:
                leaves.append((node, leaf))
            elif below not in seen:
                seen.add(below)
                stack.append(below)
    met: Counter[Tensor] = Counter()
    for node, leaf in leaves:
        met[leaf] += into[node] if type(node).__name__ == "ToCopyBackward0" else 1
    return met


def _finite(norms: Tensor) -> Tensor:
    bad = ~norms.isfinite()
    if bad.any():
        index = int(bad.nonzero()[0])
        raise NonFiniteError("squared score norm", index, "check its log-probabilities and the weights")
    return norms
