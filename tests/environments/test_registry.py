"""Environments by name, and what a wrong name is answered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vcpo.environments.collect import Collect
from vcpo.environments.countdown import Countdown
from vcpo.environments.jsonl import JsonLines
from vcpo.environments.mathematics import Mathematics
from vcpo.environments.maze import Maze
from vcpo.environments.registry import environment_class
from vcpo.environments.sort import Sort
from vcpo.errors import ConfigError

OWN = """
class Good:
    def problem(self, index, split): ...
    async def play(self, problem, episode): ...

class Mute:
    def problem(self, index, split): ...

class Empty:
    play = 3

class Plain:
    def problem(self, index, split): ...
    def play(self, problem, episode): ...

function = print
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user with modules of their own."""
    (tmp_path / "own_environments.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    (tmp_path / "own_typo.py").write_text("def (:\n")
    (tmp_path / "own_needs.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_built_in_names() -> None:
    names = ["maze", "collect", "sort", "countdown", "jsonl", "math"]
    found = [environment_class(kind) for kind in names]
    assert found == [Maze, Collect, Sort, Countdown, JsonLines, Mathematics]


def test_a_class_of_your_own(own_folder: Path) -> None:
    found = environment_class("own_environments:Good")
    assert (found.__name__, found.__module__) == ("Good", "own_environments")
    assert environment_class("vcpo.environments.maze:Maze") is Maze


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mace", "'mace' is unknown; did you mean 'maze'?"),
        ("JSONL", "did you mean 'jsonl'?"),
        ("count_down", "did you mean 'countdown'?"),
        (
            "zzz",
            "'zzz' is unknown; it is one of maze, collect, sort, countdown, jsonl, math, or module:Class",
        ),
        ("", "'' is unknown"),
        (":Good", "write it as module:Class"),
        ("own_environments:", "write it as module:Class"),
        ("not_there_at_all:Good", "cannot import not_there_at_all: ModuleNotFoundError"),
        ("own_broken:Good", "cannot import own_broken: RuntimeError: first line second line"),
        ("own_typo:Good", "cannot import own_typo: SyntaxError"),
        ("own_needs:Good", "No module named 'a_package_that_is_not_there'"),
        (".relative:Good", "cannot import .relative: TypeError"),
        ("own_environments:Bad", "module own_environments has no class 'Bad'"),
        ("own_environments:function", "does not define as a class 'function'"),
        ("own_environments:Mute", "Mute lacks the method play"),
        ("own_environments:Plain", "Plain.play must be written `async def play`"),
        ("own_environments:Empty", "Empty lacks the method problem and play"),
    ],
)
def test_wrong_names_get_one_line(own_folder: Path, kind: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        environment_class(kind)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_environments_do_without_torch() -> None:
    """They run in rollout workers, which must start fast."""
    code = (
        "import sys; from vcpo.environments import environment_class as find\n"
        "[find(kind) for kind in ('maze', 'collect', 'sort', 'countdown', 'jsonl', 'math')]\n"
        "assert not {'torch', 'transformers', 'sympy', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
