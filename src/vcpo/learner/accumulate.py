"""From a unit of whole groups to its gradient: −Σ nᵢ cᵢₜ ∇log π(yᵢₜ), added to the parameters'.

The coefficients are known only when all of a group is measured. Three ways, by what the unit is:

| unit                | coefficients         | way                                                      |
|---------------------|----------------------|----------------------------------------------------------|
| one micro-batch     | any                  | forward, measure, one backward                           |
| a group in several  | wᵢ Aᵢ, A linear in R | forward, backward of wᵢ, into two sums; combine the sums |
| a group in several  | any, or FSDP2        | forward of all, measure; then forward again, backward    |

The second: A(R) = α (R − r) + β within a group, with α and β known last. So Σ wᵢ Aᵢ gᵢ =
α Σ wᵢ (Rᵢ − r) gᵢ + β Σ wᵢ gᵢ, and a micro-batch whose members have one reward adds the same gradient to both
sums, times a number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from vcpo.algorithms.composition import Algorithm, Evidence, Update
from vcpo.errors import NonFiniteError, UnsupportedLayerError
from vcpo.estimators.checks import OVERFLOW_HINT
from vcpo.learner.critic import Critic
from vcpo.learner.minibatch import Figures, Measured, Minibatch, evidence_of
from vcpo.policy.loading import Policy
from vcpo.policy.log_probs import LOGIT_BUDGET, TokenLogProbs, predicting
from vcpo.policy.packing import PackedRows, micro_batches, pack
from vcpo.scores import ScoreTape


@dataclass(frozen=True)
class Contribution:
    """What one unit gave to a step, beside its gradient."""

    update: Update
    evidence: Evidence
    loss: float
    relative_errors: Tensor | None = None
    """[B] of the squared score norms; None if there are none."""
    value_loss: float = 0.0
    """Its part of the critic's loss."""


SMALLEST_SEED = 1e-12
"""Weights below this, as a part of the largest in their micro-batch, cannot matter to its gradient."""


