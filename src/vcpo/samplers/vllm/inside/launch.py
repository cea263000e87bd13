"""Starts a vLLM server that ends with the process that started it: ``python launch.py [options of vLLM]``.

Standard input is a pipe from that process; its end is this one's.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
import threading


def end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    if importlib.util.find_spec("vllm") is None:
        sys.exit(
            f"ImportError: {sys.executable} has no vLLM: "
            "set sampler.python to the Python of the environment that has it"
        )
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that update weights
    threading.Thread(target=end_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
