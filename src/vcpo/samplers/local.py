"""The local engine: continuous batching over any transformers causal LM, in this process.

One task decodes for everybody. A request waits for a slot, is fed what its slot has not seen yet (the
prompt, or the observation since the last turn), and is then sampled one token a tick until it stops.
Requests of the same length of feed go through the model together; identical new prompts (a group) go
through it once. Between turns a session keeps its slot; if slots run short, the session that has been
idle longest loses its slot and is fed again when it comes back.

Weights change between two ticks. ``keep``: at once; running sessions are fed again under the new weights
at their next tick, so a token's log-prob is always that of the version it is stamped with, with no trace
of older keys and values. ``drain``: new sessions wait until the running ones have ended.

========== ========================= ===============================
who        waits for                 woken by
========== ========================= ===============================
engine     a request                 ``generate``
generate   its completion            the engine's tick, or its death
update     drain: sessions to end    ``release`` of the last session
========== ========================= ===============================

Why not transformers' ContinuousBatchingManager: on the maze, where every move is a turn, it must be given
the whole conversation anew each turn; ``python -m benchmarks.sampler`` runs both (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from vcpo.config import SamplerConfig
from vcpo.errors import (
    EnvironmentFailure,
    ModelError,
    NonFiniteError,
    VcpoError,
    WorkerError,
)
from vcpo.samplers.cache import SlotCache
from vcpo.samplers.protocol import Completion, check_request
from vcpo.samplers.random import uniforms
from vcpo.samplers.receiver import Receiver
from vcpo.samplers.rounding import Rounding
from vcpo.samplers.shaping import draw, sampled_log_probs
from vcpo.weights import Probe, Weights, checksum, is_announced, load_weights, weight_tensors

SHARED_PREFILL = 4
"""Shortest feed for which looking for equal prompts pays."""


@dataclass(eq=False)
class _Session:
    """One conversation: which slot holds it and how much of it the slot has seen."""

    slot: int | None = None
    cached: int = 0
    """How many tokens the slot has seen."""
    seen: list[int] = field(default_factory=list)
    """The conversation at the end of the last turn."""
    started: bool = False
    request: _Request | None = None


@dataclass(eq=False)
class _Request:
    """One call to ``generate`` in progress."""

    session: _Session
    tokens: list[int]
    """Context and what has been sampled since."""
    begin: int
    limit: int
    stop: frozenset[int]
    seed: int
    greedy: bool
    done: asyncio.Future[Completion]
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def feed(self) -> int:
        """How many tokens the slot has not seen."""
        return len(self.tokens) - self.session.cached


class LocalSampler:
    """A :class:`vcpo.samplers.protocol.Sampler` over a transformers model, which becomes its own: the
    model's weights are rounded in place where the settings ask for it (:mod:`vcpo.samplers.rounding`)."""

    def __init__(
        self,
        model: PreTrainedModel,
        context_length: int,
        config: SamplerConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        """``timeout_seconds``: how long a broadcast of weights may take."""
        self._model = model.eval()
        self._config = config or SamplerConfig()
        self._context_length = context_length
        self._rounding = Rounding(model, self._config)
        self._rounding.apply(model)
        self._masks = _attention_masks(model)
        takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_logits_only = {"logits_to_keep": 1} if takes_keep else {}
        layers = model.config.get_text_config().num_hidden_layers
        self._cache = SlotCache(layers, context_length, model.device)
        self._receiver = Receiver(model.device, timeout_seconds)
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        self._version = 0
        self._sessions: dict[int, _Session] = {}
        self._idle: OrderedDict[_Session, None] = OrderedDict()
        self._free = list(range(self._config.slots - 1, -1, -1))
        self._active: dict[_Request, None] = {}
        self._waiting: list[_Request] = []
        self._draining = False
        self._drained = asyncio.Event()
        self._wake = asyncio.Event()
        self._engine: asyncio.Task[None] | None = None
        self.sampled_tokens = 0
        self.busy_seconds = 0.0

    @property
    def version(self) -> int:
        return self._version

    @property
    def context_length(self) -> int:
        return self._context_length

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        stop: frozenset[int],
        seed: int,
        greedy: bool = False,
        session: int | None = None,
    ) -> Completion:
        check_request(tokens, max_tokens, self._context_length, self._vocabulary)
        known = self._sessions.get(session) if session is not None else None
        owner = known or _Session()
        if session is not None:
            self._sessions[session] = owner
        if owner.request is not None:
            raise EnvironmentFailure(
                f"session {session} is already generating: wait for its completion first"
            )
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        request = _Request(owner, list(tokens), len(tokens), max_tokens, stop, seed, greedy, future)
        owner.request = request
        owner.cached = min(owner.cached, len(tokens) - 1)
        if owner.seen[: owner.cached] != request.tokens[: owner.cached]:
            owner.cached = 0  # another history under the same name: nothing of the slot can be used
        self._idle.pop(owner, None)
        self._waiting.append(request)
        self._start_engine()
        try:
            return await future
        finally:
            owner.request, owner.seen = None, request.tokens
            self._active.pop(request, None)
            if request in self._waiting:
                self._waiting.remove(request)
            if session is None or self._sessions.get(session) is not owner:
                self._give_back(owner)
            elif owner.slot is not None:
                self._idle[owner] = None

    def release(self, session: int) -> None:
        owner = self._sessions.pop(session, None)
        if owner is not None and owner.request is None:
            self._give_back(owner)
        self._check_drained()

    async def ranks(self) -> list[int]:
        return [1]

    async def meet(self, address: str, port: int, offset: int, world_size: int) -> None:
        await self._receiver.meet(address, port, offset, world_size)

    async def update(self, version: int, weights: Weights, probe: Probe | None = None) -> str:
        if is_announced(weights):
            weights = await self._receiver.receive(weights)
        if self._config.update == "drain":
            await self._drain()
        load_weights(self._model, weights, self._rounding)
        self._version = version
        for owner in self._owners():
            owner.cached = 0
        self._wake.set()
        return checksum(weight_tensors(self._model))

    async def _drain(self) -> None:
        self._draining = True
        self._drained.clear()
        self._check_drained()
        try:
            await self._drained.wait()
        finally:  # given up: new sessions must not wait for ever
            self._draining = False
            self._wake.set()

    async def ready(self) -> None:
        """At once: the model is here."""

    async def close(self) -> None:
        """Stop decoding; calls still waiting are cancelled."""
        if self._engine is not None:
            self._engine.cancel()
            await asyncio.gather(self._engine, return_exceptions=True)
        for request in [*self._active, *self._waiting]:
            request.done.cancel()

    # The engine

    def _start_engine(self) -> None:
        if self._engine is None or self._engine.done():
            self._engine = asyncio.get_running_loop().create_task(self._decode(), name="local sampler")
        self._wake.set()

    async def _decode(self) -> None:
        try:
            while True:
                self._admit()
                if not self._active:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._tick()
                await asyncio.sleep(0)  # episodes whose turn ended take their next one
        except Exception as caught:  # every caller must hear of it: nobody else awaits this task
            error = caught if isinstance(caught, VcpoError) else _unforeseen(caught)
            self._forget()
            for request in [*self._active, *self._waiting]:
                if not request.done.done():
                    request.done.set_exception(error)
            self._active.clear()
            self._waiting.clear()

    def _forget(self) -> None:
        """After a failed forward: it may have written nothing, or NaN, which outlives a mask (0 · NaN)."""
        self._cache.clear()
        for owner in self._owners():
            owner.cached = 0

    def _owners(self) -> Iterable[_Session]:
        yield from self._sessions.values()
        yield from (request.session for request in [*self._active, *self._waiting])  # released in mid-call

    def _check_drained(self) -> None:
        if self._draining and not any(owner.started for owner in self._owners()):
            self._drained.set()

    def _give_back(self, owner: _Session) -> None:
        self._idle.pop(owner, None)
        if owner.slot is not None:
            self._free.append(owner.slot)
            owner.slot, owner.cached = None, 0
        self._check_drained()

    def _admit(self) -> None:
        """Move waiting requests to slots, oldest first."""
        still_waiting: list[_Request] = []
        for request in self._waiting:
            owner = request.session
            held = self._draining and not owner.started
            if held or (owner.slot is None and not self._find_slot(owner)):
                still_waiting.append(request)
            else:
                owner.started = True
                self._active[request] = None
        self._waiting = still_waiting

    def _find_slot(self, owner: _Session) -> bool:
        if not self._free and self._idle:
            idle, _ = self._idle.popitem(last=False)
            self._give_back(idle)
        if not self._free:
            return False
        owner.slot, owner.cached = self._free.pop(), 0
        return True

    @torch.no_grad()
    def _tick(self) -> None:
        """One token for every active request (a prompt beyond the prefill budget takes several ticks)."""
        begun = time.perf_counter()
        for batch in self._batches():
            leaders, twins = _share_prompts(batch)
            logits = self._forward(leaders)
            rows = [i for i, leader in enumerate(leaders) if leader.feed == 0]
            ready = [leaders[i] for i in rows]
            for i, followers in twins.items():
                self._copy(leaders[i], followers)
                if leaders[i].feed == 0:
                    ready += followers
                    rows += [i] * len(followers)
            if ready:
                self._sample(ready, logits if rows == list(range(len(leaders))) else logits[rows])
        self.busy_seconds += time.perf_counter() - begun

    def _batches(self) -> list[list[_Request]]:
        """Active requests, those with a similar feed together, each batch within the prefill budget."""
        by_size: dict[int, list[_Request]] = {}
        for request in self._active:
            by_size.setdefault((request.feed - 1).bit_length(), []).append(request)
        batches: list[list[_Request]] = []
        for requests in by_size.values():
            requests.sort(
                key=lambda r: r.session.slot or 0
            )  # neighbours in the cache can be read without a copy
            widest = max(r.feed for r in requests)
            rows = max(1, self._config.prefill_tokens // widest)
            batches += [requests[i : i + rows] for i in range(0, len(requests), rows)]
        return batches

    def _forward(self, requests: list[_Request]) -> Tensor:
        """Feed each slot what it has not seen, at most the prefill budget; logits [b, V] after it."""
        sizes = [min(r.feed, self._config.prefill_tokens) for r in requests]
        width = max(sizes)
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        for request, size in zip(requests, sizes, strict=True):
            seen = request.session.cached
            # Padding comes first, so that the last column is everybody's last token.
            ids.append([0] * (width - size) + request.tokens[seen : seen + size])
            positions.append([-1] * (width - size) + list(range(seen, seen + size)))
            request.session.cached = seen + size
        device = self._model.device
        places = torch.tensor(positions, device=device)
        slots = [r.session.slot or 0 for r in requests]
        visible = self._cache.plan(slots, places, max(r.session.cached for r in requests))
        output = self._model(
            input_ids=torch.tensor(ids, device=device),
            position_ids=places.clamp(min=0),
            attention_mask=self._masks(visible, places),
            past_key_values=self._cache,
            use_cache=True,
            **self._last_logits_only,
        )
        return output.logits[:, -1]

    def _copy(self, leader: _Request, followers: list[_Request]) -> None:
        """Give the followers what the leader's slot has seen."""
        source, seen = leader.session.slot or 0, leader.session.cached
        self._cache.copy_slots([source] * len(followers), [f.session.slot or 0 for f in followers], seen)
        for follower in followers:
            follower.session.cached = seen

    def _sample(self, requests: list[_Request], logits: Tensor) -> None:
        """Draw one token for each request, by inversion of the cumulative distribution that is recorded."""
        config = self._config
        log_probs = sampled_log_probs(logits, config.temperature, config.top_k, config.top_p)
        if not bool(log_probs.amax(-1).isfinite().all()):
            raise NonFiniteError(
                "logits", None, f"policy version {self._version} is broken; train with a lower learning rate"
            )
        seeds = np.array([r.seed for r in requests], np.uint64)
        places = np.array([len(r.tokens) for r in requests], np.uint64)
        tokens = draw(log_probs, torch.from_numpy(uniforms(seeds, places)))
        if any(r.greedy for r in requests):
            greedy = torch.tensor([r.greedy for r in requests], device=tokens.device)[:, None]
            plain = sampled_log_probs(logits)
            tokens = torch.where(greedy, plain.argmax(-1, keepdim=True), tokens)
            log_probs = torch.where(greedy, plain, log_probs)
        chosen = log_probs.gather(-1, tokens)
        for request, token, log_prob in zip(
            requests, tokens[:, 0].tolist(), chosen[:, 0].tolist(), strict=True
        ):
            request.tokens.append(token)
            request.log_probs.append(log_prob)
            request.versions.append(self._version)
            if token in request.stop:
                self._finish(request, "stop")
            elif len(request.log_probs) >= request.limit:
                self._finish(request, "length")
        self.sampled_tokens += len(requests)

    def _finish(self, request: _Request, reason: Literal["stop", "length"]) -> None:
        self._active.pop(request, None)
        if not request.done.done():
            tokens = request.tokens[request.begin :]
            request.done.set_result(Completion(tokens, request.log_probs, request.versions, reason))


def _unforeseen(error: Exception) -> WorkerError:
    """Out of memory, a bug: the engine's failure, not that of whoever waits for it."""
    failure = WorkerError(f"the local sampler failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _share_prompts(batch: list[_Request]) -> tuple[list[_Request], dict[int, list[_Request]]]:
    """Requests with the same unseen prompt (a group's members) go through the model once.

    Returns the requests to feed, and for some of them (by place) the others that take over their result.
    """
    leaders: list[_Request] = []
    twins: dict[int, list[_Request]] = {}
    place_of: dict[tuple[int, tuple[int, ...]], int] = {}
    for request in batch:
        if request.feed < SHARED_PREFILL:
            leaders.append(request)
            continue
        key = (request.session.cached, tuple(request.tokens))
        if key in place_of:
            twins.setdefault(place_of[key], []).append(request)
        else:
            place_of[key] = len(leaders)
            leaders.append(request)
    return leaders, twins


def _attention_masks(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]]:
    """How this model wants its attention mask: one for all layers, or one for each kind of layer."""
    config = model.config.get_text_config()
    kinds: set[str] = set(getattr(config, "layer_types", None) or ())
    window: int = getattr(config, "sliding_window", None) or 0
    _check_decodable(model, kinds)

    def full(visible: Tensor, positions: Tensor) -> Tensor:
        if model.config._attn_implementation == "sdpa":
            return visible
        hidden = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)  # eager adds its mask
        return hidden.masked_fill_(~visible, torch.finfo(model.dtype).min)

    def sliding(visible: Tensor, positions: Tensor) -> Tensor:
        columns = torch.arange(visible.shape[-1], device=visible.device)
        return full(visible & (columns - 1 > positions[:, None, :, None] - window), positions)

    if kinds == {"full_attention", "sliding_attention"}:
        return lambda visible, positions: {
            "full_attention": full(visible, positions),
            "sliding_attention": sliding(visible, positions),
        }
    return sliding if window and "full_attention" not in kinds else full


def _check_decodable(model: PreTrainedModel, layer_kinds: set[str]) -> None:
    """Refuse what would be decoded wrongly without a word."""
    unsupported = sorted(layer_kinds - {"full_attention", "sliding_attention"})
    attention = model.config._attn_implementation
    if unsupported or getattr(model, "_is_stateful", False):
        problem = f"it has {', '.join(unsupported) or 'recurrent state'}, not plain attention"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        problem = "it takes no position_ids"
    elif attention not in ("sdpa", "eager"):
        problem = f"its attention is {attention}: load it with attn_implementation='sdpa'"
    else:
        return
    raise ModelError(f"the local sampler cannot decode {type(model).__name__}: {problem}")
