"""Starts a vLLM server that ends with the process that started it: ``python launch.py [options of vLLM]``.

Standard input is a pipe from that process; its end is this one's. A server is a group of processes, and its
engine outlives the first of them, which answers requests: so a guard of the group's own ends the rest,
whichever goes first. (Ray, for one, kills an actor's children, but not theirs.)
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import select
import signal
import sys

POLL_SECONDS = 0.5


def guard(server: int) -> None:
    """End the whole group, this process too, when the pipe or the server ends."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    while os.getppid() == server:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    if importlib.util.find_spec("vllm") is None:
        sys.exit(
            f"ImportError: {sys.executable} has no vLLM: "
            "set sampler.python to the Python of the environment that has it"
        )
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that update weights
    server = os.getpid()
    if os.fork() == 0:
        guard(server)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
