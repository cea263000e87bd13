"""Where metrics go: one JSON line a step, and TensorBoard.

metrics.jsonl is the record that everything else is made from, so it survives a kill at any moment: each
row is flushed whole, a torn last line is ignored on reading and removed on resuming, and a number that is
not finite is written as null, which every JSON reader understands.
"""

from __future__ import annotations

import json
import math
import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vcpo.errors import CheckpointError, VcpoError
from vcpo.monitor.glossary import GLOSSARY, HISTOGRAM, SAMPLERS, require_known

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_FLUSH_SECONDS = 10


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """Rows of the run in ``folder``, in order; a torn last line, left by a killed run, is ignored.

    Raises :class:`CheckpointError` if there is no metrics file, or if any other line is broken.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a run folder: no readable {METRICS_FILE} in it; give the folder that "
            "'vcpo train' printed at its end"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise CheckpointError(
                    f"{path}, line {number} is not a row of metrics: remove that line, or restore the file"
                ) from error
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a kill, sees the whole old file or the whole new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class MetricsWriter:
    """Appends rows to ``folder``/metrics.jsonl and ``folder``/tensorboard; use it as a context manager.

    With ``resume_step`` n, rows of later steps are dropped first: the resumed run will write them again.
    """

    def __init__(self, folder: Path | str, resume_step: int | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / METRICS_FILE).exists():
            _keep_rows(folder, resume_step)
        self._lines = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._curves = _TensorBoard(folder / TENSORBOARD_FOLDER, resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; ``step`` is required and every key must be in the glossary.

        Raises :class:`VcpoError` for a key that is not, and for a value that is not a number.
        """
        require_known(row)
        if "step" not in row:
            raise VcpoError("a row of metrics needs its 'step'")
        plain = {key: _plain(key, value) for key, value in row.items()}
        self._lines.write(json.dumps(plain, allow_nan=False) + "\n")
        self._lines.flush()
        self._curves.write(plain)

    def close(self) -> None:
        """Flush and close both; a second call does nothing."""
        if not self._lines.closed:
            self._lines.close()
            self._curves.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keep_rows(folder: Path, last_step: int | None) -> None:
    """Rewrite the file without rows after ``last_step`` (None: all stay) and without a torn last line."""
    kept = [row for row in read_metrics(folder) if last_step is None or row["step"] <= last_step]
    write_atomically(folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in kept))


def _plain(key: str, value: Any) -> Any:
    """``value`` as JSON can hold it: an int, a finite float, or None; the histogram as {lag: groups},
    samplers as {name: {figure: value}}."""
    if key == HISTOGRAM:
        return {str(int(lag)): int(groups) for lag, groups in value.items()}
    if key == SAMPLERS:
        return {
            name: {k: v if isinstance(v, str) else _plain(k, v) for k, v in figures.items()}
            for name, figures in value.items()
        }
    if value is None or isinstance(value, numbers.Integral):
        return value if value is None else int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise VcpoError(f"metric '{key}' must be a number, got {type(value).__name__}") from error
    return number if math.isfinite(number) else None


class _TensorBoard:
    """One curve per metric, named ``group/metric`` and described from the glossary.

    Written with TensorBoard's own event writer, the one that torch.utils.tensorboard wraps: no torch.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Generated modules: their classes appear at run time only, so a type checker cannot see them.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._writer = EventFileWriter(str(folder), flush_secs=TENSORBOARD_FLUSH_SECONDS)
        self._described: set[str] = set()
        if resume_step is not None:
            # Tells TensorBoard to forget what an earlier file says from this step on.
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)

    def write(self, row: Mapping[str, Any]) -> None:
        values = [
            self._value(key, value)
            for key, value in row.items()
            if value is not None and key not in ("step", HISTOGRAM, SAMPLERS)
        ]
        values += [
            self._summaries.Summary.Value(tag=f"samplers/{name}/{key}", simple_value=value)
            for name, figures in row.get(SAMPLERS, {}).items()
            for key, value in figures.items()
            if not isinstance(value, str | None)
        ]
        self._add(step=row["step"], summary=self._summaries.Summary(value=values))

    def _value(self, key: str, value: float) -> Any:
        """One point of a curve; the first one of each carries the description."""
        metric = GLOSSARY[key]
        point = self._summaries.Summary.Value(tag=f"{metric.group}/{key}", simple_value=value)
        if key not in self._described:
            self._described.add(key)
            point.metadata.summary_description = f"{metric.meaning} {metric.suspect}"
        return point

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), **fields))

    def close(self) -> None:
        self._writer.close()