class Accumulator:
    """Adds gradients of minibatches to the parameters of a policy."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        token_budget: int,
        *,
        packed: bool,
        score_norms: str,
        temperature: float = 1.0,
        logit_budget: int = LOGIT_BUDGET,
        critic: Critic | None = None,
    ) -> None:
        self._critic = critic
        self._gain = 1.0
        """By which gradients are multiplied: ranks that share a learner get the mean of theirs."""
        self._model, self._algorithm = policy.model, algorithm
        self._budget, self._packed = token_budget, packed
        self._log_probs = TokenLogProbs(policy.model, temperature=temperature, logit_budget=logit_budget)
        # Made here, so that an unsupported layer is named before anything is sampled.
        self._tape = _tape_of(policy.model, score_norms) if algorithm.needs_score_norms else None

    def units(self, batch: Minibatch) -> list[list[list[int]]]:
        """The minibatch cut into units of micro-batches: units > micro-batches > places."""
        units = micro_batches(
            batch.trajectories,
            batch.groups,
            self._budget,
            packed=self._packed,
            kinds=batch.rewards.tolist() if self._algorithm.weighs_trajectories else None,
        )
        return [[part for unit in units for part in unit]] if self._algorithm.spans_minibatch else units

    def accumulate(self, batch: Minibatch) -> list[Contribution]:
        """Add the gradient of a minibatch. Its version decides the sketch of score norms."""
        if self._tape is not None:
            self._tape.seed = batch.version
        return [self._add(unit, batch) for unit in self.units(batch)]

    def _add(self, unit: list[list[int]], batch: Minibatch) -> Contribution:
        if len(unit) == 1:
            return self._at_once(unit[0], batch)
        if self._algorithm.weighs_trajectories:
            return self._in_two_sums(unit, batch)
        return self._in_two_passes(unit, batch)

    def _at_once(self, members: list[int], batch: Minibatch) -> Contribution:
        rows = self._pack(members, batch)
        if self._tape is None:
            log_probs, distributions = self._forward(rows)
            values = None if self._critic is None else self._critic(rows)
            known = None if values is None else values.detach()
            part = Measured(members, log_probs.detach(), distributions=distributions, values=known, rows=rows)
            evidence, update = self._decide([part], batch)
            self._backward(log_probs, _token_factors(update.coefficients, rows, members, batch))
            value_loss = 0.0 if values is None else self._value_backward(values, update, part, batch)
            loss = _loss(update, evidence, batch.normalisers[members])
            return Contribution(update, evidence, loss, value_loss=value_loss)
        with self._tape:
            log_probs, distributions = self._forward(rows)
        normalisers = batch.normalisers[members].to(log_probs)
        objective = (normalisers[rows.action_owners] * log_probs).sum()
        with _naming(members):
            record = self._tape.measure(objective, rows.segments, rows.count, predicting(rows))
        part = Measured(
            members,
            log_probs.detach(),
            record.squared_norms,
            record.relative_errors,
            distributions,
            rows=rows,
        )
        evidence, update = self._decide([part], batch)
        shared = _trajectory_coefficients(update, evidence)
        if shared is None:
            self._again([part], update, batch)
        else:
            record.backward(-self._gain * shared)
        loss = _loss(update, evidence, batch.normalisers[members])
        return Contribution(update, evidence, loss, record.relative_errors)

    def _forward(self, rows: PackedRows) -> tuple[Tensor, Tensor | None]:
        """Log-probs [N] with gradient, and entropies and energies [2, N] if the algorithm wants them."""
        if self._algorithm.needs_distributions:
            return self._log_probs.with_distributions(rows)
        return self._log_probs(rows), None

    def _in_two_sums(self, unit: list[list[int]], batch: Minibatch) -> Contribution:
        members = [i for part in unit for i in part]
        middle = float(batch.rewards[members].double().mean())  # near b, so that little cancels
        parts = []
        with TwoSums(self._model.parameters()) as sums:
            for part in unit:
                sums.factor_of_second = float(batch.rewards[part[0]]) - middle
                parts.append(self._backward_of_weights(part, batch, sums))
            evidence, update = self._decide(parts, batch)
            line = _line(update, evidence, middle)
            if line is not None:
                slope, offset = line
                sums.combine(-offset, -slope)
        if line is None:
            self._again(parts, update, batch)
        loss = _loss(update, evidence, batch.normalisers[members])
        return Contribution(update, evidence, loss, _errors_of(parts))

    def _backward_of_weights(self, members: list[int], batch: Minibatch, sums: TwoSums) -> Measured:
        """The gradient of Σ nᵢ wᵢ log π(τᵢ) goes to the two sums; norms are of nᵢ ∇log π(τᵢ)."""
        rows = self._pack(members, batch)
        with self._tape or contextlib.nullcontext():
            log_probs = self._log_probs(rows)
        measured = Measured(members, log_probs.detach(), rows=rows)
        evidence = evidence_of([measured], batch)
        with _naming(members):
            log_weights, _ = self._algorithm.importance(evidence)
            largest = _largest(log_weights, evidence.mask.any(-1), sums.factor_of_second)
        seeds = (log_weights - largest).exp().clamp(SMALLEST_SEED, 1.0)  # above 1: nothing sampled
        sums.factor = math.exp(largest)
        factors = (batch.normalisers[members] * seeds).to(log_probs)
        objective = (factors[rows.action_owners] * log_probs).sum()
        if self._tape is None:
            objective.backward()
            return measured
        with _naming(members):
            found = self._tape.backward(objective, rows.segments, rows.count, predicting(rows))
        norms = found.squared_norms / seeds.to(found.squared_norms).square()
        return Measured(members, measured.log_probs, norms, found.relative_errors, rows=rows)

    def _in_two_passes(self, unit: list[list[int]], batch: Minibatch) -> Contribution:
        members = [i for part in unit for i in part]
        parts = [self._norms_of(part, batch) for part in unit]
        evidence, update = self._decide(parts, batch)
        value_loss = self._again(parts, update, batch)
        loss = _loss(update, evidence, batch.normalisers[members])
        return Contribution(update, evidence, loss, _errors_of(parts), value_loss)

    def _norms_of(self, members: list[int], batch: Minibatch) -> Measured:
        """A first pass, that adds no gradient."""
        rows = self._pack(members, batch)
        if self._tape is None:
            with torch.no_grad():
                log_probs, distributions = self._forward(rows)
                values = None if self._critic is None else self._critic(rows)
            return Measured(members, log_probs, distributions=distributions, values=values, rows=rows)
        with self._tape:
            log_probs, distributions = self._forward(rows)
        normalisers = batch.normalisers[members].to(log_probs)
        objective = (normalisers[rows.action_owners] * log_probs).sum()
        with _naming(members):
            found = self._tape.norms(objective, rows.segments, rows.count, predicting(rows))
        return Measured(
            members, log_probs.detach(), found.squared_norms, found.relative_errors, distributions, rows=rows
        )

    def _again(self, parts: Sequence[Measured], update: Update, batch: Minibatch) -> float:
        """A second pass, that adds the gradient; the critic's loss."""
        begin, value_loss = 0, 0.0
        for part in parts:
            end = begin + len(part.members)
            factors = _token_factors(update.coefficients[begin:end], part.rows, part.members, batch)
            self._backward(self._log_probs(part.rows), factors)
            if self._critic is not None:
                value_loss += self._value_backward(self._critic(part.rows), update, part, batch, begin)
            begin = end
        return value_loss

    def _pack(self, members: Sequence[int], batch: Minibatch) -> PackedRows:
        pad = self._model.config.get_text_config().pad_token_id or 0
        rows = pack([batch.trajectories[i] for i in members], pad_id=pad, packed=self._packed)
        return rows.to(self._model.device)

    def _decide(self, parts: Sequence[Figures], batch: Minibatch) -> tuple[Evidence, Update]:
        """What the algorithm makes of whole groups."""
        evidence = evidence_of(parts, batch)
        with _naming([i for part in parts for i in part.members]):
            return evidence, self._algorithm.update(evidence)

    def _backward(self, log_probs: Tensor, factors: Tensor) -> None:
        """Adds the gradient of −Σ nᵢ cᵢₜ log π(yᵢₜ)."""
        (-self._gain * (factors.to(log_probs) * log_probs).sum()).backward()

    def _value_backward(
        self, values: Tensor, update: Update, part: Measured, batch: Minibatch, begin: int = 0
    ) -> float:
        """Adds the gradient of ½ mean (V_t − target_t)² over the minibatch's tokens; this part's share."""
        assert update.value_targets is not None
        table = update.value_targets[begin : begin + len(part.members)]
        targets = table[part.rows.action_owners.cpu(), part.rows.action_places.cpu()].to(values)
        loss = 0.5 * (values - targets).square().sum() / max(batch.action_tokens, 1)
        (self._gain * loss).backward()
        return float(loss.detach())


