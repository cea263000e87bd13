"""Folders for weights on their way, and those that nobody will remove."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vcpo.samplers import shared_memory
from vcpo.samplers.shared_memory import transfer_folder

CHILD = """
from pathlib import Path
from vcpo.samplers import shared_memory
shared_memory.SHARED = Path({shared!r})
print(shared_memory.transfer_folder(1))
"""


def test_what_a_dead_process_left_is_removed_and_what_another_container_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path)
    child = [sys.executable, "-c", CHILD.format(shared=str(tmp_path))]
    left = Path(subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip())
    namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    elsewhere = left.with_name(left.name.replace(namespace, "7"))
    elsewhere.mkdir()  # a process of the same id, which lives in another namespace
    own = transfer_folder(1)
    assert sorted(tmp_path.iterdir()) == sorted([own, elsewhere])
    assert transfer_folder(1) != own and own.exists()
