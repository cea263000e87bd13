"""The journal: finished groups in an embedded SQLite file, so that a rollout is paid for once.

A group is written when it finishes and marked with the step that trains on it. After a crash the learner
goes back to its last checkpoint; groups that no step before the checkpoint has used are read back and
trained on instead of being generated again. Groups used before the newest checkpoint are removed, since
no resume can ask for them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from vcpo.errors import CheckpointError


class Journal:
    """Opened by one process at a time (the controller)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._reported():
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS groups "
                "(number INTEGER PRIMARY KEY, step INTEGER, record BLOB NOT NULL)"
            )

    def append(self, records: Iterable[tuple[int, bytes]]) -> None:
        """Keep finished groups; one that is there already stays as it is."""
        with self._transaction() as database:
            database.executemany("INSERT OR IGNORE INTO groups (number, record) VALUES (?, ?)", records)

    def mark(self, numbers: Sequence[int], step: int) -> None:
        """Groups ``numbers`` are trained on in ``step`` (the step that makes version ``step`` + 1)."""
        with self._transaction() as database:
            database.executemany("UPDATE groups SET step = ? WHERE number = ?", [(step, n) for n in numbers])

    def forget_before(self, step: int, skipped: Iterable[int] = ()) -> None:
        """A checkpoint of version ``step`` is safe: groups used before it are not needed any more, nor are
        those it knows as ``skipped``."""
        with self._transaction() as database:
            database.execute("DELETE FROM groups WHERE step < ?", (step,))
            database.executemany("DELETE FROM groups WHERE number = ?", [(number,) for number in skipped])

    def rewind(self, step: int) -> None:
        """The learner is back at version ``step``: later marks did not happen."""
        with self._transaction() as database:
            database.execute("UPDATE groups SET step = NULL WHERE step >= ?", (step,))

    def has(self, number: int) -> bool:
        with self._reported():
            row = self._database.execute("SELECT 1 FROM groups WHERE number = ?", (number,)).fetchone()
        return row is not None

    def read(self, number: int) -> bytes | None:
        with self._reported():
            row = self._database.execute("SELECT record FROM groups WHERE number = ?", (number,)).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        self._database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with self._reported(), self._database:
            self._database.execute("BEGIN")
            yield self._database

    @contextlib.contextmanager
    def _reported(self) -> Generator[None]:
        """A full disk or a broken file, under a name of our own."""
        try:
            yield
        except sqlite3.Error as error:
            raise CheckpointError(f"cannot use the journal {self._path}: {error}") from error
