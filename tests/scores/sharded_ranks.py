"""What each of two processes does in the tests of score norms of FSDP2-sharded models.

Both ranks run all cases in one go, since starting a process costs more than they do. Rank 0 writes what it
found; the tests compare it with one process's oracles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from score_cases import (
    MODELS,
    RAGGED,
    Batch,
    Rows,
    batch_of,
    forward,
    llama,
    members_of,
    objective_of,
    packed,
    padded,
    trajectories_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from vcpo.errors import VcpoError
from vcpo.policy.log_probs import TokenLogProbs, predicting
from vcpo.policy.packing import PackedRows, pack
from vcpo.scores import Record, ScoreTape
from vcpo.scores.choice import Choice

torch.set_num_threads(1)

RANKS = 2
REWARDS = torch.tensor([0.0, 1.0, 0.3, 1.0, 0.0, 0.7], dtype=torch.float64)

SKETCH = Choice(columns=4, formed_from=torch.inf, sketched_below=torch.inf)
GHOST = Choice(columns=0, formed_from=torch.inf)


def sharded_lora() -> nn.Module:
    """Adapters beside frozen weights, in one shard."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) * parameter.requires_grad
    return model


FSDP_MODELS: dict[str, Callable[[], nn.Module]] = {**MODELS, "lora": sharded_lora}


@dataclass(frozen=True)
class Case:
    model: str = "llama"
    precision: torch.dtype = torch.float64
    half_in_calls: bool = False
    """MixedPrecisionPolicy(param_dtype=bfloat16)."""
    reshard: bool = True
    ends_alone: bool = False
    """Head and table are groups of their own; one group if tied."""
    split: tuple[Sequence[int], Sequence[int]] = ((0, 2, 4), (1, 3, 5))
    """The trajectories of each rank."""
    micro_batches: int = 1
    checkpointing: bool = False
    method: str | Choice = "exact"
    ordinary_backward: bool = False
    """ScoreTape.backward, which gives the gradient for coefficients of 1."""
    compiled: bool = False
    tape_first: bool = False
    """The tape is made before the model is sharded."""
    logit_budget: int | None = None
    """Log-probs come from TokenLogProbs with this budget; None: from all logits."""


CASES = {
    "plain": Case(),
    "float32": Case(precision=torch.float32),
    "kept gathered": Case(reshard=False),
    "tied": Case("llama-tied"),
    "tied, float32, kept gathered": Case("llama-tied", torch.float32, reshard=False),
    "biases": Case("llama-biases"),
    "Conv1D": Case("gpt2-tied"),
    "scaled table, shifted norms": Case("gemma3-tied"),
    "tied ends alone": Case("gemma3-tied", ends_alone=True),
    "lora": Case("lora"),
    "ends alone": Case(ends_alone=True),
    "ghost": Case(method=GHOST),
    "sketch": Case(method=SKETCH),
    "checkpointing": Case("llama-tied", checkpointing=True),
    "checkpointing, ghost": Case(checkpointing=True, method=GHOST, reshard=False),
    "compiled": Case(compiled=True),
    "two micro-batches": Case("llama-tied", split=((0, 1, 2), (3, 4, 5)), micro_batches=2),
    "one trajectory on a rank": Case(split=((0, 1, 2, 3, 4), (5,))),
    "no trajectory on a rank": Case("llama-tied", split=((0, 1, 2, 3, 4, 5), ())),
    "ordinary backward": Case("llama-tied", ordinary_backward=True),
    "ordinary backward, checkpointing": Case(ordinary_backward=True, checkpointing=True, method=GHOST),
    "tape first": Case(tape_first=True),
    "head in pieces": Case(logit_budget=1),
    "head in pieces, tied, kept gathered": Case("llama-tied", reshard=False, logit_budget=1),
    "head in pieces, ends alone": Case(ends_alone=True, method=GHOST, logit_budget=40),
    "head in pieces, lora": Case("lora", logit_budget=1),
    "head in pieces, ordinary backward": Case("llama-tied", ordinary_backward=True, logit_budget=1),
    "head in pieces, no trajectory on a rank": Case(split=((0, 1, 2, 3, 4, 5), ()), logit_budget=1),
    "selected head, checkpointing": Case("llama-tied", checkpointing=True, logit_budget=10**9),
    "bf16": Case(precision=torch.float32, half_in_calls=True),
    "bf16, tied, checkpointing": Case("llama-tied", torch.float32, half_in_calls=True, checkpointing=True),
}


@dataclass
class Findings:
    """Of all ranks together."""

    norms: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


def advantages(squared_norms: Tensor) -> Tensor:
    """R − b* with all weights 1."""
    squared_norms = squared_norms.double()
    return REWARDS - (squared_norms * REWARDS).sum() / squared_norms.sum()


def work(rank: int, folder: str) -> None:
    """All of one rank."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    found = Findings()
    for name, case in CASES.items():
        try:
            found.norms[name], found.gradients[name] = run(case, rank)
        except Exception as error:
            raise RuntimeError(f"rank {rank}, case {name!r}") from error
    for name, refused in REFUSED.items():
        found.refusals[name] = refusal(refused, rank)
    found.norms["reloaded"], found.gradients["reloaded"] = reloaded(rank)
    if rank == 0:
        torch.save(found, Path(folder) / "findings")
    dist.destroy_process_group()


def run(case: Case, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The norms of all trajectories and the gradient of Σ A log π(τ)."""
    model: Any = nn.Module.to(FSDP_MODELS[case.model](), case.precision)
    early = ScoreTape(model, method=case.method) if case.tape_first else None
    prepare(model, case)
    tape = early or ScoreTape(model, method=case.method)
    log_probs = None if case.logit_budget is None else TokenLogProbs(model, logit_budget=case.logit_budget)
    own = [list(case.split[rank][k :: case.micro_batches]) for k in range(case.micro_batches)]
    if case.ordinary_backward:
        norms = gathered(own, [ordinary_backward(model, tape, members, log_probs) for members in own])
        return norms, full_gradients(model)
    records = [measured(model, tape, members, log_probs) for members in own]
    norms = gathered(own, [record.squared_norms for record in records])
    for members, record in zip(own, records, strict=True):
        record.backward(advantages(norms)[members])
    return norms, full_gradients(model)


