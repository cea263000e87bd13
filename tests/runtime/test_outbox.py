"""Broadcasts that fail half-way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from vcpo.config import Config
from vcpo.runtime.outbox import BroadcastOutbox
from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup
from vcpo.samplers.vllm.process import free_port


class Group:
    """Fails at the second tensor."""

    def __init__(self, *place: object) -> None:
        self.sent: list[float] = []

    def broadcast(self, tensor: Tensor) -> None:
        if len(self.sent) == 1:
            raise RuntimeError("connection closed")
        self.sent.append(float(tensor))


def test_all_is_gathered_even_if_nobody_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks of the learner gather every tensor together with the first, and would wait for it, or
    take its next collective for this one."""
    monkeypatch.setattr("vcpo.samplers.vllm.inside.vcpo_rendezvous.WeightGroup", Group)
    gathered: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(4):
            gathered.append(number)
            yield str(number), torch.tensor(float(number))

    outbox = BroadcastOutbox(Config())
    outbox.meet("127.0.0.1", 1, 2)
    with pytest.raises(RuntimeError, match="connection closed"):
        outbox.send(tensors())
    assert gathered == [0, 1, 2, 3]
    outbox.send(tensors())  # in no group any more: gathered alone
    assert gathered == [0, 1, 2, 3] * 2


def test_who_waits_for_a_rank_that_failed_fails_too() -> None:
    """Rank 1 is lost. Rank 0 notices; rank 2, which waits for rank 0 alone, does by its leaving."""
    port, size = free_port(), 3
    with ThreadPoolExecutor(size) as threads:
        groups = list(
            threads.map(lambda rank: WeightGroup("127.0.0.1", port, rank, size, "cpu", 90.0), range(size))
        )
        third = threads.submit(lambda: [groups[2].broadcast(torch.zeros(1)) for _ in range(4)])
        groups[1]._group = None
        with pytest.raises(RuntimeError) as kept:  # a logged error may live for long, and its traceback
            for _ in range(4):
                groups[0].broadcast(torch.ones(1))
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            third.result()
    assert kept.value.__traceback__ is not None
    with pytest.raises(RuntimeError, match="has left the broadcast"):
        groups[0].broadcast(torch.ones(1))
