"""The group over which weights are broadcast, without an engine."""

from __future__ import annotations

import socket
import threading

import torch

from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup
from vcpo.samplers.vllm.process import free_port


def test_tensors_arrive_and_the_port_is_open_on_its_address_alone() -> None:
    port, groups = free_port(), dict[int, WeightGroup]()

    def join(rank: int) -> None:
        groups[rank] = WeightGroup("127.0.0.1", port, rank, 2, "cpu", 60.0)

    def broadcast(rank: int, tensor: torch.Tensor) -> None:
        groups[rank].broadcast(tensor)

    ends = torch.arange(4.0), torch.zeros(4)
    for work in (lambda rank: join(rank), lambda rank: broadcast(rank, ends[rank])):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ends[1].tolist() == [0, 1, 2, 3]
    # Another loopback address is another interface's port: free, unless the store listens everywhere.
    socket.create_server(("127.0.0.2", port)).close()
