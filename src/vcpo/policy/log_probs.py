"""Log-probabilities of sampled tokens under a model."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from vcpo.policy.packing import PackedRows, pack
from vcpo.scores.head import Curve, LogProbHead, Question
from vcpo.scores.layout import precise
from vcpo.scores.proxies import token_distributions
from vcpo.trajectory import NOT_SAMPLED, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float, Int

log = logging.getLogger(__name__)

LOGIT_BUDGET = 2**27
"""Default for the most logits that exist at once (512 MiB in float32)."""


def sampled_log_probs(model: nn.Module, rows: PackedRows, temperature: float = 1.0) -> Float[Tensor, " N"]:
    """log π(y_t | y_<t) of every sampled token, π = softmax(logits / temperature), from the logits of all.

    Returns [N] in the order of ``rows.action_owners`` (``rows.spread`` makes it [B, A]), in float32 or
    better whatever the model's number type. Gradient flows into the model's parameters. The slow twin of
    :class:`TokenLogProbs`: its memory grows with positions times vocabulary.
    """
    logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    return _chosen(logits[rows.action_rows, rows.action_columns - 1], sampled_tokens(rows), temperature)


def sampled_tokens(rows: PackedRows) -> Int[Tensor, " N"]:
    return rows.input_ids[rows.action_rows, rows.action_columns]


def predicting(rows: PackedRows) -> Int[Tensor, " N"]:
    """The positions that predict the sampled tokens, counted row by row."""
    return rows.action_rows * rows.input_ids.shape[1] + rows.action_columns - 1


class TokenLogProbs:
    """log π(y_t | y_<t) of every sampled token; the head is shown what it needs, and gives no more.

    Formula, shapes and precision as of :func:`sampled_log_probs`, with gradient. The head meets the N hidden
    states that predict a sampled token, as [N, D]. While N·V is at most ``logit_budget``, what it and the
    model make of them is [N, V]; beyond, log-probabilities come piece by piece
    (:class:`vcpo.scores.head.LogProbHead`), and memory does not grow with N·V, in the backward pass neither.

    The model itself is called, so that what wraps it (FSDP, checkpointing, a tape) works as ever; a hook on
    the head shows it the selection. What a model does with logits after its head (scaling, capping) is read
    off its config and tried here, on a few short sequences. A model that does not fit gets the logits it
    always had, with one warning: of the selection where its head is of another kind (LoRA on the head), of
    all positions where it cannot be shown a selection.

    A tape that records a call must be told: ``tape.measure(..., selected=predicting(rows))``.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float = 1.0, logit_budget: int = LOGIT_BUDGET
    ) -> None:
        self._model, self._temperature, self._budget = model, temperature, logit_budget
        self._question: Question | None = None
        self._selected: Tensor | None = None
        self._answer: Tensor | None = None
        head: Any = model.get_output_embeddings()
        self._curve = curve_of(model.config.get_text_config(), temperature)
        self._selects = self._in_pieces = False
        if not isinstance(head, nn.Module):
            self._warn("has no head that can be found")
            return
        _teach(head)
        self.remove = weakref.finalize(self, _remove_all, _watch(head, weakref.ref(self)))
        """Takes the hooks off the head."""
        # Trying a compiled model would compile it once for every hook that comes and goes.
        with torch.compiler.set_stance("force_eager"):
            self._try(head)

    def __call__(self, rows: PackedRows) -> Float[Tensor, " N"]:
        tokens = sampled_tokens(rows)
        if not self._selects:
            return sampled_log_probs(self._model, rows, self._temperature)
        if self._in_pieces and len(tokens) * self._vocabulary > self._budget:
            return self._asked(rows, Question(tokens, self._curve, self._budget))
        return _chosen(self._run(rows), tokens, self._temperature)

    def with_distributions(self, rows: PackedRows) -> tuple[Float[Tensor, " N"], Float[Tensor, "2 N"]]:
        """The same, and of the distribution each token was sampled from its entropy and its energy
        (:func:`vcpo.scores.proxies.token_distributions`), without gradient."""
        tokens = sampled_tokens(rows)
        if self._in_pieces and len(tokens) * self._vocabulary > self._budget:
            question = Question(tokens, self._curve, self._budget, wants_distributions=True)
            log_probs = self._asked(rows, question)
            assert question.distributions is not None
            return log_probs, question.distributions
        if self._selects:
            logits = self._run(rows)
        else:
            output = self._model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False)
            logits = output.logits[rows.action_rows, rows.action_columns - 1]
        distributions = token_distributions(precise(logits.detach()) / self._temperature, tokens)
        return _chosen(logits, tokens, self._temperature), distributions

    def _asked(self, rows: PackedRows, question: Question) -> Tensor:
        self._question = question
        try:
            output = self._run(rows)
            assert self._answer is not None
            # What the model makes of log-probabilities means nothing; but FSDP waits at the model's output
            # for the backward pass to begin.
            return self._answer + 0 * output
        finally:
            self._question = self._answer = None

    def _run(self, rows: PackedRows) -> Tensor:
        """What the model gives in place of logits when its head is shown the selection alone."""
        self._selected = predicting(rows)
        try:
            output = self._model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False)
        finally:
            self._selected = None
        return output.logits

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._selected is None:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, self._selected)
        return (hidden,) if self._question is None else (hidden, self._question)

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._question is not None:
            self._answer = output

    @torch.no_grad()
    def _try(self, head: nn.Module) -> None:
        """Find out what this model can be asked; what it cannot is said once."""
        self._vocabulary = int(head.weight.shape[0]) if isinstance(head, LogProbHead) else 0
        rows = pack(_probes(self._model), packed=False).to(self._model.device)
        with _output_types(head) as types:
            expected = sampled_log_probs(self._model, rows, self._temperature)
        try:
            selected = _chosen(self._run(rows), sampled_tokens(rows), self._temperature)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self._warn(f"cannot show its head a selection of positions ({error})")
            return
        if not _agree(selected, expected, types[0]):
            self._warn("gives other log-probs when its head is shown a selection of positions")
            return
        self._selects = True
        if not isinstance(head, LogProbHead):
            self._warn(f"has a head that is no plain linear layer ({type(head).__name__})")
            return
        if not _bends_as(self._curve, self._model, head, types[0]):
            self._warn("changes its logits after the head in a way that its config does not tell")
            return
        asked = self._asked(rows, Question(sampled_tokens(rows), self._curve, budget=1))
        if not _agree(asked, expected, types[0]):
            self._warn("gives other log-probs when they are computed in pieces")
            return
        self._in_pieces = True

    def _warn(self, problem: str) -> None:
        log.warning(
            "%s %s: memory for logits grows with tokens × vocabulary (learner.token_budget bounds it)",
            type(self._model).__name__,
            problem,
        )