class TwoSums:
    """While entered, gradients that backward passes give do not stay in ``.grad``: they go to two sums.

    first += factor · g and second += factor · factor_of_second · g, parameter by parameter, as soon as g is
    there: two buffers, in float32 or better, beside the ``.grad`` that was there before. Not for sharded
    parameters (FSDP2), whose g is a mean over ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.factor, self.factor_of_second = 1.0, 1.0

    def __enter__(self) -> TwoSums:
        self._before = [p.grad for p in self._parameters]
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for p in self._parameters:
            p.grad = None
        self._handles = [p.register_post_accumulate_grad_hook(self._take) for p in self._parameters]
        return self

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter not in self._sums:
            empty = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            self._sums[parameter] = (empty, empty.clone())
        first, second = self._sums[parameter]
        first.add_(gradient, alpha=self.factor)
        if self.factor_of_second:
            second.add_(gradient, alpha=self.factor * self.factor_of_second)

    def combine(self, first_times: float, second_times: float) -> None:
        """Give ``.grad`` back what was there before, plus the combination of the sums."""
        for first, second in self._sums.values():
            first.mul_(first_times).add_(second, alpha=second_times)
        self._before = [
            _plus(p, before, self._sums[p][0]) if p in self._sums else before
            for p, before in zip(self._parameters, self._before, strict=True)
        ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.grad = before
        self._sums.clear()


def _tape_of(model: nn.Module, method: str) -> ScoreTape:
    try:
        return ScoreTape(model, method=method)
    except UnsupportedLayerError as error:
        hint = "in a recipe: choose a baseline without score norms (algorithm.baseline or algorithm.name)"
        raise UnsupportedLayerError(f"{error}; {hint}") from None


def _plus(parameter: Tensor, before: Tensor | None, gradient: Tensor) -> Tensor:
    return gradient.to(parameter.dtype) if before is None else before.add_(gradient)


def _largest(log_weights: Tensor, sampled: Tensor, factor: float) -> float:
    """The largest log-weight of a trajectory with sampled tokens; NonFiniteError if e to it is too large."""
    if not sampled.any():
        return 0.0
    candidates = log_weights.double().masked_fill(~sampled, -torch.inf)
    ceiling = math.log(torch.finfo(torch.float32).max) - math.log(max(1.0, abs(factor)))
    bad = (candidates > ceiling) | candidates.isnan()
    if bad.any():
        raise NonFiniteError("importance weight", int(bad.nonzero()[0]), OVERFLOW_HINT)
    return float(candidates.max())


def _line(update: Update, evidence: Evidence, middle: float) -> tuple[float, float] | None:
    """(α, β) if all coefficients are w (α (R − middle) + β); else None.

    The advantages tell α and β, the coefficients whether it is so: a surrogate may change them.
    """
    rewards, advantages = evidence.rewards.double() - middle, update.advantages.double()
    top, bottom = int(rewards.argmax()), int(rewards.argmin())
    rise = float(rewards[top] - rewards[bottom])
    slope = float(advantages[top] - advantages[bottom]) / rise if rise else 0.0
    offset = float(advantages[bottom] - slope * rewards[bottom])
    weights = update.used_log_weights.double().exp()
    expected = (weights * (slope * rewards + offset))[:, None]
    # An advantage is a difference of two numbers in float32: so far may it be off.
    size = abs(slope) * rewards.abs() + abs(offset)
    near = (update.coefficients - expected).abs() <= 1e-5 * (weights * size)[:, None]
    return (slope, offset) if bool((near | ~evidence.mask).all()) else None


def _errors_of(parts: Sequence[Measured]) -> Tensor | None:
    known = [part.relative_errors for part in parts if part.relative_errors is not None]
    return torch.cat(known) if known else None


def _token_factors(
    coefficients: Tensor, rows: PackedRows, members: Sequence[int], batch: Minibatch
) -> Tensor:
    """nᵢ cᵢₜ of every sampled token of the rows, [N]."""
    weighted = coefficients[:, : rows.width] * batch.normalisers[list(members), None]
    return weighted[rows.action_owners.cpu(), rows.action_places.cpu()]


def _trajectory_coefficients(update: Update, evidence: Evidence) -> Tensor | None:
    """[B] coefficient that all tokens of a trajectory share, 0 without sampled tokens; else None."""
    first = update.coefficients[:, 0]
    differs = (update.coefficients != first[:, None]) & evidence.mask
    return None if bool(differs.any()) else first


def _loss(update: Update, evidence: Evidence, normalisers: Tensor) -> float:
    return -float((normalisers[:, None] * update.coefficients * evidence.log_probs).sum())


@contextlib.contextmanager
def _naming(members: Sequence[int]) -> Generator[None]:
    """Within it, a part of the minibatch is measured: ``members`` are its trajectories. An error that names
    a trajectory by its place in the part is raised again with its place in the minibatch."""
    try:
        yield
    except NonFiniteError as error:
        if error.index is None:
            raise
        raise NonFiniteError(error.quantity, members[error.index], error.hint) from None
