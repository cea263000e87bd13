"""Broadcasts that fail half-way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vcpo.config import Config
from vcpo.runtime.outbox import BroadcastOutbox


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
