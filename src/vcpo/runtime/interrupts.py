"""Ctrl-C and SIGTERM ask a run to stop in order; a second Ctrl-C does not wait."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from typing import Any

from vcpo.pipeline.controller import Controller

STOP_SECONDS = 3.0
"""After Ctrl-C: time for the step in progress and a checkpoint; then the run is ended where it stands."""


def stop_in_order(controller: Controller | None, training: asyncio.Task[Any]) -> None:
    """Let the controller end by itself if there is one; end it anyway soon after."""
    if controller is None:
        training.cancel()
        return
    controller.stop()
    asyncio.get_running_loop().call_later(STOP_SECONDS, training.cancel)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call ``stop`` on the first SIGINT or SIGTERM of the running event loop's process."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()

    def once() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, once)
