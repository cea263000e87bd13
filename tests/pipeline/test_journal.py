"""The journal: a rollout is paid for once, through crashes and rewinds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.errors import CheckpointError
from vcpo.pipeline.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def held(journal: Journal, numbers: range) -> list[int]:
    return [n for n in numbers if journal.read(n) is not None]


def test_what_was_appended_is_read_and_nothing_else(path: Path) -> None:
    journal = Journal(path)
    records = {3: b"three", 0: b"\x00\xff" * 1000, 7: b""}
    journal.append(records.items())
    assert {n: journal.read(n) for n in records} == records
    assert journal.read(1) is None


def test_appending_again_keeps_the_first_record(path: Path) -> None:
    """A group that arrives twice (ordered again after a crash) must not replace what was trained on."""
    journal = Journal(path)
    journal.append([(1, b"first"), (2, b"two")])
    journal.mark([1], 0)
    journal.append([(1, b"second"), (3, b"three")])
    assert journal.read(1) == b"first"
    assert journal.read(3) == b"three"
    journal.forget_before(1)
    assert journal.read(1) is None, "the mark must have stayed"


def test_it_survives_reopening_and_a_death_without_close(path: Path) -> None:
    journal = Journal(path)
    journal.append([(1, b"one"), (2, b"two")])
    journal.mark([1], 4)
    other = Journal(path)  # the first one was never closed: its process is gone
    assert other.read(2) == b"two"
    other.rewind(4)
    other.close()
    again = Journal(path)
    again.forget_before(100)
    assert held(again, range(5)) == [1, 2]


def test_forgetting_removes_only_what_was_used_before_the_checkpoint(path: Path) -> None:
    journal = Journal(path)
    journal.append((n, b"x") for n in range(10))
    for step in range(4):
        journal.mark([2 * step, 2 * step + 1], step)
    journal.forget_before(2)  # a checkpoint of version 2 holds steps 0 and 1
    assert held(journal, range(10)) == [4, 5, 6, 7, 8, 9]


def test_rewinding_unmarks_the_steps_after_the_checkpoint(path: Path) -> None:
    """Steps 2 and 3 are lost with the process; their groups are to be trained on again, so that a later
    checkpoint of version 3 may not forget what only step 3 used before the crash."""
    journal = Journal(path)
    journal.append((n, b"x") for n in range(8))
    for step in range(4):
        journal.mark([2 * step, 2 * step + 1], step)
    journal.rewind(2)
    journal.forget_before(4)
    assert held(journal, range(8)) == [4, 5, 6, 7]
    journal.mark([4, 7], 2)
    journal.forget_before(3)
    assert held(journal, range(8)) == [5, 6]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_against_a_dictionary(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any sequence of operations, with reopenings in between, does what a dictionary in memory would."""
    path = tmp_path_factory.mktemp("journal") / "j.sqlite"
    journal, records, steps = Journal(path), dict[int, bytes](), dict[int, int]()
    numbers, step = st.integers(0, 6), st.integers(0, 4)
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["append", "mark", "rewind", "forget", "reopen"])):
            case "append":
                new = data.draw(st.dictionaries(numbers, st.binary(max_size=5)))
                journal.append(new.items())
                records = new | records
            case "mark":
                chosen, at = data.draw(st.lists(numbers)), data.draw(step)
                journal.mark(chosen, at)
                steps |= {n: at for n in chosen if n in records}
            case "rewind":
                to = data.draw(step)
                journal.rewind(to)
                steps = {n: s for n, s in steps.items() if s < to}
            case "forget":
                before = data.draw(step)
                journal.forget_before(before)
                gone = {n for n, s in steps.items() if s < before}
                records = {n: r for n, r in records.items() if n not in gone}
                steps = {n: s for n, s in steps.items() if n not in gone}
            case "reopen":
                journal.close()
                journal = Journal(path)
        assert {n: r for n in range(7) if (r := journal.read(n)) is not None} == records
    journal.close()


def test_a_file_that_is_no_journal_is_named(path: Path) -> None:
    path.write_bytes(b"this is a text file, not a database. " * 100)
    with pytest.raises(
        CheckpointError, match=r"cannot use the journal .*journal\.sqlite: file is not a data"
    ):
        Journal(path)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing/journal\.sqlite"):
        Journal(tmp_path / "missing" / "journal.sqlite")


def test_a_journal_broken_inside_is_reported_when_it_is_read(path: Path) -> None:
    journal = Journal(path)
    journal.append((n, bytes(3000)) for n in range(50))
    journal.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)  # the header page is whole, all others are not
    path.write_bytes(content)
    broken = Journal(path)
    with pytest.raises(CheckpointError, match="cannot use the journal"):
        broken.read(3)


def test_a_table_of_another_shape_is_reported_at_the_first_append(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE groups (text TEXT)")
    other.commit()
    other.close()
    with pytest.raises(CheckpointError, match="no column named number"):
        Journal(path).append([(1, b"one")])


def test_nothing_of_a_failed_append_stays(path: Path) -> None:
    def records() -> Iterator[tuple[int, bytes]]:
        yield 0, b"zero"
        raise RuntimeError("the second record cannot be made")

    journal = Journal(path)
    with pytest.raises(RuntimeError, match="second record"):
        journal.append(records())
    assert held(journal, range(10)) == []
    journal.append([(0, b"again")])
    assert journal.read(0) == b"again"
