"""Runs the cells of a grid in child processes, as many at once as are asked for.

=============== ========================== ============================ ==================================
who             waits for                  woken by                     gives up after
=============== ========================== ============================ ==================================
comparison      a child's end              its exit code, looked at     runtime.timeout_seconds without a
                                           every fifth of a second      row of metrics or a line in its log:
                                                                        then the child is killed
child           see :mod:`vcpo.pipeline`   its run                      the comparison's end (its stdin)
Ctrl-C          every child's end          SIGINT to each               100 s, or a second Ctrl-C: killed
=============== ========================== ============================ ==================================

Runs that share a warm-started model wait until the first of them has made it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vcpo.compare.grid import Cell, differences, identity, warm_start_key
from vcpo.config import load_config
from vcpo.errors import CheckpointError, ConfigError
from vcpo.monitor.report import CONFIG_FILE, SUMMARY_FILE, read_summary
from vcpo.monitor.sinks import METRICS_FILE, read_metrics

LOGS_FOLDER = "logs"
HEADER = "-- "
"""Begins the first line that a run writes to its log."""
ERROR = "error: "
"""Begins the line that says why a run failed."""
INTERRUPTED = 130
POLL_SECONDS = 0.2
STOP_SECONDS = 100.0
"""After Ctrl-C: time for every child to end its step and write a checkpoint: more than a run gives itself."""


class Listener(Protocol):
    """Hears how far the runs are."""

    def steps(self, count: int) -> None:
        """So many more steps were taken, by all runs together."""
        ...

    def ended(self, cell: Cell, error: str | None) -> None:
        """A run was completed, or failed for the reason given."""
        ...

    def running(self, cells: Sequence[Cell]) -> None:
        """These runs go on now."""
        ...


def damage(cell: Cell) -> str | None:
    """Why nobody can tell whose run the folder of this cell has; None if it can be told, or has none."""
    path = cell.folder / CONFIG_FILE
    if not path.exists():
        begun = (cell.folder / METRICS_FILE).exists() or (cell.folder / SUMMARY_FILE).exists()
        return f"{path} is gone" if begun else None
    try:
        load_config(path)
    except ConfigError as error:
        return str(error)
    return None


def is_finished(cell: Cell) -> bool:
    """Whether the run of this cell was ended earlier.

    Raises ConfigError if its folder has a run with other settings.
    """
    if (cell.folder / CONFIG_FILE).exists():
        _refuse_other_settings(cell)
    return bool(read_summary(cell.folder))


def _refuse_other_settings(cell: Cell) -> None:
    there = load_config(cell.folder / CONFIG_FILE)
    if identity(there) == identity(cell.config):
        return
    was, now = differences(cell.config, there), differences(there, cell.config)
    what = ", ".join(
        f"{dotted} was {was[dotted]!r} and is now {value!r}"
        for dotted, value in now.items()
        if not dotted.startswith(("run.", "runtime."))
    )
    raise ConfigError(f"{cell.folder} has a run with other settings ({what}): choose another --out")


class Metrics:
    """Counts the rows of a metrics file that another process writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self.rows = path, 0, 0

    def update(self) -> int:
        """By how many the rows have grown since the last call; resuming rewrites the file, without some."""
        before = self.rows
        try:
            size = self._path.stat().st_size
            if size < self._offset:
                self._offset = self.rows = 0
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read(size - self._offset)
        except OSError:
            return 0
        self._offset += len(new)
        self.rows += new.count(b"\n")
        return self.rows - before