_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Settings that multiply logits after the head (1) or divide them (−1): Cohere's, Falcon-H1's, Granite's."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Of Gemma, RecurrentGemma, xLSTM."""


def curve_of(config: Any, temperature: float = 1.0) -> Curve:
    """What a model does with its head's product, by its config."""
    scale = 1.0
    for name, power in _FACTORS.items():
        if (factor := getattr(config, name, None)) is not None:
            scale *= float(factor) ** power
    caps = [float(cap) for name in _CAPS if (cap := getattr(config, name, None))]
    return Curve(scale, caps[0] if caps else None, temperature)


def _teach(head: nn.Module) -> None:
    """Make a plain linear head a LogProbHead; FSDP's subclass of one stays what it is besides."""
    kind = type(head)
    plain = kind.forward is nn.Linear.forward and "forward" not in vars(head)
    if plain and not isinstance(head, LogProbHead):
        head.__class__ = (
            LogProbHead if kind is nn.Linear else type(f"LogProb{kind.__name__}", (LogProbHead, kind), {})
        )


def _chosen(logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], temperature: float) -> Tensor:
    scaled = precise(logits) if temperature == 1 else precise(logits) / temperature
    return scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def _watch(head: nn.Module, owner: weakref.ref[TokenLogProbs]) -> list[Any]:
    """Hooks that do nothing outside the owner's calls and do not keep it alive; compilers are cut there."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        asking = owner()
        return None if asking is None else asking._before_head(module, args)

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        asking = owner()
        return None if asking is None else asking._after_head(module, args, output)

    uncompiled: Callable[..., Any] = torch.compiler.disable
    return [
        head.register_forward_pre_hook(uncompiled(before)),
        head.register_forward_hook(uncompiled(after)),
    ]


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _output_types(head: nn.Module) -> Generator[list[torch.dtype]]:
    """Number types of what the head gives, call by call: with FSDP or autocast not those of its weight."""
    types: list[torch.dtype] = []
    handle = head.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    try:
        yield types
    finally:
        handle.remove()


def _agree(found: Tensor, expected: Tensor, number_type: torch.dtype) -> bool:
    """Equal but for rounding in this number type."""
    return bool((found - expected).abs().mean() < _tolerance(number_type))


def _tolerance(number_type: torch.dtype) -> float:
    return 8 * torch.finfo(number_type).eps ** 0.75


def _bends_as(curve: Curve, model: PreTrainedModel, head: LogProbHead, number_type: torch.dtype) -> bool:
    """Whether the model makes of its head's product what the curve does, shown products from −100 to 100.

    (The products of untrained weights are too small for a cap to show.)
    """
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    width = head.weight.shape[0]
    z = torch.linspace(-100, 100, 2 * width, device=model.device).view(1, 2, width)
    handle = head.register_forward_hook(lambda module, args, output: z.to(output.dtype, copy=True))
    try:
        logits = precise(model(input_ids=ids, use_cache=False).logits)
    finally:
        handle.remove()
    limit = _tolerance(number_type)
    expected = replace(curve, temperature=1.0)(precise(z.to(number_type))).to(logits)
    return torch.allclose(logits, expected, rtol=limit, atol=limit)


def _probes(model: PreTrainedModel) -> list[Trajectory]:
    """Three short random sequences, all but their first tokens sampled."""
    embedding: Any = model.get_input_embeddings()
    random = np.random.default_rng(0)
    probes = []
    for length in (6, 3, 3):
        mask = np.arange(length) > 0
        probes.append(
            Trajectory(
                tokens=random.integers(0, embedding.weight.shape[0], length).astype(np.int32),
                action_mask=mask,
                log_probs=np.zeros(length, np.float32),
                versions=np.where(mask, 0, NOT_SAMPLED).astype(np.int32),
                reward=0.0,
            )
        )
    return probes


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether sequences that share a row do not see each other, tried on three short ones."""
    together, alone = (  # the second and the third share a row
        sampled_log_probs(model, pack(_probes(model), packed=packed).to(model.device))
        for packed in (True, False)
    )
    # A leak moves log-probs by nats, the order of summation by 1e-6 (float32) to 1e-2 (bfloat16).
    return bool((together - alone).abs().max() < 0.1)