def prepare(model: Any, case: Case) -> None:
    """Checkpoint, compile and shard as the case wants."""
    inner = model.get_base_model() if case.model == "lora" else model
    if case.checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = inner.transformer.h if case.model.startswith("gpt2") else inner.model.layers
    if case.compiled:
        for layer in layers:
            layer.compile(backend="aot_eager")
    precision = torch.bfloat16 if case.half_in_calls else None
    options: dict[str, Any] = {
        "reshard_after_forward": case.reshard,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision),
    }
    for layer in layers:
        fully_shard(layer, **options)
    if case.ends_alone:
        ends = [inner.model.embed_tokens, inner.lm_head]
        for group in [ends] if case.model.endswith("tied") else ends:
            fully_shard(group, **options)
    fully_shard(model, **options)


def rows_of_rank(members: Sequence[int]) -> tuple[Batch, Rows]:
    """A rank's part of the batch; one row of padding if it has none."""
    own = members_of(batch_of(RAGGED), members)
    if members:
        return own, padded(own)
    return own, Rows(torch.zeros(1, 3, dtype=torch.long), torch.arange(3)[None], torch.full((1, 3), -1))


@dataclass(frozen=True)
class Recorded:
    """What a tape is asked about."""

    objective: Tensor
    segments: Tensor
    count: int
    selected: Tensor | None = None


def recorded(
    model: nn.Module, tape: ScoreTape, members: Sequence[int], log_probs: TokenLogProbs | None
) -> Recorded:
    own, rows = rows_of_rank(members)
    if log_probs is not None:
        return recorded_selection(tape, own, rows, log_probs)
    with tape:
        logits = forward(model, rows)
    # The zero keeps the graph where there is no trajectory.
    return Recorded(objective_of(logits, own, rows) + 0 * logits.sum(), rows.segments, len(members))


def recorded_selection(tape: ScoreTape, own: Batch, rows: Rows, log_probs: TokenLogProbs) -> Recorded:
    nowhere = torch.zeros(0, dtype=torch.long)
    layout = PackedRows(rows.ids, rows.positions, rows.segments, *4 * [nowhere], count=0, width=1)
    layout = pack(trajectories_of(own), packed=False) if own.sequences else layout
    with tape:
        found = log_probs(layout)
    total = (own.normalisers.to(found)[layout.action_owners] * found).sum()
    return Recorded(total, layout.segments, layout.count, predicting(layout))


def measured(
    model: nn.Module, tape: ScoreTape, members: Sequence[int], log_probs: TokenLogProbs | None = None
) -> Record:
    of = recorded(model, tape, members, log_probs)
    return tape.measure(of.objective, of.segments, of.count, of.selected)


def ordinary_backward(
    model: nn.Module, tape: ScoreTape, members: Sequence[int], log_probs: TokenLogProbs | None
) -> Tensor:
    of = recorded(model, tape, members, log_probs)
    return tape.backward(of.objective, of.segments, of.count, of.selected).squared_norms


def gathered(own: Sequence[Sequence[int]], norms: Sequence[Tensor]) -> Tensor:
    """The norms of all ranks, each in its trajectory's place."""
    everyone = torch.zeros(len(RAGGED), dtype=torch.float64)
    for members, part in zip(own, norms, strict=True):
        everyone[list(members)] = part.double()
    dist.all_reduce(everyone)
    return everyone


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Summed over ranks; FSDP2 gives their mean."""
    return {
        name: torch.zeros(parameter.shape) if parameter.grad is None else RANKS * whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole(shard: Any) -> Tensor:
    return shard.full_tensor()


def reloaded(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loading with assign=True puts other parameters in the model's modules."""
    model, case = llama(), Case()
    prepare(model, case)
    tape = ScoreTape(model, method="exact")
    members = list(case.split[rank])
    measured(model, tape, members).backward(torch.ones(len(members)))
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    model.zero_grad()
    record = measured(model, tape, members)
    norms = gathered([members], [record.squared_norms])
    record.backward(advantages(norms)[members])
    return norms, full_gradients(model)


def beside(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + functional.linear(args[0].sin(), module.get_parameter("weight"))


def bypassed_head() -> nn.Module:
    """The head's gathered weight is used beside the head, in a hook that runs before FSDP's."""
    model = llama()
    head = model.get_submodule("lm_head")
    head.register_forward_hook(beside)
    prepare(model, Case(ends_alone=True))
    return model


def tensor_parallel() -> nn.Module:
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    model = llama()
    parallelize_module(model.get_submodule("model.layers.0.mlp"), init_device_mesh("cpu", (RANKS,)), plan)
    return model


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "bypassed head": bypassed_head,
    "tensor parallel": tensor_parallel,
}


def refusal(build: Callable[[], nn.Module], rank: int) -> str:
    """The message of the error that measuring raises."""
    model = build()
    own = members_of(batch_of(RAGGED), Case().split[rank])
    rows = packed(own)
    tape = ScoreTape(model, method="exact")
    try:
        with tape:
            logits = forward(model, rows)
        tape.measure(objective_of(logits, own, rows), rows.segments, len(own.sequences))
    except VcpoError as error:
        return str(error)
    return "nothing was raised"