class Child:
    """The process of one run."""

    def __init__(self, cell: Cell, log: Path, lock: int | None = None) -> None:
        self.cell, self.log = cell, log
        resume = _prepare(cell)
        self.metrics = Metrics(cell.folder / METRICS_FILE)
        self.metrics.update()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._start(resume, lock)
        self._life, self._changed = self._signs_of_life(), time.monotonic()

    def _start(self, resume: Path | None, lock: int | None) -> subprocess.Popen[bytes]:
        order = {"config": self.cell.config.model_dump(mode="json"), "resume": str(resume) if resume else ""}
        threads = str(self.cell.config.runtime.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as output:
            output.write(f"\n{HEADER}{time.strftime('%Y-%m-%d %H:%M:%S')} {self.cell}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "vcpo.compare.worker"],
                stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
                start_new_session=True, pass_fds=() if lock is None else (lock,),
            )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        return process

    @property
    def has_its_model(self) -> bool:
        """Whether the run is past its warm start."""
        return (self.cell.folder / "initial_model").exists()

    def exit_code(self) -> int | None:
        """None while it runs; a negative number is the signal that ended it."""
        return self._process.poll()

    def is_silent(self) -> bool:
        """Whether neither metrics nor log have grown for too long."""
        if (life := self._signs_of_life()) != self._life:
            self._life, self._changed = life, time.monotonic()
        return time.monotonic() - self._changed > self.cell.config.runtime.timeout_seconds

    def _signs_of_life(self) -> list[int]:
        files = (self.cell.folder / METRICS_FILE, self.log)
        return [file.stat().st_size if file.exists() else 0 for file in files]

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of a process that has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def error(self, code: int) -> str:
        """Why it ended with ``code``: a signal's name, else the last line of its log."""
        if code < 0:
            return f"ended by {_signal_name(-code)}; its log is {self.log}"
        told = (
            self.log.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{HEADER}")[2].splitlines()
        )
        errors = [line.removeprefix(ERROR) for line in told if line.startswith(ERROR)]
        return errors[-1] if errors else f"exit code {code}; its log is {self.log}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


def _prepare(cell: Cell) -> Path | None:
    """The folder to resume from, if it has a checkpoint and the metrics of all steps before it; else whatever
    is there is removed."""
    from vcpo.learner.checkpoint import latest_checkpoint, step_of

    if (cell.folder / CONFIG_FILE).exists() and (checkpoint := latest_checkpoint(cell.folder)) is not None:
        step = step_of(checkpoint)
        with contextlib.suppress(CheckpointError):
            if sum(row["step"] <= step for row in read_metrics(cell.folder)) == step:
                return cell.folder
    if cell.folder.exists():
        shutil.rmtree(cell.folder)
    return None


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int, listener: Listener, lock: int | None = None
) -> dict[str, str]:
    """Run every cell; name and error of those that failed.

    On KeyboardInterrupt the children are stopped in order, and it is raised again.
    """
    return _Runs(cells, out / LOGS_FOLDER, jobs, listener, lock)()


class _Runs:
    def __init__(
        self, cells: Sequence[Cell], logs: Path, jobs: int, listener: Listener, lock: int | None
    ) -> None:
        self._waiting, self._logs, self._jobs, self._listener, self._lock = (
            list(cells),
            logs,
            jobs,
            listener,
            lock,
        )
        self._children: list[Child] = []
        self._warm: set[str] = set()
        """Keys of the warm-started models that are there."""
        self._failed: dict[str, str] = {}

    def __call__(self) -> dict[str, str]:
        try:
            while self._waiting or self._children:
                self._start_some()
                time.sleep(POLL_SECONDS)
                self._look()
        except BaseException:
            self._stop()
            raise
        return self._failed

    def _start_some(self) -> None:
        started = False
        while len(self._children) < self._jobs and (cell := self._next()) is not None:
            self._waiting.remove(cell)
            self._children.append(Child(cell, self._logs / f"{cell.name}.log", self._lock))
            started = True
        if started:
            self._listener.running([child.cell for child in self._children])

    def _next(self) -> Cell | None:
        """The first cell whose warm-started model nobody is just making."""
        being_made = {warm_start_key(child.cell.config) for child in self._children} - self._warm - {None}
        return next((c for c in self._waiting if warm_start_key(c.config) not in being_made), None)

    def _look(self) -> None:
        for child in list(self._children):
            code = child.exit_code()
            if added := child.metrics.update():
                self._listener.steps(added)
            if child.has_its_model and (key := warm_start_key(child.cell.config)):
                self._warm.add(key)
            if code is not None:
                self._end(child, None if code == 0 else child.error(code))
            elif child.is_silent():
                child.kill()
                seconds = child.cell.config.runtime.timeout_seconds
                self._end(
                    child,
                    f"killed after {seconds:g} s without a row of metrics (runtime.timeout_seconds); its log "
                    f"is {child.log}",
                )

    def _end(self, child: Child, error: str | None) -> None:
        child.close()
        self._children.remove(child)
        if error is not None:
            self._failed[child.cell.name] = error
        self._listener.ended(child.cell, error)
        self._listener.running([child.cell for child in self._children])

    def _stop(self) -> None:
        """Ask every child to stop; kill those that have not within STOP_SECONDS, or at the next Ctrl-C."""
        try:
            for child in self._children:
                child.interrupt()
            _wait(lambda: all(child.exit_code() is not None for child in self._children), STOP_SECONDS)
        finally:
            for child in self._children:
                child.kill()
                child.close()


def _wait(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
