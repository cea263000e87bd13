"""The child process of a comparison: ``python -m vcpo.compare.worker`` does one run.

Its order is one line of JSON on stdin, which then stays open: when it ends, the comparison is gone, and the
run stops in order. What the run says goes to stdout and stderr, which are its log; an error is the last line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from vcpo.compare.children import ERROR, INTERRUPTED, STOP_SECONDS
from vcpo.config import Config
from vcpo.errors import CheckpointError, VcpoError
from vcpo.monitor.progress import RichProgress


def _stop_when_stdin_ends() -> None:
    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(STOP_SECONDS)  # code that blocks, or hides every error, does not hear it
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    # A command that a script began with & ignores SIGINT, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    order = json.loads(sys.stdin.buffer.readline())
    _stop_when_stdin_ends()
    from vcpo.runtime import train

    config = Config.model_validate(order["config"])
    resume = Path(order["resume"]) if order["resume"] else None
    try:
        summary = train(config, resume=resume, progress=RichProgress())
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, VcpoError):
            traceback.print_exc()
        name = "" if isinstance(error, VcpoError) else f"{type(error).__name__}: "
        hint = f"; remove {resume} to have it begin anew" if isinstance(error, CheckpointError) else ""
        sys.stderr.write(f"{ERROR}{name}{' '.join(str(error).split())}{hint}\n")
        return 1
    return 0 if summary["completed"] else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
