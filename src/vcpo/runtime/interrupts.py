"""Ctrl-C and SIGTERM ask a run to stop in order; a second Ctrl-C does not wait."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from typing import Any

from vcpo.pipeline.controller import Controller

STOP_SECONDS = 3.0
"""After Ctrl-C: time for the step in progress; then what is being played or evaluated is given up, and the
last complete step is written down."""
LAST_SECONDS = 90.0
"""Then the run is ended where it stands: a learner's step, or a checkpoint, has taken longer than this."""


def stop_in_order(controller: Controller | None, training: asyncio.Task[Any]) -> None:
    """Let the controller end by itself if there is one, then in a hurry, then anyway."""
    if controller is None:
        training.cancel()
        return
    controller.stop()
    loop = asyncio.get_running_loop()
    loop.call_later(STOP_SECONDS, controller.hurry)
    loop.call_later(LAST_SECONDS, training.cancel)


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
